"""What a Cluster promises on real processes: one shared state, the answers of a plain session, from wherever it is called."""

import asyncio
import base64
import json
import os
import random
import re
import shutil
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

import example_models
from conftest import REPOSITORY, RUN, SESSION_FOLDERS, folders, free_port, owned_by_session, real_models, wait_until
from ray_tensorflow import ADDER, Cluster, InvalidRequest, ModelError, Unavailable, gpu_share

REAL = sorted(real_models())
OTHER = {"counter", "failing", "scores"}  # those that change, fail, or want serialized examples; they have tests of their own
STATELESS = [name for name in (*example_models.SAVED, *example_models.FUNCTIONS) if name not in OTHER] + REAL
SLOW = {"basic_pitch"}  # 50 ms a run
MISDECLARED = ("saved_model_half_plus_three", "tensorflow/serving/regress")  # its input is declared a float, but is text


# -- what plain sessions answer ----------------------------------------------------------------------------------------


class Reference:
    """Inputs for each signature of a model, and what a plain session answers to them."""

    def __init__(self, name: str, source: str):
        self.name, self.plain = name, example_models.PlainSession(source)
        numbers = np.random.default_rng(7)
        self.cases = [  # (signature, inputs, outputs)
            (signature, inputs := self.sample(signature, numbers), self.plain.predict(inputs, signature))
            for signature in self.plain.names if not signature.startswith("__") and (name, signature) != MISDECLARED
            for _ in range(2 if name in SLOW else 6)]

    def sample(self, signature: str, numbers) -> dict[str, np.ndarray]:
        """Random inputs, of one to three rows where their number is free."""
        rows, inputs = int(numbers.integers(1, 4)), {}
        for key, name in self.plain.names[signature][0].items():
            tensor = self.plain.graph.get_tensor_by_name(name)
            shape = tuple(tensor.shape.as_list()) if tensor.shape.rank is not None else (None,)
            shape = tuple(3 if size is None else size for size in shape[1:]) if shape[:1] == (None,) else shape
            shape = (rows, *shape) if tensor.shape.rank is None or tensor.shape.as_list()[:1] == [None] else shape
            dtype = tensor.dtype.as_numpy_dtype
            if dtype is object:
                texts = [b"two", b"", "é".encode(), b"unheard", b"a\0\n\""]
                texts = [example(numbers) for _ in range(9)] if self.name in REAL else texts
                inputs[key] = numbers.choice(np.array(texts, object), shape)
            elif dtype is np.bool_:
                inputs[key] = numbers.random(shape) < 0.5
            else:
                inputs[key] = (numbers.random(shape) * 8).astype(dtype)
        return inputs


def example(numbers) -> bytes:
    """A serialized tf.train.Example with two float features."""
    from tensorflow.core.example import example_pb2

    message = example_pb2.Example()
    for name in ("x", "x2"):
        message.features.feature[name].float_list.value.append(numbers.random())
    return message.SerializeToString()


@pytest.fixture(scope="module")
def reference(models):
    """``reference(name)``: the model's Reference, made once."""
    made = {}
    return lambda name: made.get(name) or made.setdefault(name, Reference(name, models[name]))


def assert_same(outputs: dict, expected: dict) -> None:
    """The same names, dtypes, shapes and bits."""
    assert outputs.keys() == expected.keys()
    for name, array in outputs.items():
        wanted = np.asarray(expected[name])
        assert array.shape == wanted.shape
        if wanted.dtype == object:
            assert array.tolist() == wanted.tolist()
        else:
            assert (array.dtype, array.tobytes()) == (wanted.dtype, wanted.tobytes())


@pytest.fixture
def merged(cluster, monkeypatch):
    """Rows of each run that the cluster's batcher sends while the test runs, by (model, signature)."""
    runs, send = [], cluster._batcher._run

    def run(worker, model, signature, feeds):
        runs.extend((model, signature, len(feed[0]) if feed[0].ndim else 1) for feed in feeds)
        return send(worker, model, signature, feeds)

    monkeypatch.setattr(cluster._batcher, "_run", run)
    return runs


