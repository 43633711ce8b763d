"""Predicts a whole file, row by row, larger than memory if need be."""

from __future__ import annotations

import os
import tempfile

import numpy as np

from shared_graph.cluster import Cluster
from shared_graph.errors import InvalidRequest, first_sentence
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
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidRequest(f"--output {target}: nothing can be written to the folder {folder}")


def predict_file(cluster: Cluster, model: str, source: str, target: str) -> None:
    """Stream the rows of ``source`` through a model's default signature into ``target``, with progress shown.

    ``.npy`` files may be larger than memory. The target appears whole or not at all. Raises InvalidRequest.
    """
    try:
        loaded = np.load(source, mmap_mode="r")
        columns = {name: loaded[name] for name in loaded.files} if source.endswith(".npz") else {None: loaded}
        [total] = {len(column) for column in columns.values()}
        row_bytes = sum(column.nbytes for column in columns.values()) // max(total, 1)
    except Exception as error:  # there is no end to what numpy and zipfile raise
        reason = f"cannot be read as arrays that have as many rows each: {first_sentence(error)}"
        raise InvalidRequest(f"{source} {reason}") from None

    rows = max(cluster.options.max_batch, 2**16 // max(row_bytes, 1))

    def batches():
        for start in range(0, max(total, 1), rows):  # one of no rows, too: for the outputs' types and shapes
            batch = {name: column[start : start + rows] for name, column in columns.items()}
            yield batch.get(None, batch)

    done, written = 0, {}
    aside = tempfile.TemporaryDirectory(prefix=".ray_tensorflow_", dir=os.path.dirname(target) or ".")
    with aside as folder, shown_progress(total, "rows") as advance:
        for outputs in cluster.map(batches(), model):
            count = min(rows, total - done)
            for name, array in outputs.items():
                if array.shape[:1] != (count,):
                    raise InvalidRequest(f"Output {name!r} has not one row for each of the input: {list(array.shape)}")
                if array.dtype == object:  # texts, whose width is only known at the end
                    written.setdefault(name, []).extend(array.tolist())
                    continue
                if name not in written:
                    path, shape = os.path.join(folder, f"{len(written)}.npy"), (total, *array.shape[1:])
                    written[name] = np.lib.format.open_memmap(path, "w+", array.dtype, shape) if total else array
                written[name][done : done + count] = array
            done += count
            advance(count)
        if target.endswith(".npy") and len(written) > 1:
            raise InvalidRequest(f"{target} holds one array, but the outputs are {sorted(written)}: name it .npz")
        arrays, whole = {name: np.asarray(value) for name, value in written.items()}, os.path.join(folder, target[-4:])
        np.savez(whole, **arrays) if target.endswith(".npz") else np.save(whole, *arrays.values())
        os.replace(whole, target)
