"""Predicts a whole file, row by row, larger than memory if need be."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from shared_graph.cluster import Cluster
from shared_graph.errors import InvalidRequest, first_sentence
from shared_graph.models import Arrays
from shared_graph.npy_codec import is_in_npy, string_width
from shared_graph.options import Options
from shared_graph.progress import shown_progress


def check_files(source: str, target: str) -> None:
    """Raises InvalidRequest for what cannot be read or written, before anything is started for it."""
    folder = os.path.dirname(target) or "."
    if not os.path.isfile(source):
        raise InvalidRequest(f"--input {source}: there is no such file")
    if not os.access(source, os.R_OK):
        raise InvalidRequest(f"--input {source}: the file cannot be read")
    if not os.path.isdir(folder):
        raise InvalidRequest(f"--output {target}: there is no folder {folder}")
    if os.path.exists(target) and not os.path.isfile(target):
        raise InvalidRequest(f"--output {target}: it is there, and no file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidRequest(f"--output {target}: nothing can be written to the folder {folder}")


def with_one_version(options: Options) -> Options:
    """With the highest version of the one model alone: a whole file is predicted by one version."""
    [source] = options.model
    versions = source.versions()
    return dataclasses.replace(options, model=[versions[max(versions)]])


def predict_file(cluster: Cluster, model: str, source: str, target: str) -> None:
    """Stream the rows of ``source`` through a model's default signature into ``target``, with progress shown.

    ``.npy`` files may be larger than memory. The target appears whole or not at all. Raises InvalidRequest, OSError.
    """
    target = os.path.realpath(target)
    columns, total = open_columns(source)
    row_bytes = sum(column.nbytes for column in columns.values()) // max(total, 1)
    rows, done = max(cluster.options.max_batch, 2**16 // max(row_bytes, 1)), 0

    def batches() -> Iterator[Any]:
        for start in range(0, max(total, 1), rows):  # one of no rows, too: for the outputs' types and shapes
            batch = {name: column[start : start + rows] for name, column in columns.items()}
            yield batch.get(None, batch)

    aside = tempfile.TemporaryDirectory(prefix=".ray_tensorflow_", dir=os.path.dirname(target))
    with aside as folder, shown_progress(total, "rows") as advance:
        written = Written(folder, total)
        for outputs in cluster.map(batches(), model):
            count = min(rows, total - done)
            for name, array in outputs.items():
                written.add(name, array, done, count)
            if target.endswith(".npy") and len(outputs) > 1:
                raise InvalidRequest(f"{target} holds one array, but the outputs are {sorted(outputs)}: name it .npz")
            done += count
            advance(count)
        whole = os.path.join(folder, target[-4:])
        save(whole, written.arrays())
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(target, whole)
        os.replace(whole, target)


def open_columns(source: str) -> tuple[dict[str | None, np.ndarray], int]:
    """Arrays by name, the one of a ``.npy`` under None, and how many rows each has."""
    try:
        loaded = np.load(source, mmap_mode="r")
        columns = {name: loaded[name] for name in loaded.files} if source.endswith(".npz") else {None: loaded}
        [total] = {len(column) for column in columns.values()}
    except Exception as error:  # there is no end to what numpy and zipfile raise
        reason = f"cannot be read as arrays that have as many rows each: {first_sentence(error)}"
        raise InvalidRequest(f"{source} {reason}") from None
    return columns, total


class Written:
    """Outputs of ``total`` rows, as they come: numbers in files of a folder, strings, whose width is only known at the
    end, in memory."""

    def __init__(self, folder: str, total: int):
        self._folder, self._total = folder, total
        self._numbers: Arrays = {}
        self._strings: dict[str, list[np.ndarray]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}  # of a row

    def add(self, name: str, array: np.ndarray, start: int, count: int) -> None:
        """So many rows from there on. Raises InvalidRequest for what does not fit, OSError where there is no room."""
        if array.shape[:1] != (count,):
            raise InvalidRequest(f"Output {name!r} has not one row for each of the input: {list(array.shape)}")
        shape = array.shape[1:]
        if shape != self._shapes.setdefault(name, shape):
            shapes = f"{list(self._shapes[name])} and of {list(shape)}"
            raise InvalidRequest(f"Output {name!r} has rows of shape {shapes}, which one array does not hold")
        if array.dtype == object:
            self._strings.setdefault(name, []).append(array)
            return
        if name not in self._numbers:
            self._numbers[name] = self._empty(name, array)
        self._numbers[name][start : start + count] = array

    def _empty(self, name: str, like: np.ndarray) -> np.ndarray:
        if not is_in_npy(like.dtype):
            raise InvalidRequest(f"Output {name!r} is of type {like.dtype}, which a .npy does not have")
        if not self._total:
            return like.copy()
        path = os.path.join(self._folder, f"{len(self._numbers)}.npy")
        array = np.lib.format.open_memmap(path, "w+", like.dtype, (self._total, *like.shape[1:]))
        with open(path, "r+b") as file:  # so far a hole: to fill it on a full disk would kill the program
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
        return array

    def arrays(self) -> Arrays:
        """All of them. Raises InvalidRequest."""
        strings = {name: np.concatenate(parts) for name, parts in self._strings.items()}
        widths = {name: string_width(name, array.ravel().tolist()) for name, array in strings.items()}
        return self._numbers | {name: array.astype(f"S{widths[name]}") for name, array in strings.items()}


def save(path: str, arrays: Arrays) -> None:
    """A ``.npz`` as ``np.savez`` writes it, which does not take every name."""
    if path.endswith(".npy"):
        return np.save(path, *arrays.values())
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
