"""What the tests share: real servers, one cluster for the session, models to serve, and a leak detector.

Three speeds: pure (no Ray, no TensorFlow), TensorFlow in this process, cluster. What breaks things has its own server.
"""

import asyncio
import atexit
import contextlib
import functools
import glob
import http.client
import inspect
import json
import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
REPOSITORY = os.path.dirname(HERE)
sys.path[:0] = [REPOSITORY, HERE]
os.environ["PYTHONPATH"] = os.pathsep.join([HERE, *filter(None, [os.environ.get("PYTHONPATH")])])  # for example_models
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# Every process that a test starts, at whatever remove, inherits these two, and the leak detector looks for them.
RUN = "RAY_TENSORFLOW_TEST_RUN"
OWNER = "RAY_TENSORFLOW_TEST_OWNER"
if RUN not in os.environ:  # else this is an actor of a test, in which its file is imported
    os.environ |= {RUN: uuid.uuid4().hex, OWNER: "test"}
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="rt", dir="/tmp")  # short, and nobody else's
    atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)

START_S = 240  # how long a start may take on a machine that is busy


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also those tests that break and load things for minutes")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes long, and runs with --long only")
    config.addinivalue_line("markers", "simulated: runs in an event loop whose clock jumps")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("long") and not config.getoption("--long"):
            item.add_marker(pytest.mark.skip(reason="takes long: runs with --long"))


def pytest_pyfunc_call(pyfuncitem):
    """An asynchronous test runs in an event loop of its own; a simulated one in a loop whose clock jumps."""
    if inspect.iscoroutinefunction(pyfuncitem.obj):
        arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
        is_simulated = pyfuncitem.get_closest_marker("simulated")
        with asyncio.Runner(loop_factory=JumpingLoop if is_simulated else None) as runner:
            test = pyfuncitem.obj(**arguments)
            runner.run(test if is_simulated else asyncio.wait_for(test, 60))
        return True


def long(*values):
    """Parameters of a test that are tried with --long only."""
    return pytest.param(*values, marks=pytest.mark.long)


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer whenever nothing is left to do. So hours pass in no time, and a
    test decides what happens when."""

    def __init__(self):
        super().__init__(JumpingSelector(self))
        self.now = 1000.0

    def time(self) -> float:
        return self.now


class JumpingSelector(selectors.DefaultSelector):
    def __init__(self, loop: JumpingLoop):
        super().__init__()
        self.loop = loop

    def select(self, timeout: float | None = None) -> list:
        if not (events := super().select(0)):
            assert timeout is not None, "nothing will ever happen any more"
            self.loop.now += timeout
        return events


def in_a_process_of_its_own(test):
    """Decorates a test of memory: tracemalloc is not to be switched on beside threads of Ray, and would count them."""

    @functools.wraps(test)
    def run():
        code = f"import {test.__module__} as tests; tests.{test.__name__}.__wrapped__()"
        done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=START_S)
        assert done.returncode == 0, done.stderr

    return run


def memory_mb(pid: int, which: str) -> int:
    """What a process has ("VmRSS"), or has had at most since ``forget_peak`` ("VmHWM")."""
    with open(f"/proc/{pid}/status") as file:
        return int(re.search(rf"{which}:\s+(\d+) kB", file.read())[1]) // 1024


def forget_peak(pid: int) -> None:
    with open(f"/proc/{pid}/clear_refs", "w") as file:
        file.write("5")


def wait_until(condition, seconds: float = START_S, what: str = ""):
    """Poll until the condition is true; its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {what or condition}"
        time.sleep(0.02)
    return value


# -- nothing is left over ----------------------------------------------------------------------------------------------


def processes(owner: str) -> dict[int, str]:
    """Pid and command line of the living processes of this test run that belong to "test" or to "session"."""
    found = {}
    for folder in glob.glob("/proc/[0-9]*"):
        pid = int(folder.rpartition("/")[2])
        with contextlib.suppress(OSError):
            with open(f"{folder}/environ", "rb") as file:
                environment = file.read().split(b"\0")
            mine = {f"{RUN}={os.environ[RUN]}".encode(), f"{OWNER}={owner}".encode()} <= set(environment)
            if mine and pid != os.getpid() and (command := command_of(pid)):
                found[pid] = command
    return found


