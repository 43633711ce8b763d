"""What a Cluster promises on real processes: one shared state, the answers of a plain session, from wherever it is called."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from conftest import REPOSITORY, free_port, owned_by_session, wait_until
from ray_tensorflow import InvalidRequest, ModelError, gpu_share

# -- between-graph replication -----------------------------------------------------------------------------------------


def test_two_workers_share_the_variable(cluster):
    total = cluster.add(0)
    assert [cluster.add(1, worker=0), cluster.add(2, worker=1), cluster.add(4, worker=0)] == [total + 1, total + 3, total + 7]


def test_adds_of_many_clients_are_each_seen_once(cluster, clients):
    total = cluster.add(0)
    values = [2.0**(i % 30) for i in range(600)]
    sums = clients(32, cluster.add, values)
    assert sorted(np.diff([total, *sorted(sums)])) == sorted(values)
    assert max(sums) == total + sum(values)


def test_a_workers_answer_can_be_awaited_as_any_call_of_rays(cluster):
    import ray

    async def ask():
        [place] = [a for a in ray.util.list_named_actors(all_namespaces=True) if a["name"] == "worker 0"]
        worker = ray.get_actor(**place)
        first = await worker.answer.remote("adder", [("add", 1.0, 10.0, False), ("add", 2.0, 10.0, False)])
        body = b'{"instances": [[1, 1, 1]]}', False
        return first, await worker.answer.remote("linear", [("predict", body, 10.0, False), ("predict", (b"", False), 10.0, False)])

    total = cluster.add(0)
    sums, (prediction, error) = asyncio.run(ask())
    assert sums == [total + 1, total + 3]
    assert json.loads(prediction) == {"predictions": Y} and isinstance(error, InvalidRequest)


# -- callers: threads, event loops, processes --------------------------------------------------------------------------

X = {"x": np.array([[1, 1, 1]], np.float32)}
Y = [[9.5, 11.5]]


async def many(cluster, count: int = 40) -> list:
    """So many predictions at once by the awaitable door."""
    return [answer["y"].tolist() for answer in await asyncio.gather(*(cluster.predict_async(X, "linear") for _ in range(count)))]


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


def test_a_thread_pool_gets_the_same_answers(cluster, clients):
    assert clients(16, lambda _: cluster.predict(X, "linear")["y"].tolist(), range(80)) == [Y] * 80


@pytest.mark.parametrize("run", [asyncio.run, uvloop_run], ids=["asyncio", "uvloop"])
def test_an_event_loop_gets_the_same_answers(cluster, run):
    assert run(many(cluster)) == [Y] * 40


def test_a_notebook_cell_gets_the_same_answers(cluster, notebook):
    assert notebook(many(cluster)) == [Y] * 40


def test_the_blocking_door_may_be_used_where_a_loop_runs(cluster, notebook):
    """ray#4856: it need not be a coroutine that calls."""

    async def cell():
        return cluster.predict(X, "linear")["y"].tolist(), cluster.add(0)

    answer, total = notebook(cell())
    assert answer == Y and total == cluster.add(0)


def test_several_loops_and_threads_at_once_get_the_same_answers(cluster, notebook):
    def blocking():
        return [cluster.predict(X, "linear")["y"].tolist() for _ in range(40)]

    doors = [asyncio.run, uvloop_run, notebook, asyncio.run, uvloop_run]
    with ThreadPoolExecutor() as pool:
        futures = [pool.submit(lambda door=door: door(many(cluster))) for door in doors]
        futures += [pool.submit(blocking) for _ in range(3)]
        assert [future.result(60) for future in futures] == [[Y] * 40] * 8


def test_both_doors_change_the_same_sum(cluster, notebook):
    total = cluster.add(1)

    async def cell():
        return [await cluster.add_async(2), await cluster.add_async(4, worker=1)]

    assert notebook(cell()) + [cluster.add(8)] == [total + 2, total + 6, total + 14]


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


def test_the_web_process_never_maps_tensorflow(front_end):
    assert front_end.predict("linear", {"instances": [[1, 1, 1]]}).json == {"predictions": Y}
    with open(f"/proc/{front_end.process.pid}/maps") as file:
        assert "tensorflow" not in file.read().replace("ray_tensorflow", "")


