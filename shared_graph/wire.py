"""Frames on a connection between a front end and a worker, both ends. One call of Ray's takes ten times the processor
time of a message on a connection."""

from __future__ import annotations

import asyncio
import pickle
import struct
from typing import Any

LARGE_BYTES = 2**16  # an array of so many bytes goes beside the pickle, uncopied


def to_frame(value: Any) -> list[Any]:
    """Parts to be written one after another: how many there are, their sizes, a pickle, large arrays."""
    parts: list[Any] = [b""]
    parts[0] = pickle.dumps(value, 5, buffer_callback=lambda b: b.raw().nbytes < LARGE_BYTES or parts.append(b.raw()))
    return [struct.pack(f"<I{len(parts)}Q", len(parts), *(memoryview(part).nbytes for part in parts)), *parts]


async def read_frame(reader: asyncio.StreamReader) -> Any:
    """Raises EOFError or OSError when the connection is gone. Arrays are read-only."""
    [count] = struct.unpack("<I", await reader.readexactly(4))
    sizes = struct.unpack(f"<{count}Q", await reader.readexactly(8 * count))
    pickled, *arrays = [await reader.readexactly(size) for size in sizes]
    return pickle.loads(pickled, buffers=arrays)
