"""The files that a version was loaded from, as workers get them: what was loaded, not what lies there now."""

from __future__ import annotations

import contextlib
import os
import tarfile
import tempfile
from collections.abc import Awaitable, Callable, Iterator

from shared_graph.errors import ModelError
from shared_graph.model_source import SAVED_MODEL_FILES, ModelSource

SLICE_BYTES = 2**24  # that travel at once: constants of a graph can reach 2 GB, and Ray's store here has 80 MB


class Bundle:
    """A SavedModel without its variables, which are not copied."""

    def __init__(self, source: ModelSource, with_assets: bool):
        self._source, self._with_assets = source, with_assets
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (has no name: it is gone with this process)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Bundles what the block loads. Raises ModelError when the files have changed by its end."""
        top, before = self._source.folder, self._source.files_seen()
        paths = [os.path.join(top, name) for name in SAVED_MODEL_FILES]
        if self._with_assets:
            paths += [path for path, *_ in self._source._replace(folder=os.path.join(top, "assets")).files_seen()]
        with tarfile.open(fileobj=self._file, mode="w", dereference=True) as tar:
            for path in filter(os.path.isfile, paths):  # others are links that lead nowhere
                tar.add(path, os.path.relpath(path, top))
        self._file.flush()
        yield
        if self._source.files_seen() != before:
            raise ModelError("its files changed while it was loaded")

    def read(self, offset: int) -> bytes:
        """A slice; an empty one is the end."""
        return os.pread(self._file.fileno(), SLICE_BYTES, offset)


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