def command_of(pid: int) -> str:
    """Of a process that lives; those that are gone, and zombies, have none."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", errors="replace") as file:
        return file.read().replace("\0", " ")
    return ""


def family(pid: int) -> dict[int, str]:
    """A process and all below it: pid to command line. Not by environment: some of Ray's overwrite theirs."""
    found = {pid: command_of(pid)}
    for path in glob.glob(f"/proc/{pid}/task/*/children"):
        with contextlib.suppress(OSError), open(path) as file:
            for child in file.read().split():
                found |= family(int(child))
    return {pid: command for pid, command in found.items() if command}


def plain_environment() -> dict[str, str]:
    """The environment without what a Ray or a TensorFlow in this process has set in it."""
    return {
        name: value
        for name, value in os.environ.items()
        if name != "CUDA_VISIBLE_DEVICES" and not name.startswith("RAY_AUTH")
    }


def folders() -> set[str]:
    return set(glob.glob(os.path.join(tempfile.gettempdir(), "ray_tensorflow_*")))


@contextlib.contextmanager
def owned_by_session():
    """What starts in this block may outlive the test that needed it first."""
    os.environ[OWNER] = "session"
    try:
        yield
    finally:
        os.environ[OWNER] = "test"


@pytest.fixture(autouse=True)
def leak_detector():
    """No process is left over by a test."""
    yield
    wait_until(lambda: not processes("test"), 30, f"these to end: {processes('test')}")


@pytest.fixture(scope="session", autouse=True)
def session_leak_detector():
    """Nothing at all is left when the session ends."""
    yield
    left = lambda: processes("session") | processes("test")
    wait_until(lambda: not left(), 30, f"these to end: {left()}")
    assert not folders()


# -- servers -----------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Answer:
    """Status, headers and body of an HTTP answer."""

    def __init__(self, response):
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def json(self):
        return json.loads(self.body)

    def __repr__(self):
        return f"<{self.status} {self.body[:500]!r}>"


def good(answer: Answer) -> dict:
    """The document of an answer that is 200 and JSON."""
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json"), answer
    return answer.json


def error(answer: Answer, status: int, message: str = "") -> str:
    """The message of an error, which has ``message`` in it: one sentence as JSON, and nothing of what is inside."""
    assert (answer.status, answer.headers["Content-Type"]) == (status, "application/json"), answer
    assert list(answer.json) == ["error"]
    text = answer.json["error"]
    assert message in text and text.strip() and "\n" not in text and "Traceback" not in text and len(text) < 1000
    assert ("Retry-After" in answer.headers) == (status in (429, 503))
    return text


class Server:
    """A server process on a free port of 127.0.0.1, by default one of the two front ends, run as a user would."""

    def __init__(self, kind: str, *options: str, before=(), command: list[str] | None = None, env=None, **popen):
        """``before`` stands before the command."""
        self.port, self.log = free_port(), tempfile.TemporaryFile()
        default = [sys.executable, os.path.join(REPOSITORY, f"ray_tensorflow_{kind}.py"), "--port", "{port}"]
        command = [*before, *(part.format(port=self.port) for part in command or default), *options]
        environment = (env or os.environ) | {"RAY_TENSORFLOW_TEST_PORT": str(self.port)}
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env=environment, **popen)

    def request(self, method: str, path: str, body=None, headers: dict | None = None, timeout: float = 60) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            return Answer(connection.getresponse())

    def get(self, path: str) -> Answer:
        return self.request("GET", path)

    def add(self, value=1) -> float:
        """The sum right after it."""
        return good(self.get(f"/?value={value}"))["result"]

    def post(self, path: str, document) -> Answer:
        return self.request("POST", path, document if isinstance(document, (bytes, str)) else json.dumps(document))

    def predict(self, model: str, document) -> Answer:
        return self.post(f"/v1/models/{model}:predict", document)

    def is_listening(self) -> bool:
        assert self.process.poll() is None, self.output()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def wait_ready(self, workers: int = 1):
        """Until it serves with so many workers."""

        def ready():
            health = self.get("/health") if self.is_listening() else None
            return (
                health
                and health.status == 200
                and workers <= sum(worker["state"] == "ready" for worker in health.json["workers"])
            )

        try:
            wait_until(ready, what="/health to be ready")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output()}") from None
        return self

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.stop()


