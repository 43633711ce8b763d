"""Marks on disk of the models that are just being loaded, by which a model that ends its process is known afterwards.

After a death of the process, those that were marked are loaded after the others and one at a time; which one
was alone at two deaths is not tried again until its files change.
"""

from __future__ import annotations

import asyncio
import contextlib
import glob
import json
import os
from collections.abc import AsyncIterator

from shared_graph.errors import ModelError
from shared_graph.models import ModelKey

MOST_DEATHS = 2
OTHERS_FIRST_S = 0.5, 60.0  # so long a suspect waits for others to begin, and at most for their end


class LoadMarks:
    """In a folder that outlives this process, of what was this process before; without the folder nothing is known."""

    def __init__(self, folder: str, of: str):
        self._prefix = os.path.join(folder, f".loading-{of}-")
        found = {path: _read(path) for path in glob.glob(f"{glob.escape(self._prefix)}*")}
        at_death = [path for path, (_, _, was_loading) in found.items() if was_loading]  # the others waited
        self._suspects = {path: (files, deaths + (at_death == [path])) for path, (files, deaths, _) in found.items()}
        for path, suspect in self._suspects.items():
            _write(path, *suspect, False)
        self._alone, self._loading, self._idle = asyncio.Lock(), 0, asyncio.Event()
        self._idle.set()

    @contextlib.asynccontextmanager
    async def loading(self, key: ModelKey, files: list) -> AsyncIterator[None]:
        """Marked for as long as the block runs. Raises ModelError for a model that has ended its process twice."""
        path = self._prefix + str(key).encode().hex()
        files = json.loads(json.dumps(files))
        seen, deaths = self._suspects.get(path, (None, 0))
        if deaths >= MOST_DEATHS and seen == files:
            raise ModelError(f"it has ended the process that loads it {deaths} times")
        async with self._alone if seen == files else contextlib.nullcontext():
            if seen == files:
                await self._until_others_are_loaded()
            _write(path, files, deaths if seen == files else 0, True)
            self._loading += 1
            self._idle.clear()
            try:
                yield
            finally:
                self._loading -= 1
                if not self._loading:
                    self._idle.set()
                self._suspects.pop(path, None)
                with contextlib.suppress(OSError):
                    os.remove(path)

    async def _until_others_are_loaded(self) -> None:
        first_s, longest_s = OTHERS_FIRST_S
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(longest_s):
                await asyncio.sleep(first_s)
                await self._idle.wait()


def _read(path: str) -> tuple[list | None, int, bool]:
    """The files, at how many deaths it was alone, and was it loaded when the process ended?"""
    with contextlib.suppress(OSError, ValueError), open(path) as file:
        files, deaths, was_loading = json.load(file)
        return files, deaths, was_loading
    return None, 0, False


def _write(path: str, files: list, deaths: int, is_loading: bool) -> None:
    with contextlib.suppress(OSError), open(path, "w") as file:  # without a mark it is loaded all the same
        json.dump([files, deaths, is_loading], file)
