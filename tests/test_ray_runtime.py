"""What is told of Ray's failures; the rest of this module is in every test with a cluster."""

import asyncio
import os
import socket
import subprocess
import sys
import tempfile

import pytest
import ray
from conftest import REPOSITORY

from shared_graph import ray_runtime
from shared_graph.errors import Unavailable
from shared_graph.options import Options


@pytest.fixture
def without_ends(monkeypatch):
    """Ray may run in this process, and is not to be ended."""
    monkeypatch.setattr(ray, "shutdown", lambda: None)


@pytest.mark.parametrize("address", ["127.0.0.1:PORT", "localhost:PORT", "[::1]:PORT", "no-such-host.invalid:PORT"])
def test_where_nobody_listens_no_ray_is_looked_for(without_ends, address):
    """It would be for a quarter of an hour, and nothing would end that."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    options = Options(address=address.replace("PORT", str(free)))
    with pytest.raises(Unavailable, match="No Ray cluster answers at"), ray_runtime.joined_ray(options):
        pytest.fail("it has joined something")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ray_runtime.check_address(f"127.0.0.1:{listener.getsockname()[1]}")
    for other in ("auto", "ray://127.0.0.1:1", "local"):
        ray_runtime.check_address(other)


def test_where_no_process_can_be_watched_it_is_served_all_the_same(monkeypatch):
    async def scenario():
        ended = ray_runtime.watch_ray()
        await asyncio.sleep(0)
        assert not ended.done()
        ended.cancel()

    def refuse(pid: int):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(ray_runtime, "_ray_processes", lambda: [("raylet", os.getpid())])
    monkeypatch.setattr(os, "pidfd_open", refuse)
    asyncio.run(scenario())


@pytest.mark.parametrize(
    "folder", ["/tmp", "/tmp/a/long/way/down", "/tmp/\u00fc", "/tmp/\u00fc\u00fc\u00fc\u00fc\u00fc\u00fc\u00fc"]
)
def test_the_folder_is_short_enough_for_the_sockets_that_ray_makes_in_it(monkeypatch, without_ends, folder):
    made = []

    def start(_temp_dir: str, **where) -> None:
        made.append(_temp_dir)

    monkeypatch.setattr(tempfile, "gettempdir", lambda: folder)
    monkeypatch.setattr(ray_runtime, "start_ray", start)
    with ray_runtime.local_ray(Options()):
        assert os.path.isdir(os.path.dirname(made[0]))
    path = f"{made[0]}/session_2026-11-27_11-35-39_123456_{2**22}/sockets/plasma_store"
    assert path.isascii() and len(path) <= 107 and not os.path.exists(os.path.dirname(made[0]))


FAILS = """
import ctypes, signal, subprocess
from shared_graph import errors, options, ray_runtime

children = []

def start(**where):
    ends_with_the_thread = lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, as Ray has it
    children.append(subprocess.Popen(["sleep", "600"], preexec_fn=ends_with_the_thread))
    raise Exception("The raylet did not start")

ray_runtime.start_ray = start
for _ in range(2):
    try:
        with ray_runtime.ray_runtime(options.Options()):
            pass
    except errors.Unavailable as error:
        print(error)
print([child.wait(20) for child in children])
"""


def test_a_start_of_ray_that_fails_half_way_leaves_no_process_of_its_behind():
    """``ray.shutdown`` does not know of it then."""
    run = subprocess.run([sys.executable, "-c", FAILS], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert run.stdout.splitlines() == ["Ray could not be started: The raylet did not start"] * 2 + ["[-9, -9]"], run


def test_what_is_set_to_nothing_is_as_if_it_were_not_set_and_ray_starts_where_python_leaves_docstrings_out(
    monkeypatch, without_ends
):
    """Compose files make such variables. Ray took them for no authentication, and did not start without docstrings."""
    seen = []
    for name, value in {"RAY_AUTH_MODE": "", "RAY_AUTH_TOKEN": "", "PYTHONOPTIMIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setattr(ray_runtime, "start_ray", lambda **where: seen.append(dict(os.environ)))
    with ray_runtime.local_ray(Options()):
        assert "RAY_AUTH_MODE" not in seen[0] and len(seen[0]["RAY_AUTH_TOKEN"]) == 64
        assert seen[0]["PYTHONOPTIMIZE"] == "" and os.environ["PYTHONOPTIMIZE"] == "2"