# -- wrong inputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(["arguments", "status", "words"], [
    (({"x": [[1, 1, 1]]}, "unheard"), 404, "unheard"),
    (({"x": [[1, 1, 1]]}, "linear", "unheard"), 400, "unheard"),
    (({"x": [[1, 1, 1]]}, "linear", "serving_default", 7), 404, "7"),
    (({"y": [[1, 1, 1]]}, "linear"), 400, "'x'"),
    (({}, "linear"), 400, "'x'"),
    (({"x": [[1, 1, 1]], "y": 1}, "linear"), 400, "'y'"),
    (([[1, 1]], "several"), 400, "one array"),
    ((None, "linear"), 400, "'x'"),
    (({"x": [["1", "1", "1"]]}, "linear"), 400, "float32"),
    (({"x": [[1j, 1, 1]]}, "linear"), 400, "float32"),
    (({"x": None}, "linear"), 400, "float32"),
    (({"x": [[1, 1, 1], [1]]}, "linear"), 400, "ragged"),
    (({"x": [1]}, "affine", "double"), 400, "'n'"),
    (({"n": [1.5]}, "affine", "double"), 400, "int32"),
    (({"n": [2**40]}, "affine", "double"), 400, "int32"),
    (({"word": [1]}, "words"), 400, "text"),
    (({"word": [None]}, "words"), 400, "text")], ids=str)
def test_a_wrong_input_is_refused_in_one_sentence(cluster, arguments, status, words):
    with pytest.raises(InvalidRequest) as caught:
        cluster.predict(*arguments)
    assert caught.value.status == status
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("arguments", [({"x": [[1, 1]]}, "linear"), ({"x": 1.0}, "linear"), ({"x": [-1.0]}, "picky")], ids=str)
def test_what_the_model_itself_refuses_is_a_model_error_in_one_sentence(cluster, arguments):
    with pytest.raises(ModelError) as caught:
        cluster.predict(*arguments)
    assert str(caught.value) and "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, "abc", None, [1, 2], [], 10**400, 1j, "", {}], ids=str)
def test_only_one_finite_number_can_be_added(cluster, value):
    total = cluster.add(0)
    with pytest.raises(InvalidRequest, match="value must be one finite number") as caught:
        cluster.add(value)
    assert "\n" not in str(caught.value)
    assert cluster.add(0) == total


def test_a_wrong_input_is_refused_by_the_awaitable_door_too(cluster):
    with pytest.raises(InvalidRequest, match="unheard"):
        asyncio.run(cluster.predict_async(X, "unheard"))
    with pytest.raises(InvalidRequest, match="finite"):
        asyncio.run(cluster.add_async(np.nan))


def test_an_input_may_have_any_dtype_that_becomes_its_own_without_loss_of_kind(cluster):
    for value in ([[1, 1, 1]], [[1.0, 1, 1]], [[True, True, True]], np.ones((1, 3), np.float64), np.ones((1, 3), np.uint8)):
        assert cluster.predict({"x": value}, "linear")["y"].tolist() == Y
    assert cluster.predict({"word": ["two"]}, "words")["number"].tolist() == [2]


# -- lives, in a process of their own: Ray is started and ended with each ----------------------------------------------


def plain_environment() -> dict[str, str]:
    """The environment without what a Ray or a TensorFlow in this process has set in it."""
    set_here = re.compile("CUDA_VISIBLE_DEVICES|RAY_AUTH.*")
    return {name: value for name, value in os.environ.items() if not set_here.fullmatch(name)}


def run_script(code: str, **environment) -> dict:
    """Run Python code that has ``report``, a dict, in a new process and a folder that is not the repository's; the report."""
    prelude = f"import asyncio, contextlib, json, os, sys, threading, time\nsys.path.insert(0, {REPOSITORY!r})\nreport = {{}}\n"
    with tempfile.TemporaryDirectory() as folder:
        code = prelude + textwrap.dedent(code) + "\nprint('REPORT', json.dumps(report))"
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, text=True, capture_output=True, timeout=120,
            env=plain_environment() | environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.rpartition("REPORT ")[2])


