"""Marks on disk of the models that are just being loaded, by which a model that ends its process is known afterwards.

After a death of the parameter server, those that were marked are loaded one at a time; which one was alone at two
deaths is not tried again until its files change.
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


class LoadMarks:
    """In a folder that outlives this process, for one run of the program."""

    def __init__(self, folder: str, run: str):
        self._prefix = os.path.join(folder, f".loading-{run}-")
        self._suspects = {path: _read(path) for path in glob.glob(f"{glob.escape(self._prefix)}*")}
        self._alone = asyncio.Lock()
        if len(self._suspects) == 1:
            [(path, (files, deaths))] = self._suspects.items()
            self._suspects[path] = files, deaths + 1
            _write(path, files, deaths + 1)

    @contextlib.asynccontextmanager
    async def loading(self, key: ModelKey, files: list) -> AsyncIterator[None]:
        """Marked for as long as the block runs. Raises ModelError for a model that has ended its process twice."""
        path = self._prefix + str(key).encode().hex()
        files = json.loads(json.dumps(files))
        seen, deaths = self._suspects.get(path, (None, 0))
        if deaths >= MOST_DEATHS and seen == files:
            raise ModelError(f"it has ended the process that loads it {deaths} times")
        async with self._alone if seen == files else contextlib.nullcontext():
            _write(path, files, deaths if seen == files else 0)
            try:
                yield
            finally:
                self._suspects.pop(path, None)
                with contextlib.suppress(OSError):
                    os.remove(path)


def _read(path: str) -> tuple[list | None, int]:
    with contextlib.suppress(OSError, ValueError), open(path) as file:
        files, deaths = json.load(file)
        return files, deaths
    return None, 0


def _write(path: str, files: list, deaths: int) -> None:
    with contextlib.suppress(OSError), open(path, "w") as file:  # without a mark it is loaded all the same
        json.dump([files, deaths], file)
