"""Small and awkward places to run in."""

import os
import subprocess

import pytest
from conftest import START_S, Server
from test_command import running

PROXY = "http://127.0.0.1:9"  # where nobody listens
PROXIES = [f"{name}={PROXY}" for word in ("http", "https", "all", "grpc")
           for name in (f"{word}_proxy", f"{word.upper()}_PROXY")]
ONE_CPU = ["taskset", "-c", str(min(os.sched_getaffinity(0)))]


def with_mounts(*commands: str) -> list[str]:
    """What to put before a command so that these run first, where they change the mounts of this one process alone."""
    before = ["unshare", "-m", "sh", "-ec", "; ".join([*commands, 'exec "$@"']), "sh"]
    try:
        done = subprocess.run([*before, "true"], capture_output=True, text=True, timeout=10)
    except OSError as error:
        pytest.skip(f"this machine cannot change mounts: {error}")
    if done.returncode:
        pytest.skip(f"this machine cannot change mounts: {done.stderr.strip()}")
    return before


def small(*changes: str) -> list[str]:
    """One CPU, 64 MB of /dev/shm, as a container has by default, a dead proxy, and these changes of the environment."""
    mounts = with_mounts("mount -t tmpfs -o size=64m none /dev/shm")
    return [*mounts, "env", "-u", "no_proxy", "-u", "NO_PROXY", *changes, *PROXIES, *ONE_CPU]


@pytest.mark.parametrize("kind", [pytest.param("flask", marks=pytest.mark.long), "starlette"])
def test_a_front_end_serves_on_one_cpu_with_64_mb_of_shared_memory_behind_a_dead_proxy_with_no_home_to_write_to(kind):
    options = "--workers", "1", "--model", "linear=example_models:linear"
    with Server(kind, *options, before=small("HOME=/proc/nothing")) as server:
        server.wait_ready()
        assert [server.add(value) for value in (1, 2)] == [1, 3]
        assert server.predict("linear", {"instances": [[1, 0, 0]]}).json == {"predictions": [[1.5, 1.5]]}
        rows = 100_000  # more than Ray sends in a message: through its object store
        assert server.predict("linear", {"instances": [[1, 0, 0]] * rows}).json == {"predictions": [[1.5, 1.5]] * rows}
        assert "Traceback" not in server.output()


def test_the_command_adds_with_no_home_at_all_and_a_temporary_folder_that_does_not_exist():
    with running("--workers", "1", before=tuple(small("-u", "HOME", "TMPDIR=/nowhere"))) as run:
        assert run.wait() == 0, run.read("stderr")
        assert run.lines[-1] == "sum: 0.0"
        assert (run.left, run.files()) == ({}, [])


READ_ONLY = [f"if [ -d {folder} ]; then mount --bind {folder} {folder}; mount -o remount,ro,bind {folder}; fi"
             for folder in ("/tmp", "/var/tmp", "/usr/tmp")]


@pytest.mark.parametrize("mounts, words", [
    ([*READ_ONLY, "cd /proc"], "No usable temporary directory"),
    (['mount -t tmpfs -o size=64k none "$TMPDIR"'], "Less than 1 MiB is free in /tmp/rt"),
], ids=["nowhere to write", "a full disk"])
def test_without_room_for_temporary_files_it_says_so_and_ends(mounts, words):
    with running("--workers", "1", before=tuple(with_mounts(*mounts))) as run:
        assert run.wait(START_S) == 1
        last = run.read("stderr").splitlines()[-1]
        assert last.startswith("ray_tensorflow.py: error: ") and words in last
        assert "Traceback" not in run.read("stderr") and (run.lines, run.left, run.files()) == ([], {}, [])
