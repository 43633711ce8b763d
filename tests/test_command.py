"""What ``python ray_tensorflow.py`` promises: its sum, its lines, and that nothing is left of it however it ends."""

import contextlib
import glob
import ipaddress
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field

import pytest

from conftest import OWNER, REPOSITORY, START_S, processes, wait_until

names = itertools.count()


@dataclass
class Run:
    """One run of the command, in a folder that is not the repository's, with a home and a temporary folder of its own."""

    process: subprocess.Popen
    folders: dict[str, str]
    owner: str
    listeners: dict[tuple[str, int], str] = field(default_factory=dict)  # (address, port): the process that listened there
    left: dict[int, str] = field(default_factory=dict)  # processes right after its end

    def read(self, name: str) -> str:
        with open(os.path.join(self.folders["log"], name)) as file:
            return file.read()

    @property
    def lines(self) -> list[str]:
        return self.read("stdout").splitlines()

    def wait(self, seconds: float = 2 * START_S) -> int:
        """Until its end; the exit status. Looks at who listens meanwhile, and at what is left."""
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < end, self.read("stderr")
            self.listeners.update(listeners(processes(self.owner)))
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.2)
        self.left = processes(self.owner)
        return self.process.returncode

    def files(self) -> list[str]:
        """What is in its home, in its temporary folder and where it was started."""
        tops = [f"{self.folders[name]}/" for name in ("home", "temp", "work")]
        paths = [path for top in tops for path in glob.glob(f"{top}**", recursive=True, include_hidden=True)]
        return [path for path in paths if path not in tops]


@contextlib.contextmanager
def running(*options: str, before: tuple[str, ...] = ()):
    """A Run that has just started; ``before`` stands before the command."""
    folders = {name: tempfile.mkdtemp(prefix="rt", dir="/tmp") for name in ("home", "temp", "work", "log")}
    owner = f"command {next(names)}"
    environment = os.environ | {"HOME": folders["home"], "TMPDIR": folders["temp"], OWNER: owner}
    for name in [name for name in environment if name.startswith("RAY_AUTH") or name == "CUDA_VISIBLE_DEVICES"]:
        del environment[name]
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(open(os.path.join(folders["log"], name), "w")) for name in ("stdout", "stderr")]
        process = subprocess.Popen(
            [*before, sys.executable, os.path.join(REPOSITORY, "ray_tensorflow.py"), *options],
            cwd=folders["work"], env=environment, stdin=subprocess.DEVNULL,
            stdout=outputs[0], stderr=outputs[1], start_new_session=True)
    try:
        yield Run(process, folders, owner)
    finally:
        process.kill()
        process.wait()
        for pid in processes(owner):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)


def listeners(pids: dict[int, str]) -> dict[tuple[str, int], str]:
    """Where these processes listen for TCP: (address, port) to command line."""
    owners = {}
    for pid, command in pids.items():
        for path in glob.glob(f"/proc/{pid}/fd/*"):
            with contextlib.suppress(OSError):
                owners[os.readlink(path)] = command
    found = {}
    for table in ("tcp", "tcp6"):
        with open(f"/proc/net/{table}") as file:
            for fields in map(str.split, file.readlines()[1:]):
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in owners:
                    host, port = fields[1].split(":")
                    words = [bytes.fromhex(host[i:i + 8])[::-1] for i in range(0, len(host), 8)]
                    found[str(ipaddress.ip_address(b"".join(words))), int(port, 16)] = owners[f"socket:[{fields[9]}]"]
    return found


