"""The connection of a front end to a worker, which the tests play: what travels on it, and what is left of it."""

import asyncio
import contextlib
import socket
import struct

import numpy as np
import pytest

from shared_graph.bodies import HttpBody
from shared_graph.connection import QueueKey, Request, WorkerConnection, size_of
from shared_graph.wire import Answers, Batch, read_frame, to_frame

KEY = QueueKey("m", "stable", "train", None)


def request(body, deadline: float, is_repeated: bool = False) -> Request:
    made = Request(KEY, None, "predict", body, None, 0, 0.0, False)
    made.deadline, made.is_repeated = deadline, is_repeated
    return made


@contextlib.asynccontextmanager
async def connected():
    """A connection, what it has received and lost, and the worker's end of it."""
    theirs = asyncio.get_running_loop().create_future()
    received, lost = [], []
    async with await asyncio.start_server(lambda *ends: theirs.set_result(ends), "127.0.0.1") as server:
        ours = await asyncio.open_connection(*server.sockets[0].getsockname())
        receive = lambda _, answers: received.append(answers)
        connection = WorkerConnection(0, *ours, receive, lambda one: lost.append(one.unanswered))
        reader, writer = await theirs
        try:
            yield connection, received, lost, reader, writer
        finally:
            writer.close()
            connection.close()


async def test_a_batch_says_what_it_is_for_how_long_each_request_has_and_which_may_have_run_before():
    async with connected() as (connection, _, _, reader, _):
        array = np.arange(3)
        connection.send(KEY, [request(b"a", 107.5), request(array, 102.0, is_repeated=True)], 100.0)
        connection.send(KEY, [request(b"b", 101.0)], 100.0)
        first, second = [Batch._make(await read_frame(reader)) for _ in range(2)]
        assert (first.key, first.signature_hint) == (("m", "stable"), "train")
        assert first.batch_id != second.batch_id
        [one, other], [third] = first.requests, second.requests
        assert one == ("predict", b"a", 7.5, False) and third == ("predict", b"b", 1.0, False)
        assert (other[0], other[1].tolist(), *other[2:]) == ("predict", [0, 1, 2], 2.0, True)
        assert connection.unanswered == 3 and connection.slots.taken == {KEY: 2}


@pytest.mark.parametrize("end", ["close", "abort"])
async def test_answers_are_received_and_when_the_worker_is_gone_what_it_had_is_lost_and_nothing_is_left_open(end):
    async with connected() as (connection, received, lost, reader, writer):
        connection.send(KEY, [request(b"a", 1.0)], 0.0)
        await read_frame(reader)
        writer.writelines(to_frame((0, {0: b"answer"})))
        await writer.drain()
        if end == "abort":
            linger = struct.pack("ii", 1, 0)  # so that it is reset
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            while not received:
                await asyncio.sleep(0.001)
        getattr(writer.transport, end)()
        await asyncio.wait([connection.closed], timeout=10)
        assert received == [Answers(0, {0: b"answer"})] and lost == [1]
        assert connection._writer.is_closing() and connection.closed.exception() is None


@pytest.mark.parametrize(
    "body, size_bytes",
    [
        (HttpBody(b"123", False, "a=b"), 6),
        (("", np.zeros(3)), 24),
        (("", {"a": np.zeros(3), "b": np.zeros(2, np.int8), "c": [1, 2]}), 26),
        (("", [1, 2]), 0),
        (3.0, 0),
    ],
)
def test_the_size_of_a_request_is_that_of_its_body_or_of_all_its_arrays(body, size_bytes):
    assert size_of(body) == size_bytes
