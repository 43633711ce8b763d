"""What every process says of a model: its versions and signatures, what is served of them, and its arrays."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from shared_graph.errors import InvalidRequest, Unavailable
from shared_graph.model_source import ModelSource
from shared_graph.wire import ProcessInfo

VersionChoice = int | str | None  # a version, a label, or None: the latest
Arrays = dict[str, np.ndarray]  # by name


class ModelKey(NamedTuple):
    """A version of a model, of all that are served."""

    name: str
    version: int

    def __str__(self) -> str:
        return f"{self.name} version {self.version}"


class TensorSpec(NamedTuple):
    """What goes into a signature, or comes out of it, under one name."""

    dtype: str  # numpy's name for it; "object": strings, as bytes
    shape: tuple[int | None, ...] | None  # None is a free axis

    @property
    def has_rows(self) -> bool:
        return bool(self.shape) and self.shape[0] is None

    def declares(self, shape: tuple[int, ...]) -> bool:
        """Is it one of those that this has said? TensorFlow may take others, and broadcast them."""
        if self.shape is None:
            return True
        return len(shape) == len(self.shape) and all(n is None or n == m for n, m in zip(self.shape, shape))


@dataclasses.dataclass
class Signature:
    """What can be run: named inputs to named outputs, in the order of their sorted names."""

    name: str
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    method: str  # tensorflow/serving/predict, /classify or /regress
    mutates_state: bool  # running it changes variables: it is never run twice for one request
    runs_python: bool  # such as remote_predict, which may wait for another run; the adder's own does not count
    refusal: str | None = None  # why it cannot be run at all


class LoadedVersion(NamedTuple):
    """What loading a version on the parameter server has found out about it."""

    metadata: dict[str, Any]  # its SignatureDefs as proto3 JSON
    fingerprint: str  # of its graph
    batchable: tuple[str, ...]  # the signatures of which several requests may share one run
    undecided: tuple[str, ...]  # those of which that is to be found out from real requests
    runs_python: bool
    weights_id: str  # another one whenever weights have been set


class ModelVersion(NamedTuple):
    """A version of a served model as every process knows it, without its graph."""

    source: ModelSource
    state: str  # LOADING, AVAILABLE, UNLOADING or END, as TensorFlow Serving has them
    error: str | None = None  # why it is not served, or not by every worker; or what is odd about its files
    loaded: LoadedVersion | None = None  # when the parameter server has it
    missing_on: tuple[int, ...] = ()  # the workers that do not have it, or not yet

    @property
    def key(self) -> ModelKey:
        return ModelKey(self.source.name, self.source.version)


class Snapshot(NamedTuple):
    """All that is served at one moment; a later one has a higher number."""

    snapshot_id: int = 0
    versions: dict[ModelKey, ModelVersion] = {}  # noqa: RUF012  (never changed: each snapshot has dicts of its own)
    loading: frozenset[str] = frozenset()  # models whose folder has not yet been looked at and loaded once
    # by model, and label or None (the latest): the version; None while that changes, and then requests wait for it
    pointers: dict[tuple[str, str | None], int | None] = {}  # noqa: RUF012

    @property
    def loaded(self) -> dict[ModelKey, LoadedVersion]:
        """Of the versions that the parameter server has, what it has found out about them."""
        return {key: version.loaded for key, version in self.versions.items() if version.loaded}

    def find(self, name: str, choice: VersionChoice) -> ModelVersion | None:
        """What is asked for, if it is served; where a pointer just moves, what it stood for is not known."""
        version = choice if isinstance(choice, int) else self.pointers.get((name, choice))
        found = self.versions.get(ModelKey(name, version)) if version is not None else None
        return found if found and found.loaded else None

    def is_moving(self, name: str, choice: VersionChoice) -> bool:
        """Will it be known in a moment what is asked for?"""
        return name in self.loading or (not isinstance(choice, int) and self.pointers.get((name, choice), 0) is None)

    def latest(self, name: str) -> ModelKey:
        """The key of the latest version. Raises InvalidRequest, or Unavailable while that is moving, see is_moving."""
        if self.is_moving(name, None):
            raise Unavailable(f"A version of model {name} is just being taken into use; try again.")
        if (version := self.find(name, None)) is None:
            raise not_found(name, None)
        return version.key


class WorkerReport(NamedTuple):
    """What a worker has, told to the parameter server whenever it changes."""

    index: int
    incarnation: str  # of the worker
    settled: dict[str, int]  # by model: the last snapshot that it follows, though versions may still be brought up
    ready: dict[ModelKey, str]  # the versions that it has, and with which weights, by their id
    failed: dict[ModelKey, str]  # those that it could not bring up, and why


class ServerInfo(NamedTuple):
    """What ``ParameterServer.start`` returns; only the primary has the addresses of all, and what is served."""

    process: ProcessInfo
    incarnation: str  # another one in each life
    folder: str  # in which variables are kept
    addresses: list[str]  # of the TensorFlow servers
    snapshot: Snapshot


def not_found(name: str, choice: VersionChoice) -> InvalidRequest:
    """In TensorFlow Serving's words."""
    if isinstance(choice, str):
        return InvalidRequest(f"Unrecognized servable version label: {choice}")
    which = f"Latest({name})" if choice is None else f"Specific({name}, {choice})"
    return InvalidRequest(f"Servable not found for request: {which}", 404)