# -- every model answers as in a plain session -------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 32])
@pytest.mark.parametrize("name", STATELESS)
def test_a_model_answers_as_in_a_plain_session(cluster, reference, clients, merged, name, count):
    cases = reference(name).cases * (1 if name in SLOW or count == 1 else 8)
    outputs = clients(count, lambda case: cluster.predict(case[1], name, case[0]), cases)
    for got, (signature, inputs, expected) in zip(outputs, cases):
        assert_same(got, expected)
    batched = {s.name for s in cluster.models[name].signatures.values() if s.batched}
    if count > 1:
        for signature in batched:  # requests have at most three rows, so runs of more are batches
            assert max(rows for model, s, rows in merged if (model, s) == (name, signature)) > 3


@pytest.mark.parametrize("count", [1, 32])
@pytest.mark.parametrize("name", STATELESS)
def test_a_model_answers_over_http_as_in_a_plain_session(front_end, reference, clients, name, count):
    cases = [case for case in reference(name).cases if (name, case[0]) != ("echo", "half")]  # which has no JSON
    cases *= 1 if name in SLOW or count == 1 else 4
    answers = clients(count, lambda case: front_end.predict(name, {"signature_name": case[0], "inputs": to_json(case[1])}), cases)
    for answer, (signature, inputs, expected) in zip(answers, cases):
        assert answer.status == 200, answer
        outputs = answer.json["outputs"]
        outputs = outputs if len(expected) > 1 else {next(iter(expected)): outputs}
        assert_same({key: from_json(value, np.asarray(expected[key]).dtype) for key, value in outputs.items()}, expected)


def to_json(inputs: dict[str, np.ndarray]) -> dict:
    """Arrays as plain values, text as base64."""

    def encode(value):
        return [encode(v) for v in value] if isinstance(value, list) else {"b64": base64.b64encode(value).decode()}

    return {key: encode(array.tolist()) if array.dtype == object else array.tolist() for key, array in inputs.items()}


def from_json(value, dtype) -> np.ndarray:
    """A scalar or a nested list of the answer, read back as the output's dtype."""

    def decode(value):
        if isinstance(value, list):
            return [decode(v) for v in value]
        return base64.b64decode(value["b64"]) if isinstance(value, dict) else value.encode()

    return np.array(decode(value), object) if dtype == object else np.array(value, dtype)


def test_all_models_at_once_answer_as_in_plain_sessions(cluster, reference, clients):
    cases = [(name, *case) for name in STATELESS for case in reference(name).cases]
    random.Random(1).shuffle(cases)
    outputs = clients(32, lambda case: cluster.predict(case[2], case[0], case[1]), cases)
    for got, (name, signature, inputs, expected) in zip(outputs, cases):
        assert_same(got, expected)


def test_models_with_the_same_variable_names_keep_their_own_weights(cluster, clients):
    x = {"x": np.ones((1, 3), np.float32)}
    answers = clients(16, lambda name: cluster.predict(x, name)["y"].tolist(), ["linear", "same_names"] * 40)
    assert answers == [[[9.5, 11.5]], [[67]]] * 40


@pytest.mark.skipif(not REAL, reason="the real models are not here")
def test_half_plus_two_and_half_plus_three_keep_their_own_weights(cluster, clients):
    """They have variables of the same names; y = x / 2 + 2 and y = x / 2 + 3."""
    calls = [(name, float(x)) for x in range(40) for name in ("saved_model_half_plus_two_cpu", "saved_model_half_plus_three")]
    answers = clients(16, lambda call: cluster.predict({"x": np.float32([[call[1]]])}, call[0])["y"].item(), calls)
    assert answers == [x / 2 + (2 if "two" in name else 3) for name, x in calls]


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


