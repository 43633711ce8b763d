"""100,000 requests: nothing that a server holds grows with them."""

import json
import os
from typing import NamedTuple

import pytest
from conftest import Server, family, wait_until
from test_survival import Clients

FIRST, REST = 20_000, 80_000


def ask(client: int, number: int) -> tuple:
    """Adds of 1 and predictions in turn."""
    if number % 2:
        return "GET", "/?value=1", None
    return "POST", "/v1/models/linear:predict", json.dumps({"instances": [[number, 0, 0]]})


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
        adds = 0
        for count in (FIRST, REST):
            before = {pid: Held.by(pid) for pid in family(server.process.pid)}
            clients = Clients(server, 64, ask)
            wait_until(lambda: len(clients.answers) >= count, 500)
            answers = clients.stop()
            assert {status for _, _, status, _, _ in answers} == {200}
            adds += sum(number % 2 for _, number, *_ in answers)
        assert len(before) >= 6  # the front end, gcs, raylet, the parameter server, two workers
        assert server.add(0) == adds
        grown = {}

        def is_settled() -> bool:
            grown.clear()
            grown.update({pid: (was, now) for pid, was in before.items() if (now := Held.by(pid)).has_grown(was)})
            return not grown

        wait_until(is_settled, 30, grown)
