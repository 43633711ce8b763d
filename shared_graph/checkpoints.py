"""Variables in files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from shared_graph.errors import ModelError, Unavailable, first_sentence
from shared_graph.model_source import ADDER_SOURCE, ModelSource
from shared_graph.models import Arrays


def temporary_folder(run_id: str) -> str:
    """For variables that go with a run; the same in each life, while ``tempfile`` looks where there is room."""
    parent = os.environ.get("TMPDIR", "")
    return os.path.join(parent if os.path.isdir(parent) else "/tmp", f"ray_tensorflow_{run_id}")


class Checkpoints:
    """Variables in files of one folder: ``<model>.<version>.npz``, written aside and renamed; and ``adder.sum``.

    What is written survives a killed process; if ``durable``, a power cut as well. The first life of a cluster's
    parameter server makes the folder, and an empty file ``.run-<run_id>`` in it, to which the names of all saved files
    are written: so no later life takes another machine's folder, or one whose files have gone, for a beginning.
    Methods raise Error.
    """

    def __init__(self, folder: str, run_id: str, durable: bool, is_first_life: bool):
        self.folder, self.durable, self._sum_file = folder, durable, None
        self._marker = os.path.join(folder, f".run-{run_id}")
        if is_first_life:
            self._make_folder()
        try:
            with open(self._marker) as marker:
                self._checkpointed = marker.read().splitlines()
        except OSError as error:
            raise Unavailable(
                f"The variables are gone, since {error.filename} cannot be read ({error.strerror}): bring"
                " the folder back, or end the program and start it anew ten seconds later."
            ) from None
        try:
            self._lock = open(os.path.join(folder, ".lock"), "w")  # noqa: SIM115  (held until it is closed)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends, however it does
            self._remove_what_others_left(run_id)
        except BlockingIOError:
            raise Unavailable(f"The checkpoint folder {folder} is in use by another program.") from None
        except OSError as error:
            what = error.filename or "its .lock"
            raise Unavailable(f"The checkpoint folder {folder} cannot be used: {what}: {error.strerror}.") from None

    def _make_folder(self) -> None:
        try:
            os.makedirs(self.folder, 0o700, exist_ok=True)
            with open(self._marker, "a"):
                pass
        except OSError as error:
            raise Unavailable(f"The folder for variables cannot be used: {error.filename}: {error.strerror}.") from None

    def path(self, source: ModelSource) -> str:
        name = "adder.sum" if source == ADDER_SOURCE else f"{source.name}.{source.version}.npz"
        return os.path.join(self.folder, name)

    def save(self, source: ModelSource, weights: Arrays, graph: str = "") -> None:
        """``graph``: its fingerprint, where the weights are of no use to another one."""
        arrays = {
            f"variables/{name}": value if value.dtype != object else np.array(value + b".", "S")
            for name, value in weights.items()
        }  # numpy strips zeros from the end of a string
        arrays |= {f"graph/{graph}": np.zeros(0)} if graph else {}
        self._write_and_note(self.path(source), lambda file: np.savez(file, **arrays))

    def save_sum(self, total: float) -> None:
        """The adder's sum, twice over. It is saved for each batch, so in place once there is a file: in a hundredth of
        the time, and safely, since so few bytes are in one sector, which a disk writes as a whole or not at all."""
        record, path = struct.pack("<dd", total, total), self.path(ADDER_SOURCE)
        if self._sum_file is not None and not os.fstat(self._sum_file).st_nlink:  # removed, or another is in its place
            os.close(self._sum_file)
            self._sum_file = None
        if self._sum_file is None:
            self._write_and_note(path, lambda file: file.write(record))
            self._sum_file = os.open(path, os.O_WRONLY)
            return
        with naming_file(path):
            disk = os.fstatvfs(self._sum_file)
            if disk.f_blocks and not disk.f_bavail:  # there are file systems that need room even so
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.pwrite(self._sum_file, record, 0)
            if self.durable:
                os.fdatasync(self._sum_file)

    def load(self, source: ModelSource, graph: str = "") -> Arrays:
        """What was saved last, if anything was. Raises ModelError when that is damaged, of another graph, or gone."""
        path = self.path(source)
        try:
            with open(path, "rb") as file:
                if source == ADDER_SOURCE:
                    record = file.read()
                    if len(record) != 16 or record[:8] != record[8:]:
                        raise ValueError("it is not one number twice")
                    return {"sum": np.frombuffer(record)[0]}
                arrays = dict(np.load(file).items())
        except Exception as error:  # there is no end to what numpy and zipfile raise
            if isinstance(error, FileNotFoundError) and os.path.basename(path) not in self._checkpointed:
                return {}
            raise ModelError(
                f"The checkpoint {path} is damaged or gone ({first_sentence(error)}): put a good one"
                " there, or remove it and start the program anew."
            ) from None
        if any(name.startswith("graph/") and name != f"graph/{graph}" for name in arrays):
            why = "it was saved for another graph: remove it and start the program anew"
            raise ModelError(f"The checkpoint {path} is not of this model, {why}.")
        return {
            name.removeprefix("variables/"): array
            if array.dtype.kind != "S"
            else np.fromiter((text[:-1] for text in array.flat), object).reshape(array.shape)
            for name, array in arrays.items()
            if not name.startswith("graph/")
        }

    def stamp(self, source: ModelSource) -> str:
        """Another one when other weights have been saved."""
        with contextlib.suppress(OSError):
            status = os.stat(self.path(source))
            return f"{status.st_size} {status.st_mtime_ns}"
        return ""

    def cached(self, key: str, find: Callable[[], Any]) -> Any:
        """``find()``, as JSON has it, found once for each key and folder; of the last hundred keys."""
        path, known = os.path.join(self.folder, ".cached.json"), {}
        with contextlib.suppress(OSError, ValueError, TypeError), open(path) as file:
            known = dict(json.load(file))
        if key not in known:
            known[key] = find()
            recent = dict(list(known.items())[-100:])
            with contextlib.suppress(Unavailable):
                self._write_atomically(path, lambda file: file.write(json.dumps(recent).encode()))
        return known[key]

    def _remove_what_others_left(self, run_id: str) -> None:
        here = glob.escape(self.folder)
        if others := [path for path in glob.glob(os.path.join(here, ".run-*")) if not path.endswith(f"-{run_id}")]:
            for path in [*others, *glob.glob(os.path.join(here, ".loading-*"))]:
                os.remove(path)

    def _write_and_note(self, path: str, write: Callable[[Any], Any]) -> None:
        """Write a file, and note that it has to be there when this run's parameter server comes back."""
        self._write_atomically(path, write)
        names = list(dict.fromkeys([*self._checkpointed, os.path.basename(path)]))
        if names != self._checkpointed:
            with contextlib.suppress(Unavailable):  # the file itself is saved; the note is tried again with the next
                self._write_atomically(self._marker, lambda file: file.write("\n".join(names).encode()))
                self._checkpointed = names

    def _write_atomically(self, path: str, write: Callable[[Any], Any]) -> None:
        with naming_file(path):
            try:
                with open(path + ".new", "wb") as file:
                    write(file)
                    if self.durable:
                        file.flush()
                        os.fsync(file.fileno())
                os.replace(path + ".new", path)
            except Exception:
                with contextlib.suppress(OSError):
                    os.remove(path + ".new")  # it may have taken the last room, which others need
                raise
            if self.durable:
                folder = os.open(self.folder, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)


@contextlib.contextmanager
def naming_file(path: str):
    try:
        yield
    except OSError as error:
        raise Unavailable(f"The variables cannot be kept in {path}: {error.strerror}.") from None
