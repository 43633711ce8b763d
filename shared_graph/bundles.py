"""What a version was loaded from, as workers get it: the files that were loaded, not what lies there now, or what a
function has made in the parameter server."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from typing import IO

from shared_graph.errors import ModelError
from shared_graph.model_source import SAVED_MODEL_FILES, ModelSource, may_be_file

SLICE_BYTES = 2**24  # that travel at once: constants of a graph can reach 2 GB, and Ray's store here has 80 MB


@contextlib.contextmanager
def bundled(source: ModelSource, with_assets: bool) -> Iterator[IO[bytes]]:
    """The SavedModel that the block loads, in a file without a name, which is gone with this process; without its
    variables, which are not copied. Raises ModelError when the files have changed by the end of the block."""
    top, before = source.folder, source.files_seen()
    file = tempfile.TemporaryFile()  # noqa: SIM115  (it is read for as long as the version is loaded)
    paths = [os.path.join(top, name) for name in SAVED_MODEL_FILES]
    if with_assets:
        paths += [path for path, *_ in source._replace(folder=os.path.join(top, "assets")).files_seen()]
    with tarfile.open(fileobj=file, mode="w", dereference=True) as tar:
        for path in filter(may_be_file, paths):  # others are links that lead nowhere
            tar.add(path, os.path.relpath(path, top))
    file.flush()
    yield file
    if source.files_seen() != before:
        raise ModelError("its files changed while it was loaded")


def bundle_of(saved_model: bytes) -> IO[bytes]:
    """A bundle of this file alone."""
    file = tempfile.TemporaryFile()  # noqa: SIM115
    with tarfile.open(fileobj=file, mode="w") as tar:
        about = tarfile.TarInfo(SAVED_MODEL_FILES[0])
        about.size = len(saved_model)
        tar.addfile(about, io.BytesIO(saved_model))
    file.flush()
    return file


def read_slice(bundle: IO[bytes], offset: int) -> bytes:
    """An empty one is the end."""
    return os.pread(bundle.fileno(), SLICE_BYTES, offset)


@contextlib.asynccontextmanager
async def fetched_bundle(read: Callable[[int], Awaitable[bytes]]):
    """A folder with the files of a bundle that another process has, for as long as the block runs."""
    with tempfile.TemporaryFile() as file, tempfile.TemporaryDirectory(prefix="model_") as folder:
        while part := await read(file.tell()):
            file.write(part)
        file.seek(0)
        with tarfile.open(fileobj=file) as tar:
            tar.extractall(folder, filter="data")
        yield folder
