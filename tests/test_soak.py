"""100,000 requests: nothing that a server holds grows with them."""

import asyncio
import json
import os
import re
from typing import NamedTuple

import pytest
from conftest import Server, family, wait_until

CLIENTS = 64
FIRST, REST = 20_000, 80_000


def request(i: int) -> bytes:
    """Adds of 1 and predictions in turn."""
    if i % 2:
        return b"GET /?value=1 HTTP/1.1\r\nHost: a\r\n\r\n"
    body = json.dumps({"instances": [[i, 0, 0]]}).encode()
    head = f"POST /v1/models/linear:predict HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def ask(port: int, count: int) -> None:
    """So many requests from clients that keep their connections."""
    todo = iter(range(count))

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for i in todo:
            writer.write(request(i))
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))
            assert head.startswith(b"HTTP/1.1 200"), head + body
            assert i % 2 or json.loads(body) == {"predictions": [[i + 0.5, 2 * i - 0.5]]}
        writer.close()

    async with asyncio.timeout(500):
        await asyncio.gather(*[client() for _ in range(CLIENTS)])


class Held(NamedTuple):
    """What a process holds."""

    name: str
    resident_kb: int
    threads: int
    files: int

    @classmethod
    def by(cls, pid: int) -> "Held":
        with open(f"/proc/{pid}/status") as file:
            status = dict(line.split(":\t", 1) for line in file.read().splitlines())
        files = len(os.listdir(f"/proc/{pid}/fd"))
        return cls(status["Name"], int(status["VmRSS"].split()[0]), int(status["Threads"]), files)

    def has_grown(self, before: "Held") -> bool:
        return (self.resident_kb > 1.05 * before.resident_kb + 5000
                or self.threads > before.threads + 4  # gRPC's pools come and go
                or self.files > before.files)


@pytest.mark.long
def test_after_20000_requests_80000_more_take_no_more_memory_threads_or_files():
    with Server("starlette", "--workers", "2", "--model", "example_models:linear").wait_ready(workers=2) as server:
        asyncio.run(ask(server.port, FIRST))
        before = {pid: Held.by(pid) for pid in family(server.process.pid)}
        assert len(before) >= 6  # the front end, gcs, raylet, the parameter server, two workers
        asyncio.run(ask(server.port, REST))
        assert server.add(0) == (FIRST + REST) / 2
        grown = {}

        def is_settled() -> bool:
            grown.clear()
            grown.update({pid: (was, now) for pid, was in before.items() if (now := Held.by(pid)).has_grown(was)})
            return not grown

        wait_until(is_settled, 30, grown)
