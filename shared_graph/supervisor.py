"""Makes, watches and ends the actors."""

from __future__ import annotations

import contextlib
import math
import os
import signal


def kill_process(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def gpu_share(gpus: int, actors: int) -> float:
    """How many GPUs each actor gets, such that all of them fit: whole ones, or a part of one."""
    if not gpus:
        return 0
    return 1 if gpus >= actors else math.floor(10_000 / -(-actors // gpus)) / 10_000
