"""Marks on disk of the models that are just being loaded, by which a model that ends its process is known afterwards.

After a death of the process those that were marked are loaded one at a time, so that one that is marked at the next two
as well is to blame: it is not tried again until its files change.
"""

from __future__ import annotations

import asyncio
import contextlib
import glob
import os
from collections.abc import AsyncIterator

from shared_graph.errors import ModelError
from shared_graph.models import ModelKey

MOST_DEATHS = 3


class LoadMarks:
    """Of a process and its earlier lives, in a folder that outlives them; without the folder nothing is known.

    A mark says at how many deaths its model was being loaded, one that comes now included, and from which files."""

    def __init__(self, folder: str, owner: str):
        self._prefix = os.path.join(folder, f".loading-{owner}-")
        self._found = {path: _read(path) for path in glob.glob(f"{glob.escape(self._prefix)}*")}
        self._one_at_a_time = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def loading(self, key: ModelKey, files: list) -> AsyncIterator[None]:
        """Marked for as long as the block runs. Raises ModelError for a model that ends its process."""
        path, now = self._prefix + str(key).encode().hex(), ascii(files)
        seen, deaths = self._found.get(path, ("", 0))
        deaths = deaths if seen == now else 0
        if deaths >= MOST_DEATHS:
            raise ModelError(f"it has ended the process that loads it {deaths} times")
        async with self._one_at_a_time if deaths else contextlib.nullcontext():
            _write(path, deaths + 1, now)
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    os.remove(path)


def _read(path: str) -> tuple[str, int]:
    with contextlib.suppress(OSError, ValueError), open(path) as file:
        deaths, files = file.read().split(" ", 1)
        return files, int(deaths)
    return "", 0


def _write(path: str, deaths: int, files: str) -> None:
    with contextlib.suppress(OSError), open(path, "w") as file:  # without a mark it is loaded all the same
        file.write(f"{deaths} {files}")
