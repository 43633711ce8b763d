"""The files that a version was loaded from, as workers get them: what was loaded, not what lies there now."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tarfile
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from typing import IO

from shared_graph.errors import ModelError
from shared_graph.model_source import SAVED_MODEL_FILES, ModelSource

SLICE_BYTES = 2**24  # that travel at once: constants of a graph can reach 2 GB, and Ray's store here has 80 MB


class Bundle:
    """A SavedModel without its variables, which are not copied."""

    def __init__(self, source: ModelSource, with_assets: bool):
        self._source, self._with_assets = source, with_assets
        self._file: IO[bytes] | None = None  # which has no name, and so is gone with this process

    @contextlib.contextmanager
    def opened(self) -> Iterator[str]:
        """A folder from which the SavedModel can be loaded, for as long as the block runs. Raises ModelError when its
        files have changed meanwhile."""
        before = self._source.files_seen()
        with tempfile.TemporaryDirectory(prefix="model_") as folder:
            kept = [name for name in SAVED_MODEL_FILES if os.path.isfile(os.path.join(self._source.folder, name))]
            for name in kept:
                shutil.copyfile(os.path.join(self._source.folder, name), os.path.join(folder, name))
            assets = os.path.join(self._source.folder, "assets")
            if self._with_assets and os.path.isdir(assets):
                shutil.copytree(assets, os.path.join(folder, "assets"), ignore=_dead_links)
                kept.append("assets")
            for name in os.listdir(self._source.folder):
                if name not in kept:
                    os.symlink(os.path.join(self._source.folder, name), os.path.join(folder, name))
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the version)
            with tarfile.open(fileobj=self._file, mode="w") as tar:
                for name in kept:
                    tar.add(os.path.join(folder, name), name)
            self._file.flush()
            yield folder
        if self._source.files_seen() != before:
            raise ModelError("its files changed while it was loaded")

    def read(self, offset: int) -> bytes:
        """A slice; an empty one is the end."""
        return os.pread(self._file.fileno(), SLICE_BYTES, offset)


def _dead_links(folder: str, names: list[str]) -> list[str]:
    """Those that lead nowhere, or back to a folder on the way to them: to follow these would never end."""
    above = {os.path.realpath(path) for path in (folder, *pathlib.Path(folder).parents)}
    paths = {name: os.path.join(folder, name) for name in names}
    return [name for name, path in paths.items() if not os.path.exists(path) or os.path.realpath(path) in above]


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