@pytest.fixture(scope="module")
def lives():
    """What was seen of six clusters in one process, one after the other, each started and closed in another way."""
    return run_script("""
        import uvloop
        from ray_tensorflow import Cluster
        import ray

        def look(way):
            children = set()
            for thread in os.listdir("/proc/self/task"):
                with contextlib.suppress(FileNotFoundError), open(f"/proc/self/task/{thread}/children") as file:
                    children.update(file.read().split())
            paths = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
            mine = {os.readlink(path) for path in paths if os.path.islink(path)}
            with open("/proc/self/net/tcp") as tcp, open("/proc/self/net/tcp6") as tcp6:
                sockets = [line.split() for line in [*tcp, *tcp6]]
            report[way] |= {
                "listening": [s[1] for s in sockets if s[3] == "0A" and f"socket:[{s[9]}]" in mine], "open": len(mine),
                "threads": [t.name for t in threading.enumerate() if "ray_tensorflow" in t.name],
                "children": len(children), "ray": ray.is_initialized(), "path": os.environ.get("PYTHONPATH") == path}

        path = os.environ.get("PYTHONPATH")
        with Cluster(workers=1) as cluster:
            report["with"] = {"sum": cluster.add(3), "status": cluster.health()["status"]}
        look("with")

        async def life(way):
            async with Cluster(workers=1) as cluster:
                report[way] = {"sum": await cluster.add_async(3), "status": cluster.health()["status"]}

        asyncio.run(life("asyncio"))
        look("asyncio")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(life("uvloop"))
        look("uvloop")

        def blocking(way):
            with Cluster(workers=1) as cluster:
                report[way] = {"sum": cluster.add(3), "status": cluster.health()["status"]}

        thread = threading.Thread(target=blocking, args=["thread"])
        thread.start()
        thread.join()
        look("thread")

        async def cell():  # a blocking call in a cell, whose loop runs
            blocking("notebook")

        asyncio.run(cell())
        look("notebook")

        async def home(way):  # as in Starlette: the cluster lives in the loop that runs
            cluster = Cluster(workers=1).begin(asyncio.get_running_loop())
            while cluster.health()["status"] != "ready":
                await asyncio.sleep(0.05)
            report[way] = {"sum": await cluster.add_async(3), "status": cluster.health()["status"]}
            try:
                cluster.add(3)
            except Exception as error:
                report["refused"] = str(error)
            await asyncio.to_thread(cluster.close)

        asyncio.run(home("home"))
        look("home")
        report["tensorflow"] = "tensorflow" in sys.modules
        """)


@pytest.mark.parametrize("way", ["with", "asyncio", "uvloop", "thread", "notebook", "home"])
def test_a_cluster_starts_and_ends_six_times_in_one_process_and_leaves_nothing(lives, way):
    opened = lives[way]["open"] - lives["with"]["open"]
    assert opened < 20  # Ray itself leaves a log and up to two sockets open each time, which go nowhere
    assert {name: value for name, value in lives[way].items() if name != "open"} == {
        "sum": 3.0, "status": "ready", "listening": [], "threads": [], "children": 0, "ray": False, "path": True}


def test_a_blocking_call_in_the_home_loop_is_refused_in_a_sentence(lives):
    assert lives["refused"].startswith("A blocking call in the cluster's own event loop would never return")


def test_the_process_that_has_a_cluster_does_not_import_tensorflow(lives):
    assert not lives["tensorflow"]


def test_closing_while_starting_is_quick_and_clean(tmp_path):
    """At three moments: at once, when Ray is up, and when the parameter server builds its models."""
    report = run_script("""
        import ray
        from ray_tensorflow import Cluster, Unavailable

        def start():
            try:
                cluster.start()
            except Unavailable as error:
                report["raised"].append(str(error))

        report |= {"raised": [], "seconds": [], "left": []}
        for moment in (lambda: True, ray.is_initialized, lambda: os.listdir(os.environ["RAY_TENSORFLOW_TEST_GATE"])):
            cluster = Cluster(workers=2, model=["example_models:late"])
            waiter = threading.Thread(target=start)
            waiter.start()
            while cluster.health()["status"] == "new" or not moment():
                time.sleep(0.01)
            began = time.monotonic()
            cluster.close()
            waiter.join(60)
            report["seconds"].append(time.monotonic() - began)
            report["left"].append([ray.is_initialized(), cluster.health()["status"]])
        """, RAY_TENSORFLOW_TEST_GATE=str(tmp_path))
    assert report["raised"] == ["The cluster was closed."] * 3
    assert report["left"] == [[False, "stopped"]] * 3
    assert max(report["seconds"]) < 20


