"""Frames on a connection between a front end and a worker, both ends, and what they hold.

Not Ray's calls, since one of those takes ten times the processor time of a message on a connection.
"""

from __future__ import annotations

import asyncio
import pickle
import struct
from typing import Any, NamedTuple

ASIDE_BYTES = 2**16  # an array of so many bytes goes beside the pickle, uncopied


class WireRequest(NamedTuple):
    """A request as it travels; ``rest_api.decode`` says what a verb's body is."""

    verb: str
    body: Any
    left_s: float  # until its deadline
    is_repeated: bool  # a worker that had it was lost


class Batch(NamedTuple):
    """From a front end: requests for one model. It and they travel as plain tuples, which takes a third of the time."""

    batch_id: int
    key: tuple[str, int | str | None]  # the model's name; and its version or label, or None: the latest
    signature_hint: str  # for whose turn it is: the signature that is probably asked for
    requests: list[WireRequest]


class Answers(NamedTuple):
    """From a worker: answers to some of a batch's requests, or the Errors they failed with, by index; a plain tuple."""

    batch_id: int
    answers: dict[int, Any]


class ProcessInfo(NamedTuple):
    """What an actor tells of the process that it is."""

    pid: int
    node: str  # Ray's id of the machine
    gpus: list[int]
    cuda_visible_devices: str | None


class WorkerInfo(NamedTuple):
    """What a ready worker tells: whoever shows the ``authkey`` at its ``address`` may send it batches."""

    process: ProcessInfo
    address: tuple[str, int]
    authkey: bytes


def to_frame(value: Any) -> list[Any]:
    """Parts to be written one after another: how many there are, their sizes, a pickle, large arrays."""
    parts: list[Any] = [b""]
    parts[0] = pickle.dumps(value, 5, buffer_callback=lambda b: b.raw().nbytes < ASIDE_BYTES or parts.append(b.raw()))
    return [struct.pack(f"<I{len(parts)}Q", len(parts), *(memoryview(part).nbytes for part in parts)), *parts]


async def read_frame(reader: asyncio.StreamReader) -> Any:
    """Raises EOFError or OSError when the connection is gone. Arrays are read-only."""
    [count] = struct.unpack("<I", await reader.readexactly(4))
    sizes = struct.unpack(f"<{count}Q", await reader.readexactly(8 * count))
    pickled, *arrays = [await reader.readexactly(size) for size in sizes]
    return pickle.loads(pickled, buffers=arrays)
