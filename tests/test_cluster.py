"""What a ``Cluster`` promises to its callers: threads, event loops, notebooks and forks, one life after the other."""

import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import REPOSITORY, plain_environment

from shared_graph.connection import QueueKey, Request, WorkerConnection
from shared_graph.errors import InvalidRequest

X = {"x": np.array([[1, 1, 1]], np.float32)}
Y = [[9.5, 11.5]]


def uvloop_run(coroutine):
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(coroutine)


@pytest.fixture
def notebook():
    """``notebook(coroutine)``: run a cell's code, in a loop that runs already and is somebody else's."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(60)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_threads_and_event_loops_of_several_kinds_at_once_get_the_same_answers(cluster, notebook):

    async def many():
        answers = await asyncio.gather(*(cluster.predict_async(X, "linear") for _ in range(40)))
        return [answer["y"].tolist() for answer in answers]

    def blocking(_):
        return [cluster.predict(X, "linear")["y"].tolist() for _ in range(40)]

    doors = [asyncio.run, uvloop_run, notebook, asyncio.run, uvloop_run]
    with ThreadPoolExecutor() as pool:
        futures = [pool.submit(lambda door=door: door(many())) for door in doors]
        futures += [pool.submit(blocking, i) for i in range(3)]
        assert [future.result(60) for future in futures] == [[Y] * 40] * 8


def test_both_doors_and_all_workers_change_the_same_sum_also_where_a_loop_runs(cluster, notebook):
    """A blocking call in a cell (ray#4856) is as good as one elsewhere."""

    async def cell():
        return [await cluster.add_async(2, worker=0), await cluster.add_async(4, worker=1), cluster.add(8)]

    total = cluster.add(1, worker=0)
    assert notebook(cell()) == [total + 2, total + 6, total + 14]


def test_whole_numbers_of_pythons_are_taken_for_pixels(cluster):
    assert cluster.predict({"x": [[1, 255]]}, "echo", "uint8")["y"].dtype == np.uint8


def test_a_caller_that_gives_up_harms_nobody(cluster):

    async def impatient():
        tasks = [asyncio.ensure_future(cluster.predict_async(X, "linear")) for _ in range(40)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    answers = asyncio.run(impatient())
    assert all(isinstance(answer, asyncio.CancelledError) for answer in answers[::2])
    assert [answer["y"].tolist() for answer in answers[1::2]] == [Y] * 20


@pytest.mark.parametrize(
    ["arguments", "status", "words"],
    [
        (({"x": [[1, 1, 1]]}, "unheard"), 404, "unheard"),
        (({"x": [[1, 1, 1]]}, "linear", "unheard"), 400, "unheard"),
        (({"x": [[1, 1, 1]]}, "linear", "serving_default", 7), 404, "7"),
        (({"y": [[1, 1, 1]]}, "linear"), 400, "'x'"),
        (({"x": [[1, 1, 1]], "y": 1}, "linear"), 400, "'y'"),
        (([[1, 1]], "several"), 400, "one array"),
        ((None, "linear"), 400, "'x'"),
        (({"x": [["1", "1", "1"]]}, "linear"), 400, "float32"),
        (({"x": [[1, 1, 1], [1]]}, "linear"), 400, "ragged"),
        (({"n": [1.5]}, "affine", "double"), 400, "int32"),
        (({"n": [2**40]}, "affine", "double"), 400, "int32"),
        (({"x": [1, -1]}, "echo", "uint8"), 400, "uint8"),
        ((np.broadcast_to(np.float32(1), (2**29, 3)), "linear"), 413, "6,442,450,944 bytes of inputs"),
        (({"word": [1]}, "words"), 400, "string"),
    ],
    ids=str,
)
def test_a_wrong_input_is_refused_in_one_sentence(cluster, arguments, status, words):
    with pytest.raises(InvalidRequest) as caught:
        cluster.predict(*arguments)
    assert caught.value.status == status
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


class OnlyHere:
    """What another process cannot unpickle."""


STRANGE = {
    "generator": (x for x in X),
    "function": lambda: X,
    "lock": threading.Lock(),
    "OnlyHere": OnlyHere(),
    "type": OnlyHere,
    "set": {1.0},
}


@pytest.mark.parametrize("inputs", [lambda value: value, lambda value: {"x": [value]}], ids=["bare", "in a list"])
def test_six_predicts_of_what_cannot_travel_are_refused_by_name_and_cost_nobody_a_place(cluster, inputs):
    before = cluster.add(0)
    for kind, value in STRANGE.items():
        with pytest.raises(InvalidRequest, match=f"takes numbers, strings or bytes, not objects .*{kind}"):
            cluster.predict(inputs(value), "linear")
    begun = time.monotonic()
    assert cluster.predict(X, "linear")["y"].tolist() == Y and cluster.add(1) == before + 1
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize("value", [["ab\0\0", "\0"], [b"ab\0\0", b"\0"], (b"ab\0\0", "\0"), [b"\xff\xfe\0\0", "\0"]])
def test_strings_that_end_in_zeros_keep_them(cluster, value):
    assert cluster.predict({"word": value}, "words", "upper")["length"].tolist() == [4, 1]


@pytest.mark.parametrize(
    "value", [np.nan, np.float32("inf"), "abc", None, [1, 2], 10**400, 1j, np.complex64(1)], ids=str
)
def test_only_one_finite_number_can_be_added_by_either_door(cluster, value):
    total = cluster.add(0)
    for add in (cluster.add, lambda value: asyncio.run(cluster.add_async(value))):
        with pytest.raises(InvalidRequest, match="value must be one finite number"):
            add(value)
    assert cluster.add(0) == total


def test_an_input_may_have_any_dtype_that_becomes_its_own_without_loss_of_kind(cluster):
    for value in ([[1, 1, 1]], [[True, True, True]], np.ones((1, 3), np.float64), np.ones((1, 3), np.uint8)):
        assert cluster.predict({"x": value}, "linear")["y"].tolist() == Y


def run_script(code: str, **environment) -> dict:
    """Run code that has ``report``, a dict, in a new process and a folder that is not the repository's; the report."""
    imports = "import asyncio, contextlib, glob, json, os, sys, tempfile, threading, time"
    prelude = f"{imports}\nsys.path.insert(0, {REPOSITORY!r})\nreport = {{}}\n"
    code = prelude + textwrap.dedent(code) + "\nprint('REPORT', json.dumps(report))"
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            text=True,
            capture_output=True,
            timeout=500,
            env=plain_environment() | environment,
        )
    print(result.stderr)  # shown when the test fails
    assert result.returncode == 0
    return json.loads(result.stdout.rpartition("REPORT ")[2])


@pytest.fixture(scope="module")
def lives():
    """What was seen of four clusters in one process, one after the other, each started and closed in another way."""
    return run_script("""
        import uvloop
        from shared_graph.cluster import Cluster
        import ray

        def use(cluster, way):
            report[way] = {"sum": cluster.add(3), "status": cluster.health()["status"]}

        def blocking(way):
            with Cluster(workers=1).start(workers=9) as cluster:
                use(cluster, way)

        def thread(way):
            thread = threading.Thread(target=blocking, args=[way])
            thread.start()
            thread.join()

        async def notebook(way):  # a blocking call in a cell, whose loop runs
            blocking(way)

        async def awaiting(way):
            async with Cluster(workers=1) as cluster:
                await asyncio.to_thread(use, cluster, way)

        def in_uvloop(way):
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(awaiting(way))

        async def home(way):  # as in Starlette: the cluster lives in the loop that runs
            cluster = Cluster(workers=1).start_in_background(asyncio.get_running_loop())
            while cluster.health()["status"] != "ready":
                await asyncio.sleep(0.05)
            try:
                cluster.add(3)
            except Exception as error:
                report["refused"] = [type(error).__name__, str(error)]
            await asyncio.to_thread(use, cluster, way)
            await asyncio.to_thread(cluster.close)

        def read(path):
            with contextlib.suppress(FileNotFoundError), open(path) as file:
                return file.read()
            return ""

        def folders():
            return set(glob.glob(os.path.join(tempfile.gettempdir(), "ray_tensorflow_*")))

        path, there = os.environ.get("PYTHONPATH"), folders()
        for way, life in {"thread": thread, "notebook": lambda way: asyncio.run(notebook(way)), "uvloop": in_uvloop,
                          "home": lambda way: asyncio.run(home(way))}.items():
            life(way)
            fds = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
            mine = {os.readlink(fd) for fd in fds if os.path.islink(fd)}
            sockets = [line.split() for name in ("tcp", "tcp6") for line in read(f"/proc/self/net/{name}").splitlines()]
            report[way] |= {
                "open": len(mine), "folders": list(folders() - there), "ray": ray.is_initialized(),
                "path": os.environ.get("PYTHONPATH") == path,
                "listening": [s[1] for s in sockets if s[3] == "0A" and f"socket:[{s[9]}]" in mine],
                "children": [read(f"/proc/self/task/{t}/children") for t in os.listdir("/proc/self/task")]}
        report["tensorflow"] = "tensorflow" in sys.modules
        """)


@pytest.mark.parametrize("way", ["thread", "notebook", "uvloop", "home"])
def test_a_cluster_starts_and_ends_four_times_in_one_process_and_leaves_nothing(lives, way):
    seen = dict(lives[way])
    assert seen.pop("open") < lives["thread"]["open"] + 20  # Ray itself leaves a log and up to two sockets each time
    assert not any(seen.pop("children"))
    assert seen == {"sum": 3.0, "status": "ready", "listening": [], "folders": [], "ray": False, "path": True}


def test_a_blocking_call_in_the_home_loop_is_refused_in_a_sentence_and_tensorflow_is_never_imported(lives):
    kind, message = lives["refused"]
    assert kind == "InvalidRequest" and "would never return" in message
    assert not lives["tensorflow"]


def test_closing_while_starting_is_quick_and_clean(tmp_path):
    """At three moments: at once, when Ray is up, and when the parameter server builds its models."""
    for folder in (gate := tmp_path / "gate", temporary := tmp_path / "temporary"):
        folder.mkdir()
    report = run_script(
        """
        import ray
        from shared_graph.cluster import Cluster
        from shared_graph.errors import Unavailable

        def start():
            try:
                cluster.start()
            except Unavailable as error:
                report["raised"].append(str(error))

        report |= {"raised": [], "seconds": [], "left": []}
        gate = os.environ["RAY_TENSORFLOW_TEST_GATE"]
        for moment in (lambda: True, ray.is_initialized, lambda: set(os.listdir(gate)) - there):
            there = set(os.listdir(gate))
            cluster = Cluster(workers=2, model=["example_models:announced"])
            waiter = threading.Thread(target=start)
            waiter.start()
            while not moment():
                time.sleep(0.01)
            began = time.monotonic()
            cluster.close()
            waiter.join(60)
            report["seconds"].append(time.monotonic() - began)
            folders = glob.glob(os.path.join(tempfile.gettempdir(), "ray_tensorflow_*"))
            report["left"].append([ray.is_initialized(), cluster.health()["status"], folders])
        """,
        RAY_TENSORFLOW_TEST_GATE=str(gate),
        TMPDIR=str(temporary),
    )
    assert report["raised"] == ["The server is shutting down."] * 3
    assert report["left"] == [[False, "failed", []]] * 3
    assert max(report["seconds"]) < 60


@pytest.mark.long
def test_a_start_that_is_interrupted_twice_or_runs_out_of_time_has_ended_all_when_it_raises(tmp_path):
    report = run_script(
        """
        import ray, signal
        from shared_graph import Cluster

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

        def is_making_actors():
            return cluster.status.servers[0].handle is not None

        def folders():
            return glob.glob(os.path.join(tempfile.gettempdir(), "ray_tensorflow_*"))

        def look(end):
            report[end] = [ray.is_initialized(), cluster.health()["status"], folders()]

        def interrupt():
            while not is_making_actors():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            while not cluster._home._closing.is_set():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        cluster = Cluster(workers=1)
        threading.Thread(target=interrupt).start()
        try:
            cluster.start()
        except KeyboardInterrupt:
            look("interrupted")

        async def expire(limit):
            while not is_making_actors():
                await asyncio.sleep(0.01)
            limit.reschedule(0)

        async def limited():
            try:
                async with asyncio.timeout(None) as limit:
                    expiring = asyncio.create_task(expire(limit))
                    async with cluster:
                        report["started"] = True
            except TimeoutError:
                look("out of time")

        cluster = Cluster(workers=1)
        asyncio.run(limited())
        """,
        TMPDIR=str(tmp_path),
    )
    assert report == {"interrupted": [False, "failed", []], "out of time": [False, "failed", []]}


def test_two_clusters_in_one_program_share_one_ray_and_neither_minds_the_end_of_the_other(tmp_path):
    report = run_script(
        """
        import ray
        from shared_graph import Cluster, Error

        def error_of(call):
            try:
                return call()
            except Error as error:
                return [type(error).__name__, str(error)]

        one, other = (Cluster(workers=1) for _ in range(2))
        report["before"] = error_of(lambda: one.add(1))
        starts = [threading.Thread(target=cluster.start) for cluster in (one, other, one)]
        for start in starts:
            start.start()
        for start in starts:
            start.join()
        report["sums"] = [one.add(1), other.add(10), one.add(1)]
        report["no worker"] = error_of(lambda: one.add(1, worker=99))
        reader, writer = os.pipe()
        if not (child := os.fork()):
            forked = [error_of(lambda: other.add(1)), error_of(lambda: Cluster(workers=1).start())]
            os.write(writer, json.dumps(forked).encode())
            os._exit(0)
        os.waitpid(child, 0)
        report["forked"] = json.loads(os.read(reader, 1000))
        one.close()
        report["ray"] = [ray.is_initialized()]
        report["other"] = [other.add(10), other.health()["status"]]
        report["closed"] = [error_of(call) for call in (
            lambda: one.add(1), lambda: one.reload("adder"), lambda: list(one.map([1.0], "adder")),
            lambda: one.get_weights("adder"), lambda: asyncio.run(one.add_async(1)))]
        report["elsewhere"] = error_of(lambda: Cluster(workers=1, address="192.0.2.1:6379").start())
        other.close()
        report["ray"].append(ray.is_initialized())
        report["threads"] = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
        """
    )
    assert report["before"] == ["Unavailable", "Nothing was started: call start(), or use 'with'."]
    assert report["sums"] == [1, 10, 2] and report["other"] == [20, "ready"]
    assert report["no worker"][0] == "InvalidRequest" and "no worker 99" in report["no worker"][1]
    for (kind, message), words in zip(
        report["forked"], ("A forked process has no cluster", "use multiprocessing's spawn")
    ):
        assert kind == "Unavailable" and words in message
    assert {kind for kind, _ in report["closed"]} == {"Unavailable"}
    assert report["elsewhere"] == ["Unavailable", "This process runs on another Ray already, not on 192.0.2.1:6379."]
    assert report["ray"] == [True, False]


def test_at_the_end_what_may_have_been_applied_is_told_from_what_was_not(tmp_path):
    report = run_script(
        f"""
        import struct
        from shared_graph import Cluster, Error

        def add(_):
            for _ in range(2000):
                try:
                    results.append(cluster.add(1))
                except Error as error:
                    statuses.append(error.status)
                    return

        results, statuses = [], []
        cluster = Cluster(workers=2, checkpoint_dir={str(tmp_path)!r}, max_batch=4).start(2)
        threads = [threading.Thread(target=add, args=[0]) for _ in range(64)]
        for thread in threads:
            thread.start()
        while len(results) < 500:
            time.sleep(0.001)
        cluster.close()
        for thread in threads:
            thread.join(30)
        report |= {{"results": len(results), "statuses": statuses, "hang": any(t.is_alive() for t in threads)}}
        with open({str(tmp_path / "adder.sum")!r}, "rb") as file:
            report["sum"] = struct.unpack("<dd", file.read())[0]
        """
    )
    doubtful = report["statuses"].count(502)
    assert not report["hang"] and set(report["statuses"]) <= {502, 503} and len(report["statuses"]) == 64
    assert report["results"] <= report["sum"] <= report["results"] + doubtful


@pytest.mark.parametrize("run", [asyncio.run, uvloop_run])
def test_a_worker_that_reads_nothing_any_more_keeps_no_connection_open(run):
    async def main():
        ours, theirs = socket.socketpair()
        connection = WorkerConnection(0, *await asyncio.open_connection(sock=ours), None, lambda one: None)
        await asyncio.sleep(0)
        request = Request(QueueKey("m", None, "", None), None, "predict", b"0" * 2**25, None, 2**25, 0.0, False)
        connection.send(request.key, [request], 0.0)
        connection.close()
        await asyncio.wait_for(connection.closed, 10)
        theirs.close()

    run(main())


@pytest.mark.parametrize("end", ["abort", "close"])
@pytest.mark.parametrize("run", [asyncio.run, uvloop_run])
def test_what_is_sent_on_a_connection_that_has_just_been_lost_is_lost_with_it_and_not_a_bad_request(run, end):
    async def main():
        ours, theirs = socket.socketpair()
        lost = []
        reader, writer = await asyncio.open_connection(sock=ours)
        connection = WorkerConnection(0, reader, writer, None, lambda one: lost.append(dict(one.in_flight)))
        await asyncio.sleep(0)
        getattr(writer.transport, end)()
        while not lost:
            connection.send(QueueKey("m", None, "", None), [], 0.0)
            await asyncio.sleep(0)
        theirs.close()
        return lost

    [in_flight] = run(main())
    assert in_flight