def test_state_of_a_models_own_is_changed_once_a_request(cluster, clients):
    x = {"x": np.zeros(1, np.int64)}
    before = int(cluster.predict(x, "counter", "read")["count"])
    counts = clients(16, lambda _: int(cluster.predict(x, "counter", "count")["count"]), range(100))
    assert sorted(counts) == list(range(before + 1, before + 101))
    assert int(cluster.predict(x, "counter", "read")["count"]) == before + 100


def test_a_signature_that_changes_state_is_never_batched(cluster):
    signatures = cluster.models["counter"].signatures
    assert signatures["count"].writes and not signatures["count"].batched and not signatures["read"].writes


def test_health_knows_every_process(cluster):
    health = cluster.health()
    actors = health["parameter_servers"] + health["workers"]
    assert health["status"] == "ready" and [actor["state"] for actor in actors] == ["ready"] * 3
    assert len({actor["pid"] for actor in actors} | {os.getpid()}) == 4
    assert [worker["index"] for worker in health["workers"]] == [0, 1]
    assert set(health["models"]) == {ADDER, *cluster.models}
    assert json.loads(json.dumps(health)) == health


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


def test_each_new_thread_gets_the_same_answer(cluster):
    """Not "Tensor is not an element of this graph", as in minimaxir/gpt-2-simple#118."""
    answers = []
    for _ in range(20):
        thread = threading.Thread(target=lambda: answers.append(cluster.predict(X, "linear")["y"].tolist()))
        thread.start()
        thread.join(60)
    assert answers == [Y] * 20


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


def test_calling_makes_and_sets_no_event_loop(cluster):
    made = []

    class Policy(asyncio.DefaultEventLoopPolicy):
        def new_event_loop(self):
            made.append("new")
            return super().new_event_loop()

    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(Policy())
    try:
        cluster.predict(X, "linear")
        cluster.add(0)
    finally:
        asyncio.set_event_loop_policy(before)
    assert not made


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


def test_answers_belong_to_their_requests(cluster, clients):
    def predict(i):
        rows = 1 + i % 3
        return cluster.predict({"x": np.full((rows, 2), i, np.float32), "n": np.full(rows, i)}, "several")

    for i, answer in enumerate(clients(32, predict, range(200))):
        assert answer["next"].tolist() == [i + 1] * (1 + i % 3)


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
    (([[1, 1]], "several"), 400, "list"),
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


# -- a worker that comes late, and one that is killed ------------------------------------------------------------------

# A folder that all processes of this test run know; example_models.late waits there.
GATE = os.environ.setdefault("RAY_TENSORFLOW_TEST_GATE", os.path.join(tempfile.gettempdir(), f"gate_{os.environ[RUN]}"))


@pytest.fixture(scope="module")
def late_cluster():
    """(cluster, answers): two workers, the second of which started late, and what was answered while there was one."""
    os.mkdir(GATE)
    before = folders()
    cluster = Cluster(workers=2, model=["example_models:late"])
    try:
        with owned_by_session():
            cluster.start()
        SESSION_FOLDERS.update(folders() - before)
        wait_until(lambda: len(os.listdir(GATE)) == 3, what="the second worker to build")
        answers = {"health": cluster.health(), "sum": cluster.add(3), "y": cluster.predict({"x": [4.0]}, "late")["y"].tolist()}
        answers["health after"] = cluster.health()
        open(os.path.join(GATE, "open"), "w").close()
        wait_ready(cluster, 2)
        yield cluster, answers
    finally:
        open(os.path.join(GATE, "open"), "w").close()
        cluster.close()
        shutil.rmtree(GATE)


def wait_ready(cluster: Cluster, workers: int) -> None:
    def ready():
        return sum(worker["state"] == "ready" for worker in cluster.health()["workers"]) == workers

    wait_until(ready, what=f"{workers} workers to be ready")