@pytest.fixture(scope="session", params=["flask", "starlette"])
def front_end(request, models):
    """Each front end in turn, with two workers and all models, as a process of its own."""
    options = [part for name, source in models.items() for part in ("--model", f"{name}={source}")]
    with owned_by_session():
        server = Server(request.param, "--workers", "2", *options)
    with server:
        yield server.wait_ready(workers=2)


@pytest.fixture(scope="session")
def cluster(models):
    """One Cluster in this process, with two workers and all models."""
    from shared_graph.cluster import Cluster

    with owned_by_session():
        cluster = Cluster(workers=2, model=[f"{name}={source}" for name, source in models.items()]).start(workers=2)
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def two(cluster, models):
    """Another one in the same Ray, with two parameter servers, all models and a table of 400 MB."""
    from shared_graph.cluster import Cluster

    sources = [f"{name}={source}" for name, source in models.items()]
    with owned_by_session():
        two = Cluster(workers=1, parameter_servers=2, model=[*sources, "example_models:table"]).start()
    yield two
    two.close()


@pytest.fixture
def clients():
    """``clients(n, function, items)``: call the function on each item from n threads at once; results in order."""

    def run(count: int, function, items) -> list:
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(function, items))

    return run


# -- graphs, in this process -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tf():
    """TensorFlow as actors import it; the environment is as before afterwards."""
    from shared_graph.tensorflow_runtime import import_tensorflow

    before = dict(os.environ)
    yield import_tensorflow(whole=True)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def address(tf) -> str:
    server = tf.train.Server({"boot": ["localhost:0"]}, job_name="boot", task_index=0)
    yield server.target.removeprefix("grpc://")


@pytest.fixture
def load(tf, address):
    """``load(source)``: a model's graph, connected to the parameter server, first values in place if ``restore``."""
    from shared_graph.graph import Graph
    from shared_graph.model_source import ModelSource
    from shared_graph.options import Options

    graphs = []

    def load(source, restore: bool = True):
        source = source if isinstance(source, ModelSource) else Options(model=source).model[0]
        _, source = max(source.versions().items())
        graphs.append(graph := Graph(tf, source))
        graph.connect([address], Options())
        if restore:
            graph.restore({})
        return graph

    yield load
    for graph in graphs:
        graph.disconnect()


def one(graph, *arrays, signature: str = "serving_default"):
    """The first output for these inputs, in the order of the inputs' names."""
    import numpy as np

    return graph.run(signature, [np.asarray(array) for array in arrays])[0].tolist()


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, str]:
    """Name to source of all models that the shared servers serve: made here, and real ones where they are."""
    import example_models

    saved = example_models.save(str(tmp_path_factory.mktemp("models")))
    return saved | {name: f"example_models:{name}" for name in example_models.FUNCTIONS} | real_models()


def real_models(folder: str = "models") -> dict[str, str]:
    """The SavedModels beside the repository, where they exist; some of those in ``more_models`` cannot be served."""
    paths = sorted(glob.glob(os.path.join(REPOSITORY, "..", "shared", folder, "*", "")))
    return {os.path.basename(os.path.dirname(path)): os.path.dirname(path) for path in paths}


class Folder:
    """A model's folder, into which versions of ``numbered`` are put, each of which answers its own number."""

    def __init__(self, path, versions: str):
        self.path, self.versions = str(path), versions
        os.makedirs(self.path)

    def copy(self, version: int, name: str | None = None, pause_s: float = 0) -> None:
        """File by file, as over a slow network; the file by which a version is known comes first."""
        source, target = os.path.join(self.versions, str(version)), os.path.join(self.path, name or str(version))
        for part in ("saved_model.pb", "variables", "assets"):
            time.sleep(pause_s)
            os.makedirs(target, exist_ok=True)
            if part == "saved_model.pb":
                shutil.copy(os.path.join(source, part), target)
                continue
            for file in sorted(os.listdir(os.path.join(source, part))):
                os.makedirs(os.path.join(target, part), exist_ok=True)
                shutil.copy(os.path.join(source, part, file), os.path.join(target, part))

    def remove(self, version: int) -> None:
        shutil.rmtree(os.path.join(self.path, str(version)))

    def label(self, name: str, version: int) -> None:
        """As ``ln -sfn`` does."""
        os.symlink(str(version), os.path.join(self.path, f".{name}"))
        os.replace(os.path.join(self.path, f".{name}"), os.path.join(self.path, name))


@pytest.fixture
def folder(tmp_path, models) -> Folder:
    return Folder(tmp_path / "m", models["numbered"])
