"""Shows on standard error how far a long job is: a bar on a terminal, else a line every few seconds."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

EVERY_S = 2.0  # between two lines
BAR = "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{unit}  {rate_noinv_fmt}  {remaining} left"


@contextlib.contextmanager
def shown_progress(total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """For a job of so many units; what it yields is called with how many are done more. Log lines go above the bar."""
    if sys.stderr.isatty():
        ours = logging.getLogger("shared_graph")
        loggers = [ours if ours.handlers else logging.getLogger()]  # whose lines are shown (see logs)
        has_width = os.get_terminal_size(sys.stderr.fileno()).columns > 0  # else tqdm would show nothing
        width = {"dynamic_ncols": True} if has_width else {"ncols": 80}
        with logging_redirect_tqdm(loggers), tqdm(total=total, unit=f" {unit}", bar_format=BAR, **width) as bar:
            yield bar.update
        return
    begun, shown, done = time.monotonic(), 0.0, 0

    def advance(count: int) -> None:
        nonlocal shown, done
        done, now = done + count, time.monotonic()
        if now - shown > EVERY_S or done == total:
            shown, rate = now, done / max(now - begun, 1e-9)
            left_s = (total - done) / max(rate, 1e-9)
            print(f"{done}/{total} {unit}  {rate:.0f} {unit}/s  {left_s:.0f} s left", file=sys.stderr)

    yield advance
