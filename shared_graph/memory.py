"""Gives freed memory back to the system: glibc would keep it for next time, which a small container cannot afford."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import threading

from shared_graph.threads import in_own_thread

ENDING_LIMIT_S = 10.0  # so long the end of a session is waited for: it ends when its last run does
LOOK_EVERY_S = 5.0
GROWN_PAGES = 2**11  # since memory was given back last: worth the 2 to 20 ms that it takes
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def free_garbage(endings: list[threading.Thread]) -> None:
    """Call this when graphs were dropped: they are full of cycles, and a dozen would pile up before Python looks for
    them. ``endings`` are the threads in which their sessions end."""
    for ending in endings:
        ending.join(ENDING_LIMIT_S)
    gc.collect()
    give_memory_back()


def give_memory_back() -> None:
    """What glibc keeps between what is in use."""
    if libc := _glibc():
        libc.malloc_trim(0)


async def keep_memory_low() -> None:
    """Runs as long as an actor or a front end: large requests come once, and the memory that they took would stay.

    ``malloc_trim`` leaves the free end of a thread's heap, up to a threshold that glibc raises to 64 MB once an array
    of 32 MB was freed. Fixed at 24 MB, a worker keeps 20 to 60 MB less, and arrays up to 32 MB are as fast.
    """
    if not (libc := _glibc()):
        return
    libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
    libc.mallopt(M_TRIM_THRESHOLD, 24 * 2**20)
    least = _resident_pages()
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        with contextlib.suppress(OSError, RuntimeError):  # no file, or no thread, is to be had just now
            if _resident_pages() > least + GROWN_PAGES:
                await in_own_thread(give_memory_back)
                least = _resident_pages()
            least = min(least, _resident_pages())


def _glibc() -> ctypes.CDLL | None:
    """None with another C library."""
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") else None


def _resident_pages() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])