MAX_FEED_BYTES = 2**31 - 2**28  # of 2 GiB for a run, the rest is for what is merged with it
PLAIN_TYPES = {str, bytes, np.str_, np.bytes_, int, float, bool, type(None)}


def as_arrays(inputs: Any) -> Any:
    """Arrays by name, or one array, of what another process can unpickle: numbers, strings or bytes.

    Raises InvalidRequest.
    """
    if isinstance(inputs, dict):
        return {str(name): _as_array(f"input {name!r}", value) for name, value in inputs.items()}
    return _as_array("the input", inputs)


def as_feed(inputs: Any) -> Any:
    """As ``as_arrays``, of what one run can take: TensorFlow ends the process that sends it more."""
    found = as_arrays(inputs)
    arrays = found.values() if isinstance(found, dict) else [found]
    size = sum(array.nbytes for array in arrays)
    size += sum(len(v) for array in arrays if array.dtype == object for v in array.flat if isinstance(v, (str, bytes)))
    if size > MAX_FEED_BYTES:
        why = f"{size:,} bytes of inputs are more than the {MAX_FEED_BYTES:,} that one run can take"
        raise InvalidRequest(why, 413)
    return found


def _as_array(what: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except UnicodeDecodeError:  # of bytes among strings
        array = np.asarray(value, object)
    except ValueError:
        raise InvalidRequest("An input is ragged: all its rows must have the same shape") from None
    if array.dtype.kind in "SU" and not isinstance(value, np.ndarray):
        array = np.asarray(value, object)  # else strings would lose the zeros at their ends
    if array.dtype.hasobject:
        kinds = {type(element) for element in array.ravel().tolist()} if array.dtype == object else {array.dtype}
        if strange := kinds - PLAIN_TYPES:
            kind = getattr(strange.pop(), "__name__", "a structure")
            raise InvalidRequest(f"{what} takes numbers, strings or bytes, not objects ({kind})")
    return array


def to_array(what: str, value: Any, dtype: np.dtype) -> np.ndarray:
    """Cast without loss of kind: ints to floats and to ints that have their values, not floats to ints; strings to
    bytes. Raises InvalidRequest."""
    array = np.asarray(value)
    if dtype == object:
        if array.size and array.dtype.kind not in "OSU":
            raise InvalidRequest(f"{what} takes strings or bytes, not {array.dtype}")
        try:
            flat = [v.encode() if isinstance(v, str) else v for v in array.astype(object).ravel().tolist()]
        except UnicodeEncodeError:
            raise InvalidRequest(f"{what} has a string with half of a surrogate pair, which is no UTF-8") from None
        if not all(isinstance(v, bytes) for v in flat):
            raise InvalidRequest(f"{what} takes strings or bytes, not {array.dtype}")
        return np.fromiter(flat, object).reshape(array.shape)
    if array.dtype.kind == dtype.kind == "V" and array.itemsize == dtype.itemsize:
        array = array.view(dtype)  # bfloat16, which numpy's files do not know
    if array.dtype == dtype:
        return array
    may_cast = np.can_cast(array.dtype, dtype, "same_kind") or (array.dtype.kind == "i" and dtype.kind == "u")
    if not (may_cast or array.size == 0):
        has_text = array.dtype.kind in "OSU" and any(isinstance(v, (str, bytes)) for v in array.flat)
        raise InvalidRequest(f"{what} takes {dtype}, not {'strings' if has_text else array.dtype}")
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if dtype.kind in "iu" and not np.array_equal(result, array):
        raise InvalidRequest(f"{what} has a value outside the range of {dtype}")
    return result


def array_of(value: Any) -> np.ndarray:
    """Of what TensorFlow gives: a single string as ``bytes``, of which numpy would drop the zeros at its end."""
    return np.array(value, object) if isinstance(value, bytes) else np.asarray(value)
