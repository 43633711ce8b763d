"""What is seen of a queue: how long its batches take, and whether those who are answered ask again at once."""

from __future__ import annotations

import math

GATHER_S = 0.003  # a batch waits for those who were just answered at most so long, and at most a quarter of a run
LIKELY = 0.75  # such a part of them has come back in time, lately


class Pace:
    """Clients that ask again when they are answered would come in two halves for ever, one waiting while the other one
    runs: two small batches for one. A moment's wait makes them one."""

    def __init__(self):
        self.run_s = self._mean_s = math.inf  # what has not been seen yet may be slow
        self._answered = self._came = 0  # with the last batch, and how many asked after that in time
        self._until = -math.inf  # the end of that time
        self._returning = 0.0  # the part that comes back: a mean in which the last batch counts half

    def asked(self, now: float) -> None:
        self._came += now < self._until

    def answered(self, count: int, took_s: float, now: float) -> None:
        """The last ``count`` requests of a batch were, ``took_s`` after it was sent."""
        if self._answered:
            self._returning = (self._returning + min(1.0, self._came / self._answered)) / 2
        self._mean_s = took_s if self._mean_s == math.inf else (self._mean_s + took_s) / 2
        self.run_s = min(took_s, self._mean_s)  # one hiccup makes nothing slow for long
        self._answered, self._came, self._until = count, 0, now + min(GATHER_S, self._mean_s / 4)

    @property
    def gathers_until(self) -> float:
        """Until when the next batch waits for them; the past if that is not worth it."""
        is_worth_it = self._returning > LIKELY and self._came < LIKELY * self._answered
        return self._until if is_worth_it else -math.inf
