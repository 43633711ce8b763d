"""What ``python ray_tensorflow.py`` promises: its sum, its lines, and that nothing is left of it however it ends."""

import contextlib
import glob
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field

import pytest
from conftest import OWNER, REPOSITORY, START_S, Server, long, plain_environment, processes, wait_until

names = itertools.count()


@dataclass
class Run:
    """One run of the command, in a folder of its own, with a home and a temporary folder of its own."""

    process: subprocess.Popen
    folders: dict[str, str]
    owner: str
    left: dict[int, str] = field(default_factory=dict)  # processes right after its end

    def read(self, name: str) -> str:
        with open(os.path.join(self.folders["log"], name)) as file:
            return file.read()

    @property
    def lines(self) -> list[str]:
        return self.read("stdout").splitlines()

    def wait(self, seconds: float = 2 * START_S) -> int:
        """Until its end; the exit status. Looks at what is left right then."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(self.read("stderr"))
        self.left = processes(self.owner)
        return self.process.returncode

    def files(self) -> list[str]:
        """What is in its home, in its temporary folder and where it was started."""
        tops = [f"{self.folders[name]}/" for name in ("home", "temp", "work")]
        paths = [path for top in tops for path in glob.glob(f"{top}**", recursive=True, include_hidden=True)]
        return [path for path in paths if path not in tops]


@contextlib.contextmanager
def running(*options: str, before=()):
    """A Run that has just started; ``before`` stands before the command."""
    folders = {name: tempfile.mkdtemp(prefix="rt", dir="/tmp") for name in ("home", "temp", "work", "log")}
    owner = f"command {next(names)}"
    environment = plain_environment() | {"HOME": folders["home"], "TMPDIR": folders["temp"], OWNER: owner}
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(open(os.path.join(folders["log"], name), "w")) for name in ("stdout", "stderr")]
        process = subprocess.Popen(
            [*before, sys.executable, os.path.join(REPOSITORY, "ray_tensorflow.py"), *options],
            cwd=folders["work"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=outputs[0],
            stderr=outputs[1],
            start_new_session=True,
        )
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


@pytest.mark.parametrize("options, workers", [([], 4), long(["--workers", "10"], 10)])
def test_it_ends_with_the_sum_of_the_workers_numbers_has_a_line_for_each_event_and_leaves_nothing(options, workers):
    with running(*options) as run:
        assert run.wait() == 0, run.read("stderr")
        started, *added, last = run.lines
        assert re.fullmatch(rf"started: {workers} workers, \d+\.\d s", started)
        pattern = r"worker (\d+): added (\d+), sum (\d+\.\d+), \d+\.\d+ s"
        found = [tuple(map(float, re.fullmatch(pattern, line).groups())) for line in added]
        assert sorted((worker, value) for worker, value, _ in found) == [(i, i) for i in range(workers)]
        total = 0
        for _, value, after in sorted(found, key=lambda line: (line[2], -line[1])):
            total += value
            assert after == total  # the sum right after its own add
        assert last == f"sum: {total:.1f}"
        actors = ["parameter server 0", *(f"worker {i}" for i in range(workers))]
        pattern = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO (.*)"
        events = [re.fullmatch(pattern, line)[1] for line in run.read("stderr").splitlines()]
        ready = [match[1] for event in events if (match := re.fullmatch(r"(.*) ready  pid \d+  \d+\.\d s", event))]
        assert sorted(ready) == sorted(actors)
        others = [event for event in events if "  pid " not in event]
        assert others == [f"starting: {workers} workers", f"ready: {workers} workers", "stopping"]
        assert (run.left, run.files()) == ({}, [])


@pytest.mark.parametrize(
    "moment, end",
    [
        ("gcs_server", "Ctrl-C"),
        long("gcs_server", "SIGTERM"),
        *(long(f"ray::{actor}", end) for actor in ("ParameterServer", "Worker") for end in ("Ctrl-C", "SIGTERM")),
    ],
)
def test_it_can_be_ended_at_any_moment_and_leaves_nothing(moment, end):
    with running("--workers", "2") as run:
        wait_until(lambda: any(moment in command for command in processes(run.owner).values()), what=moment)
        if end == "Ctrl-C":
            os.killpg(run.process.pid, signal.SIGINT)  # a terminal sends it to all processes in the foreground
        else:
            run.process.terminate()
        assert run.wait(60) == (130 if end == "Ctrl-C" else 143)
        assert (run.left, run.files()) == ({}, [])
        assert "Traceback" not in run.read("stderr") and not any(line.startswith("sum:") for line in run.lines)


@pytest.mark.long
def test_a_second_ctrl_c_while_it_stops_changes_nothing():
    with running("--workers", "2") as run:
        wait_until(lambda: "gcs_server" in " ".join(processes(run.owner).values()), what="Ray")
        for _ in range(2):
            os.killpg(run.process.pid, signal.SIGINT)
            wait_until(lambda: "stopping" in run.read("stderr"), 60)
        assert run.wait(60) == 130
        assert (run.left, run.files(), run.lines) == ({}, [], []) and "Traceback" not in run.read("stderr")


def test_what_cannot_be_ends_it_with_one_sentence_and_leaves_nothing():
    with running("--checkpoint-dir", "/proc/nothing") as run:
        assert run.wait(START_S) == 1
        assert run.read("stderr").splitlines()[-1].startswith("ray_tensorflow.py: error: The folder for variables")
        assert "Traceback" not in run.read("stderr") and (run.lines, run.left, run.files()) == ([], {}, [])


def test_a_wrong_option_ends_it_before_anything_starts():
    with running("--workers", "0") as run:
        assert run.wait(60) == 2
        assert "--workers 0: must be a whole number of at least 1" in run.read("stderr")
        assert (run.lines, run.files()) == ([], [])


# -- small and awkward places to run in --------------------------------------------------------------------------------

PROXY = "http://127.0.0.1:9"  # where nobody listens
PROXIES = [
    f"{name}={PROXY}"
    for word in ("http", "https", "all", "grpc")
    for name in (f"{word}_proxy", f"{word.upper()}_PROXY")
]
ONE_CPU = ["taskset", "-c", str(min(os.sched_getaffinity(0)))]


def with_mounts(*commands: str) -> list[str]:
    """What to put before a command so that these run first, where they change the mounts of this one process alone."""
    before = ["unshare", "--mount", "--map-root-user", "sh", "-ec", "; ".join([*commands, 'exec "$@"']), "sh"]
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


@pytest.mark.parametrize("kind", [long("flask"), "starlette"])
def test_a_front_end_serves_on_one_cpu_with_64_mb_of_shared_memory_behind_a_dead_proxy_with_no_home_to_write_to(kind):
    options = "--workers", "1", "--model", "linear=example_models:linear"
    with Server(kind, *options, before=small("HOME=/proc/nothing")) as server:
        server.wait_ready()
        assert [server.add(value) for value in (1, 2)] == [1, 3]
        assert server.predict("linear", {"instances": [[1, 0, 0]]}).json == {"predictions": [[1.5, 1.5]]}
        rows = 100_000  # more than Ray sends in a message: through its object store
        assert server.predict("linear", {"instances": [[1, 0, 0]] * rows}).json == {"predictions": [[1.5, 1.5]] * rows}
        assert "Traceback" not in server.output()


@pytest.mark.parametrize("before, told", [([], "told\n"), (["nohup"], "")])
def test_when_its_terminal_is_closed_a_program_is_told_to_end_unless_nohup_says_otherwise(before, told):
    code = """