def test_a_worker_that_does_not_start_holds_nobody_up(late_cluster):
    _, answers = late_cluster
    assert (answers["sum"], answers["y"]) == (3, [8])
    for health in (answers["health"], answers["health after"]):
        assert health["status"] == "ready"
        assert [worker["state"] for worker in health["workers"]] == ["ready", "starting"]


def test_a_worker_that_comes_late_shares_the_variable(late_cluster):
    cluster, _ = late_cluster
    total = cluster.add(0, worker=0)
    assert cluster.add(2, worker=1) == total + 2


def test_a_killed_worker_is_replaced_while_predictions_go_on(late_cluster):
    cluster, _ = late_cluster
    wait_ready(cluster, 2)
    total, old = cluster.add(1), cluster.health()["workers"][1]
    failures, stop = [], threading.Event()

    def keep_asking():
        while not stop.is_set():
            try:
                assert cluster.predict({"x": [4.0]}, "late")["y"].tolist() == [8]
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=keep_asking) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        os.kill(old["pid"], signal.SIGKILL)
        wait_until(lambda: cluster.health()["workers"][1]["restarts"] > old["restarts"], what="the loss to be noticed")
        wait_ready(cluster, 2)
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not failures
    new = cluster.health()["workers"][1]
    assert new["pid"] != old["pid"] and not os.path.exists(f"/proc/{old['pid']}")
    assert cluster.add(2, worker=1) == total + 2  # and the sum is still there


# -- what cannot start -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["function", "module", "folder"])
def test_a_model_that_cannot_be_loaded_is_named(tmp_path, kind):
    source = {"function": "bad=example_models:broken", "module": "bad=no_such_module:build", "folder": f"bad={tmp_path}"}[kind]
    (tmp_path / "saved_model.pb").write_bytes(b"not a SavedModel")
    cluster = Cluster(workers=1, model=[source])
    with pytest.raises(ModelError, match="^model bad ") as caught:
        cluster.start()
    assert "\n" not in str(caught.value)
    assert cluster.health()["error"] == str(caught.value)
    with pytest.raises(Unavailable, match="bad"):
        cluster.add(1)


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
            [sys.executable, "-c", code], cwd=folder, text=True, capture_output=True, timeout=400,
            env=plain_environment() | environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.rpartition("REPORT ")[2])


@pytest.fixture(scope="module")
def five_lives():
    """What was seen of five clusters in one process, one after the other, each started and closed in another way."""
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
        report["tensorflow"] = "tensorflow" in sys.modules
        """)


@pytest.mark.parametrize("way", ["with", "asyncio", "uvloop", "thread", "notebook"])
def test_a_cluster_starts_and_ends_five_times_in_one_process_and_leaves_nothing(five_lives, way):
    opened = five_lives[way]["open"] - five_lives["with"]["open"]
    assert opened < 20  # Ray itself leaves a log and up to two sockets open each time, which go nowhere
    assert {name: value for name, value in five_lives[way].items() if name != "open"} == {
        "sum": 3.0, "status": "ready", "listening": [], "threads": [], "children": 0, "ray": False, "path": True}


def test_the_process_that_has_a_cluster_does_not_import_tensorflow(five_lives):
    assert not five_lives["tensorflow"]


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
            while not (cluster._thread and moment()):
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
            ray_tensorflow_flask.app.start().close()
            os._exit(0)
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


@pytest.mark.parametrize("gpus", range(1, 9))
def test_every_actor_fits_onto_a_gpu(gpus):
    for actors in range(1, 40):
        share = gpu_share(gpus, actors)
        assert 0 < share <= 1 and gpus * int(1 / share + 1e-9) >= actors


def test_without_gpus_no_actor_sees_one(cluster):
    """Ray itself leaves all of them visible to actors that asked for none (ray#28215)."""
    health = cluster.health()
    for actor in health["parameter_servers"] + health["workers"]:
        assert (actor["gpus"], actor["cuda_visible_devices"]) == ([], "")


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