def test_a_forked_process_may_start_its_own():
    """As under a process manager that loads the application and then forks: none of it runs in the parent (tensorflow#2448)."""
    report = run_script("""
        import ray_tensorflow_flask

        report["threads"] = threading.active_count()
        read, write = os.pipe()
        if not os.fork():
            client = ray_tensorflow_flask.app.test_client()
            while (answer := client.get("/?value=3")).status_code == 503:
                time.sleep(0.1)
            os.write(write, json.dumps(answer.json).encode())
            sys.exit()
        report["status"] = os.wait()[1]
        report["answer"] = json.loads(os.read(read, 1000))
        report["tensorflow"] = "tensorflow" in sys.modules
        """, RAY_TENSORFLOW_WORKERS="1")
    assert report == {"threads": 1, "status": 0, "answer": {"result": 3.0}, "tensorflow": False}


# -- GPUs: Ray's logical ones, by what each actor sees -----------------------------------------------------------------


@pytest.mark.parametrize(["gpus", "actors", "share"], [
    (0, 5, 0), (1, 1, 1), (8, 5, 1), (5, 5, 1), (1, 2, 0.5), (2, 4, 0.5), (2, 5, 0.3333), (1, 3, 0.3333), (4, 5, 0.5)])
def test_gpus_are_shared_out_evenly(gpus, actors, share):
    assert gpu_share(gpus, actors) == share


@pytest.fixture(scope="module")
def ray_with_gpus():
    """(address, environment): a Ray of its own on 127.0.0.1, with two logical GPUs, and what its clients have to have set."""
    with tempfile.TemporaryDirectory(prefix="ray_gpu_", ignore_cleanup_errors=True) as folder:
        token = {"RAY_AUTH_TOKEN": uuid.uuid4().hex * 2, "RAY_USAGE_STATS_ENABLED": "0", "HOME": folder}
        token["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # one node, which is then content with 127.0.0.1
        token["RAY_AUTH_MODE"] = "token"  # which Ray takes for granted only where it starts itself
        port = free_port()
        command = [
            os.path.join(os.path.dirname(sys.executable), "ray"), "start", "--head", "--block", f"--port={port}",
            "--node-ip-address=127.0.0.1", "--num-cpus=1",
            "--num-gpus=2", "--include-dashboard=false", f"--temp-dir={folder}", "--object-store-memory=80000000"]
        with open(os.path.join(folder, "log"), "w+") as log, owned_by_session():
            process = subprocess.Popen(command, env=plain_environment() | token, stdout=log, stderr=log, start_new_session=True)
            try:
                wait_until(lambda: process.poll() is not None or "runtime started" in open(log.name).read(), what="Ray to start")
                assert process.poll() is None, open(log.name).read()
                yield f"127.0.0.1:{port}", token
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(60)


@pytest.fixture(scope="module")
def health_with_gpus(ray_with_gpus):
    """``health()`` of a cluster of three workers on two GPUs."""
    address, token = ray_with_gpus
    return run_script(f"""
        from ray_tensorflow import Cluster

        cluster = Cluster(workers=3, address={address!r}).start(workers=3)
        report["sums"] = sorted([cluster.add(1, worker=i) for i in range(3)])
        report |= cluster.health()
        cluster.close()
        import ray
        ray.init({address!r}, logging_level="ERROR")
        deadline = time.monotonic() + 30
        while ray.available_resources().get("GPU") != 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        report["left"] = ray.available_resources().get("GPU")
        """, **token)


def test_each_worker_is_pinned_to_its_part_of_a_gpu(health_with_gpus):
    """Three workers and the parameter server are two to each GPU."""
    actors = health_with_gpus["parameter_servers"] + health_with_gpus["workers"]
    assert sorted(actor["gpus"] for actor in actors) == [[0], [0], [1], [1]]
    assert all(actor["cuda_visible_devices"] == str(actor["gpus"][0]) for actor in actors)


def test_a_cluster_on_ray_of_others_works_and_gives_everything_back(health_with_gpus):
    assert health_with_gpus["sums"] == [1, 2, 3]
    assert health_with_gpus["left"] == 2
