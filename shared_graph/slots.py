"""Whose turn it is where many share a few slots: in front ends for what workers are sent, in workers for what runs.

One key is one kind of work, such as a signature of a model. A slow kind must not stop a fast one: the last slot is kept
for a kind that has none, unless nobody else has asked lately.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import Hashable

RECENT_S = 3.0  # for so long after it has asked a kind of work counts as somebody who may need a slot


class Recent:
    """Which kinds of work have asked lately."""

    def __init__(self):
        self._asked: dict[Hashable, float] = {}  # in the order of the times

    def note(self, key: Hashable, now: float) -> None:
        self._asked.pop(key, None)
        self._asked[key] = now

    def alone_at(self, key: Hashable, now: float) -> float:
        """From when on nobody else counts; ``now`` or earlier if that is so already."""
        while self._asked and (oldest := next(iter(self._asked.items())))[1] + RECENT_S < now:
            del self._asked[oldest[0]]
        latest = next((asked for other, asked in reversed(self._asked.items()) if other != key), -RECENT_S)
        return latest + RECENT_S


class Slots:
    """A few slots, and who has them."""

    def __init__(self, count: int):
        self.free, self.taken = count, collections.Counter[Hashable]()

    def may_take(self, key: Hashable, is_alone: bool) -> bool:
        """May this kind have another slot?"""
        return self.free > 1 or (self.free == 1 and (is_alone or key not in self.taken))

    def take(self, key: Hashable) -> None:
        self.free -= 1
        self.taken[key] += 1

    def give_back(self, key: Hashable) -> None:
        self.free += 1
        self.taken -= collections.Counter([key])  # which forgets a kind that has none any more


class Gate:
    """Lets so many in at once, about in the order in which they came, but passes over whoever may have no slot yet."""

    def __init__(self, count: int):
        self._slots, self._recent, self._left = Slots(count), Recent(), asyncio.Event()

    async def enter(self, key: Hashable) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._recent.note(key, now)
        while not self._slots.may_take(key, (alone_at := self._recent.alone_at(key, now)) <= now):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(alone_at if alone_at > now else None):
                    await self._left.wait()
            now = loop.time()
        self._slots.take(key)

    def leave(self, key: Hashable) -> None:
        self._slots.give_back(key)
        self._left.set()
        self._left = asyncio.Event()
