"""What every process says of a model: where it comes from, its versions and signatures, its arrays."""

from __future__ import annotations

import collections
import dataclasses
import glob
import os
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from shared_graph.errors import InvalidRequest

ADDER = "adder"


class ModelSource(NamedTuple):
    """Where a served model comes from: a SavedModel's folder, or a function that builds a graph."""

    name: str
    version: int | None  # None: the folder has numbered versions, which come and go
    folder: str | None = None
    function: str | None = None  # "module:function"

    def __str__(self) -> str:
        return f"{self.name} ({self.folder or self.function})"

    def versions(self) -> dict[int, ModelSource]:
        """What can be loaded at the moment."""
        if self.version is not None:
            return {self.version: self}
        names = {path.partition("/")[0] for path in glob.glob("*/saved_model.pb*", root_dir=self.folder)}
        return {
            int(name): ModelSource(self.name, int(name), os.path.join(self.folder, name))
            for name in names
            if name.isdecimal()
        }

    def labels(self) -> dict[str, int]:
        """The symbolic links ``stable -> 123`` beside the versions."""
        links = glob.glob("*", root_dir=self.folder) if self.version is None else ()
        targets = {link: os.path.basename(os.path.realpath(os.path.join(self.folder, link))) for link in links}
        return {link: int(target) for link, target in targets.items() if target.isdecimal() and not link.isdecimal()}


def model_source(value) -> ModelSource:
    """Parse ``[NAME=]DIR`` or ``[NAME=]module:function``."""
    if isinstance(value, ModelSource):
        return value
    name, where = re.fullmatch(r"(?:([\w.-]+)=)?(.*)", str(value), re.S).groups()
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", where) and not os.path.isdir(where):
        return ModelSource(name or where.partition(":")[2], 1, function=where)
    if not where or not os.path.isdir(where):
        raise ValueError("a folder that exists, or module:function, with an optional NAME= before it")
    parent, base = os.path.split(os.path.abspath(where))
    if glob.glob("saved_model.pb*", root_dir=where):  # perhaps one version of several, named outright
        is_version = base.isdecimal()
        name = name or (os.path.basename(parent) if is_version else base)
        return ModelSource(name, int(base) if is_version else 1, os.path.abspath(where))
    source = ModelSource(name or base, None, os.path.abspath(where))
    if not source.versions():
        raise ValueError("a folder with a saved_model.pb in it, or in one of its folders that are named by a number")
    return source


def model_sources(values) -> tuple[ModelSource, ...]:
    values = values.split(",") if isinstance(values, str) else values if isinstance(values, (list, tuple)) else [values]
    sources = tuple(map(model_source, values))
    [(name, count)] = collections.Counter([ADDER, *(source.name for source in sources)]).most_common(1)
    if count > 1:
        raise ValueError(f"one model for each name, but {name!r} stands for two (NAME=... gives another name)")
    return sources


class TensorSpec(NamedTuple):
    dtype: str  # numpy's name for it; "object": strings, as bytes
    shape: tuple[int | None, ...] | None  # None is a free axis

    @property
    def has_rows(self) -> bool:
        return bool(self.shape) and self.shape[0] is None


@dataclasses.dataclass
class Signature:
    """What can be run: named inputs to named outputs, in the order of their sorted names."""

    name: str
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    method: str  # tensorflow/serving/predict, /classify or /regress
    writes: bool  # running it changes variables: it is never run twice for one request
    calls_out: bool  # it runs Python functions, such as remote_predict: it may wait for what only another place can do
    merged: bool = False  # rows of several requests may share one run


class Model(NamedTuple):
    """A version of a served model as everybody but its graph knows it."""

    source: ModelSource
    state: str  # LOADING, AVAILABLE, UNLOADING or END, as TensorFlow Serving has them; MOVING: wait for another version
    error: str | None = None  # why it could not be loaded
    metadata: dict[str, Any] | None = None  # its SignatureDefs as proto3 JSON, when the parameter server has loaded it
    merged: tuple[str, ...] = ()  # the signatures of which several requests may share one run
    calls_out: bool = False
    weights: str | None = None  # which ones, of a mirror

    @property
    def version(self) -> int:
        return self.source.version


Version = int | str | None  # a version, a label, or None: the latest
Key = tuple[str, Version]  # what is asked for: a model's name, and that
Arrays = dict[str, np.ndarray]  # by name
ADDER_SOURCE = ModelSource(ADDER, 1, function="shared_graph.adder:build_adder")


def to_array(what: str, value: Any, dtype: np.dtype) -> np.ndarray:
    """Cast without loss of kind: ints to floats, not floats to ints; text to bytes. Raises InvalidRequest."""
    array = np.asarray(value)
    if array.dtype.kind == "V" and array.itemsize == dtype.itemsize:  # bfloat16, which numpy's files do not know
        array = array.view(dtype)
    if dtype == object:
        flat = [v.encode() if isinstance(v, str) else v for v in array.astype(object).ravel().tolist()]
        if not all(isinstance(v, bytes) for v in flat):
            raise InvalidRequest(f"{what} takes text or bytes, not {array.dtype}")
        return objects(flat).reshape(array.shape)
    if array.dtype == dtype:
        return array
    if not (np.can_cast(array.dtype, dtype, "same_kind") or array.size == 0):
        raise InvalidRequest(f"{what} takes {dtype}, not {array.dtype}")
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if dtype.kind in "iu" and not np.array_equal(result, array):
        raise InvalidRequest(f"{what} has a value outside the range of {dtype}")
    return result


def objects(values: Iterable[Any]) -> np.ndarray:
    """A vector of these, whatever they are."""
    return np.fromiter(values, object)


def not_found(name: str, version: Version) -> InvalidRequest:
    if isinstance(version, str):
        return InvalidRequest(f"Unrecognized servable version label: {version}")
    which = f"Latest({name})" if version is None else f"Specific({name}, {version})"
    return InvalidRequest(f"Servable not found for request: {which}", 404)


def as_arrays(inputs: Any) -> Any:
    """Arrays by name, or one array. Raises InvalidRequest."""
    try:
        is_named = isinstance(inputs, dict)
        return {name: np.asarray(value) for name, value in inputs.items()} if is_named else np.asarray(inputs)
    except ValueError:
        raise InvalidRequest("An input is ragged: all its rows must have the same shape") from None