import os, signal, sys
from shared_graph.logs import start_program
signal.signal(signal.SIGTERM, lambda *_: print("told"))
start_program()
os.kill(os.getpid(), signal.SIGHUP)
"""
    done = subprocess.run([*before, sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stdout.decode()) == (0, told)


@pytest.mark.parametrize("closed", [long("<&-"), long(">&-"), long("2>&-"), "<&- >&- 2>&-"])
def test_with_standard_streams_closed_it_serves(closed):
    with Server("starlette", "--workers", "1", before=["sh", "-c", f'exec "$0" "$@" {closed}']) as server:
        server.wait_ready()
        assert server.add(3) == 3


@pytest.mark.long
def test_the_command_adds_with_no_home_at_all_and_a_temporary_folder_that_does_not_exist():
    with running("--workers", "1", before=small("-u", "HOME", "TMPDIR=/nowhere")) as run:
        assert run.wait() == 0, run.read("stderr")
        assert run.lines[-1] == "sum: 0.0"
        assert (run.left, run.files()) == ({}, [])


READ_ONLY = [
    f"if [ -d {folder} ]; then mount --bind {folder} {folder}; mount -o remount,ro,bind {folder}; fi"
    for folder in ("/tmp", "/var/tmp", "/usr/tmp")
]


@pytest.mark.parametrize(
    "mounts, words",
    [
        ([*READ_ONLY, "cd /proc"], "No usable temporary directory"),
        (['mount -t tmpfs -o size=64k none "$TMPDIR"'], "Less than 1 MiB is free in /tmp/rt"),
    ],
    ids=["nowhere to write", "a full disk"],
)
def test_without_room_for_temporary_files_it_says_so_and_ends(mounts, words):
    with running("--workers", "1", before=with_mounts(*mounts)) as run:
        assert run.wait(START_S) == 1
        last = run.read("stderr").splitlines()[-1]
        assert last.startswith("ray_tensorflow.py: error: ") and words in last
        assert "Traceback" not in run.read("stderr") and (run.lines, run.left, run.files()) == ([], {}, [])