# -- runs that end by themselves ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_runs():
    """Two runs at the same time, one of them on one CPU alone."""
    with running(before=("taskset", "-c", "0")) as first, running() as second:
        threads = [threading.Thread(target=run.wait) for run in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        yield {"on one CPU": first, "beside it": second}


@pytest.fixture(params=["on one CPU", "beside it"])
def run(request, two_runs) -> Run:
    """A run with four workers, as is."""
    return two_runs[request.param]


def test_it_ends_with_the_sum_of_the_workers_numbers(run):
    assert run.process.returncode == 0, run.read("stderr")
    assert run.lines[-1] == "sum: 6.0"


def sums(run: Run) -> list[tuple[float, int, int]]:
    """(sum, added value, worker) of each worker's line."""
    matches = [re.fullmatch(r"worker (\d+): added (\d+), sum (\d+\.\d+), \d+\.\d+ s", line) for line in run.lines]
    return [(float(match[3]), int(match[2]), int(match[1])) for match in matches if match]


def test_each_worker_has_a_line_with_the_sum_right_after_its_own_add(run):
    lines = sums(run)
    assert sorted((value, worker) for _, value, worker in lines) == [(i, i) for i in range(4)]
    total = 0
    for after, value, _ in sorted(lines, key=lambda line: (line[0], -line[1])):
        total += value
        assert after == total


def test_there_is_a_line_for_each_event_and_nothing_else(run):
    assert re.fullmatch(r"started: 1 parameter server, 4 workers, \d+\.\d s", run.lines[0])
    assert len(run.lines) == 6
    events = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in run.read("stderr").splitlines()]
    patterns = [r"parameter server ready  pid \d+  \d+\.\d s", *(rf"worker {i} ready  pid \d+  \d+\.\d s" for i in range(4))]
    assert len(events) == 5, run.read("stderr")
    for pattern in patterns:
        assert any(re.fullmatch(pattern, event) for event in events), (pattern, events)


def test_no_process_is_left(run):
    assert run.left == {}


def test_no_file_is_left(run):
    assert run.files() == []


def test_only_tensorflows_server_listens_beyond_this_machine(run):
    """TensorFlow listens on all interfaces, and nothing in it changes that."""
    assert run.listeners
    for (address, port), command in run.listeners.items():
        ip = ipaddress.ip_address(address)
        ip = getattr(ip, "ipv4_mapped", None) or ip
        assert ip.is_loopback or command.startswith("ray::ParameterServer"), (address, port, command[:200])


def test_ten_workers_add_up_to_45():
    with running("--workers", "10") as run:
        assert run.wait() == 0, run.read("stderr")
        assert run.lines[-1] == "sum: 45.0"
        assert sorted(value for _, value, _ in sums(run)) == list(range(10))
        assert (run.left, run.files()) == ({}, [])


# -- runs that are ended -----------------------------------------------------------------------------------------------


def starts_ray(run: Run):
    """Ray's first process is there."""
    wait_until(lambda: any("gcs_server" in command for command in processes(run.owner).values()), what="Ray to start")


def starts_parameter_server(run: Run):
    """TensorFlow is being imported."""
    wait_until(lambda: any("ray::ParameterServer" in command for command in processes(run.owner).values()), what="the actor")


@pytest.mark.parametrize("moment", [starts_ray, starts_parameter_server], ids=lambda moment: moment.__name__)
@pytest.mark.parametrize("end", ["Ctrl-C", "SIGTERM"])
def test_it_can_be_ended_at_any_moment_and_leaves_nothing(moment, end):
    with running("--workers", "2") as run:
        moment(run)
        if end == "Ctrl-C":
            os.killpg(run.process.pid, signal.SIGINT)  # a terminal sends it to all processes in the foreground
        else:
            run.process.terminate()
        assert run.wait(30) == (130 if end == "Ctrl-C" else 143)
        assert (run.left, run.files()) == ({}, [])
        assert "Traceback" not in run.read("stderr") and not any(line.startswith("sum:") for line in run.lines)


def test_a_wrong_option_ends_it_before_anything_starts():
    with running("--workers", "0") as run:
        assert run.wait(30) == 2
        assert "--workers 0: must be a whole number of at least 1" in run.read("stderr")
        assert (run.listeners, run.files(), run.lines) == ({}, [], [])
