"""Variables in files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from shared_graph.errors import ModelError, Unavailable, first_sentence
from shared_graph.models import ADDER_SOURCE, Arrays, ModelSource, objects


class Checkpoints:
    """Variables in files of one folder: ``adder.sum``, and ``<model>.<version>.npz``, written aside and renamed.

    What is written has survived a killed process; if ``durable``, a power cut as well. Whoever starts a cluster makes
    the folder, and an empty file ``.run-<run>`` in it, to which the names of all files are written that have been kept:
    so neither another machine's folder nor one whose files have gone is taken for a beginning. Methods raise Error.
    """

    def __init__(self, folder: str, run: str, durable: bool):
        self.folder, self.durable, self._sum_file = folder, durable, None
        self._marker = os.path.join(folder, f".run-{run}")
        try:
            with open(self._marker) as marker:
                self._kept = marker.read().splitlines()
            self._lock = os.open(os.path.join(folder, ".lock"), os.O_WRONLY | os.O_CREAT)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends, however it does
        except BlockingIOError:
            raise Unavailable(f"The checkpoint folder {folder} is in use by another program.") from None
        except OSError as error:
            raise Unavailable(
                f"The variables are gone, since {error.filename} cannot be read ({error.strerror}): bring"
                " the folder back or start the program anew."
            ) from None

    def path(self, source: ModelSource) -> str:
        name = "adder.sum" if source == ADDER_SOURCE else f"{source.name}.{source.version}.npz"
        return os.path.join(self.folder, name)

    def keep(self, source: ModelSource, weights: Arrays) -> None:
        plain = {
            f"variables/{name}": value if value.dtype != object else np.array(value + b".", "S")
            for name, value in weights.items()
        }  # numpy strips zeros from the end of a text
        self._write_first(self.path(source), lambda file: np.savez(file, **plain))

    def keep_sum(self, total: float) -> None:
        """The adder's, twice over; for each batch, and so in place once there is a file: that takes a hundredth of the
        time, and so few bytes are in one sector of the disk, which is written as a whole or not at all."""
        record, path = struct.pack("<dd", total, total), self.path(ADDER_SOURCE)
        if self._sum_file is None:
            self._write_first(path, lambda file: file.write(record))
            self._sum_file = os.open(path, os.O_WRONLY)
            return
        with naming_file(path):
            if not os.fstatvfs(self._sum_file).f_bavail:  # there are file systems that need room even so
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.pwrite(self._sum_file, record, 0)
            if self.durable:
                os.fdatasync(self._sum_file)

    def load(self, source: ModelSource) -> Arrays:
        """What was kept last, if anything was. Raises ModelError when it is damaged, or has gone since."""
        path = self.path(source)
        try:
            with open(path, "rb") as file:
                if source != ADDER_SOURCE:
                    return {
                        name.removeprefix("variables/"): array
                        if array.dtype.kind != "S"
                        else objects(text[:-1] for text in array.flat).reshape(array.shape)
                        for name, array in np.load(file).items()
                    }
                record = file.read()
                if len(record) != 16 or record[:8] != record[8:]:
                    raise ValueError("it is not one number twice")
                return {"sum": np.frombuffer(record)[0]}
        except Exception as error:  # there is no end to what numpy and zipfile raise
            if isinstance(error, FileNotFoundError) and os.path.basename(path) not in self._kept:
                return {}
            raise ModelError(
                f"The checkpoint {path} is damaged or gone ({first_sentence(error)}): put a good one"
                " there, or remove it and start the program anew."
            ) from None

    def remember(self, key: str, find: Callable[[], Any]) -> Any:
        """``find()``, found once for each key and folder."""
        path = os.path.join(self.folder, f".{key}.json")
        with contextlib.suppress(OSError, ValueError), open(path) as file:
            return json.load(file)
        found = find()
        self._write_aside(path, lambda file: file.write(json.dumps(found).encode()))
        return found

    def _write_first(self, path: str, write: Callable[[Any], Any]) -> None:
        """Write it aside; from now on it has to be there when this run's parameter server comes back."""
        self._write_aside(path, write)
        if os.path.basename(path) not in self._kept:
            self._kept.append(os.path.basename(path))
            self._write_aside(self._marker, lambda file: file.write("\n".join(self._kept).encode()))

    def _write_aside(self, path: str, write: Callable[[Any], Any]) -> None:
        with naming_file(path):
            with open(path + ".new", "wb") as file:
                write(file)
                if self.durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(path + ".new", path)
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
