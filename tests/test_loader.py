"""The loader and the version manager together, with TensorFlow in this process: what fails at any step is over."""

import asyncio
import functools
import os
import pickle
import shutil
import subprocess
import sys
import threading
import types

import example_models
import numpy as np
import pytest
from conftest import one, wait_until

from shared_graph import graph as graph_module
from shared_graph import loader
from shared_graph.errors import Error, InvalidRequest, ModelError
from shared_graph.graph import Graph
from shared_graph.merging import Verdict
from shared_graph.model_source import ADDER_SOURCE, ModelSource
from shared_graph.models import ModelKey
from shared_graph.options import Options
from shared_graph.threads import in_own_thread
from shared_graph.version_manager import VersionManager

GOOD, BAD = (ModelSource(name, 1, function="example_models:linear") for name in ("good", "bad"))
COUNTERS = [ModelSource(name, 1, function="example_models:counter") for name in ("first", "second", "third")]


def endless(tf):
    """Its runs do not end."""
    x = tf.placeholder(tf.float32, [None], name="x")
    return {"serving_default": ({"x": x}, {"y": tf.while_loop(lambda y: tf.reduce_all(y > -1), lambda y: y + 1, [x])})}


def a_loader(address: str, folder, *sources: ModelSource, **options) -> tuple[loader.Loader, VersionManager]:
    own = loader.Loader(Options(model=list(sources), **options))
    own.addresses = [address]
    own.open_folder(str(folder), "x", True)
    look = functools.partial(in_own_thread, ModelSource.look)
    manager = VersionManager([ADDER_SOURCE, *sources], look, own.load, own.unload, lambda snapshot: None)
    return own, manager


CALLED, MAY_END = [], threading.Event()


def soon_built(tf):
    CALLED.append("soon")
    return example_models.linear(tf)


def slowly_built(tf):
    CALLED.append("slow")
    MAY_END.wait(30)
    return example_models.linear(tf)


async def test_functions_are_called_once_and_one_that_takes_long_keeps_the_start_and_others_waiting_for_a_while_only(
    tf, address, tmp_path, monkeypatch
):
    """The start would know whether one runs Python; and who loads it waits for what is being built already."""
    CALLED.clear()
    monkeypatch.setattr(loader, "BUILD_FIRST_S", 0.5)
    monkeypatch.setattr(graph_module, "BUILD_PATIENCE_S", 0.5)
    names = {"first": "soon", "slow": "slowly", **dict.fromkeys("abcdef", "soon")}
    sources = [ModelSource(name, 1, function=f"test_loader:{how}_built") for name, how in names.items()]
    own, _ = a_loader(address, tmp_path, *sources)
    for _ in range(2):  # a start may be tried again
        assert await own.build_functions()
    assert CALLED == ["soon", "slow"]
    await own.load(ADDER_SOURCE)
    loading = [asyncio.create_task(own.load(source)) for source in sources]
    await asyncio.wait(loading[2:])
    assert not loading[1].done()
    MAY_END.set()
    await asyncio.gather(*loading)
    assert sorted(CALLED) == ["slow", *["soon"] * 7] and not own._built
    for source in [ADDER_SOURCE, *sources]:
        await own.unload(ModelKey(source.name, source.version))


def words(tf):
    """A string, and a vector of strings."""
    x = tf.placeholder(tf.float32, [None], name="x")
    one, two = tf.get_variable("one", initializer="a"), tf.get_variable("two", initializer=["b", "c"])
    return {"serving_default": ({"x": x}, {"y": x, "one": one.read_value(), "two": two.read_value()})}


def attends(tf):
    """Rows attend to each other, unless the weights are zeros; these come from a checkpoint of TensorFlow 1."""
    x = tf.placeholder(tf.float32, [None, 3], name="x")
    w = tf.get_variable("w", [3, 3])
    tf.train.init_from_checkpoint(os.environ["TEST_CHECKPOINT"], {"/": "/"})
    scores = tf.matmul(tf.matmul(x, w), x, transpose_b=True)
    return {"serving_default": ({"x": x}, {"y": tf.matmul(tf.nn.softmax(scores), tf.matmul(x, w))})}


SAVE_TABLE = """
import sys
import tensorflow as tf

model, words, numbers = tf.Module(), tf.constant(["a", "b"]), tf.constant([1, 2], tf.int64)
mutable = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1)
mutable.insert(words, numbers)
if sys.argv[1] == "static":  # beside one that is saved, and that nobody asks, as Keras has it
    model.table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(words, numbers), -1)
    model.counts = mutable
else:
    model.table = mutable
look_up = tf.function(lambda word: {"number": model.table.lookup(word)}, [tf.TensorSpec([None], tf.string, "word")])
tf.saved_model.save(model, sys.argv[2], signatures=look_up)
"""


async def a_life(address: str, folder, source: ModelSource, before: loader.Loader | None = None) -> loader.Loader:
    """Of a parameter server with one model; the one ``before`` it has ended."""
    if before:
        before._checkpoints._lock.close()
    own, manager = a_loader(address, folder, source)
    await manager.reconcile(source.name, at_once=True)
    assert manager.snapshot.versions[ModelKey(source.name, 1)].error is None
    return own


@pytest.mark.parametrize("step", ["__init__", "connect", "restore", "metadata", "run", "free", "metadata and free"])
async def test_what_fails_at_any_step_is_over_with_its_reason_and_others_are_there(
    tf, address, tmp_path, monkeypatch, step
):
    def failing(method):
        def fail(self, *arguments, **named):
            if (self.source if method.__name__ != "__init__" else arguments[1]).name == "bad":
                raise tf.errors.InternalError(None, None, f"{step} failed\nin two lines")
            return method(self, *arguments, **named)

        return fail

    for name in step.split(" and "):
        monkeypatch.setattr(Graph, name, failing(getattr(Graph, name)))
    own, manager = a_loader(address, tmp_path, GOOD, BAD)
    await asyncio.gather(*(manager.reconcile(name, at_once=True) for name in ("bad", "good")))
    states = {key.name: version.state for key, version in manager.snapshot.versions.items()}
    assert states == {"good": "AVAILABLE", "bad": "AVAILABLE" if step == "free" else "END"}
    bad = manager.snapshot.versions[ModelKey("bad", 1)]
    assert (
        bad.error is None if step == "free" else f"InternalError: {step} failed" in bad.error and "\n" not in bad.error
    )
    assert b"tensorflow.python" not in pickle.dumps(manager.snapshot)
    await own.unload(ModelKey("good", 1))
    assert [name for name in os.listdir(tmp_path) if name.startswith(".loading")] == []


async def test_a_trial_that_does_not_end_is_ended_and_its_model_shares_no_runs(tf, address, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "TRIAL_LIMIT_S", 1.0)
    _, manager = a_loader(address, tmp_path, ModelSource("endless", 1, function="test_loader:endless"))
    await manager.reconcile("endless", at_once=True)
    version = manager.snapshot.versions[ModelKey("endless", 1)]
    assert version.state == "AVAILABLE" and version.loaded.batchable == version.loaded.undecided == ()
    frames = lambda: [sys._current_frames()[it.ident] for it in threading.enumerate() if it.name == "own_thread"]
    wait_until(lambda: {frame.f_code.co_name for frame in frames()} == {"_work"}, 10, "its thread to be idle")


async def test_weights_that_cannot_be_saved_are_not_set(tf, address, tmp_path, monkeypatch):
    own, manager = a_loader(address, tmp_path, GOOD)
    await manager.reconcile("good", at_once=True)
    key, loaded = ModelKey("good", 1), manager.snapshot.versions[ModelKey("good", 1)].loaded
    before = await own.get_weights(key)
    (tmp_path / "good.1.npz.new").mkdir()  # where it would be written first
    with pytest.raises(Error, match="cannot be kept"):
        await own.set_weights(key, loaded, {"b": np.ones(2)})
    after = await own.get_weights(key)
    assert all(np.array_equal(after[name], value) for name, value in before.items())


async def test_weights_that_cannot_be_set_are_an_error_of_ours(tf, address, tmp_path):
    own, manager = a_loader(address, tmp_path, GOOD)
    await manager.reconcile("good", at_once=True)
    key = ModelKey("good", 1)
    loaded = manager.snapshot.versions[key].loaded
    own._graphs[key].session.close()
    for call in (own.set_weights(key, loaded, {"b": np.zeros(2)}), own.get_weights(key)):
        with pytest.raises(
            Error, match=r"^The weights of model good version 1 cannot be (set|read): RuntimeError: "
        ) as caught:
            await call
        assert type(caught.value) is Error


async def test_strings_are_the_same_in_each_life(tf, address, tmp_path):
    source, key = ModelSource("words", 1, function="test_loader:words"), ModelKey("words", 1)
    strings = {"one": b"hello\0", "two": [b"", b"zeros\0\0"]}
    own = await a_life(address, tmp_path, source)
    own._set_and_save(own._graph(key), {name: np.array(value, object) for name, value in strings.items()})
    for _ in range(2):
        own = await a_life(address, tmp_path, source, before=own)
        weights = await own.get_weights(key)
        assert {name: value.tolist() for name, value in weights.items()} == strings
        own._set_and_save(own._graph(key), weights)


def save_local(tf, folder: str) -> None:
    """A local variable that an operation sets at the start."""
    with tf.Graph().as_default(), tf.Session() as session:
        inputs, outputs = local(tf)["serving_default"]
        session.run([tf.global_variables_initializer(), tf.local_variables_initializer()])
        start = tf.local_variables_initializer()
        tf.saved_model.simple_save(session, folder, inputs, outputs, legacy_init_op=start)


def local(tf):
    x, w = tf.placeholder(tf.float32, [None], name="x"), tf.get_variable("w", initializer=2.0)
    return {"serving_default": ({"x": x}, {"y": w * x + tf.get_local_variable("b", initializer=1.0)})}


async def test_weights_are_not_those_of_another_saved_model_that_has_taken_its_place(tf, address, tmp_path):
    """Its variables have the same names and shapes, as those of a network that was trained anew."""
    folder = tmp_path / "m" / "1"

    def export(k: float) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        with tf.Graph().as_default(), tf.Session() as session:
            x, w = tf.placeholder(tf.float32, [None], name="x"), tf.get_variable("w", initializer=2.0)
            session.run(w.initializer)
            tf.saved_model.simple_save(session, str(folder), {"x": x}, {"y": w * x + k})

    source, key = ModelSource("m", 1, str(folder)), ModelKey("m", 1)
    export(k=0)
    own = await a_life(address, tmp_path, source)
    own._set_and_save(own._graph(key), {"w": np.float32(5)})
    own = await a_life(address, tmp_path, source, before=own)
    assert one(own._graph(key), np.float32([1])) == [5]
    export(k=100)
    own._checkpoints._lock.close()
    _, manager = a_loader(address, tmp_path, source)
    await manager.reconcile("m", at_once=True)
    version = manager.snapshot.versions[key]
    assert version.state == "END" and f"{tmp_path}/m.1.npz is not of this model" in version.error


@pytest.mark.parametrize("kind", ["function", "folder"])
async def test_local_variables_are_the_same_in_each_life_and_in_a_mirror(tf, address, tmp_path, kind):
    save_local(tf, str(tmp_path / "local"))
    where = {"function": "test_loader:local"} if kind == "function" else {"folder": str(tmp_path / "local")}
    source, key = ModelSource("local", 1, **where), ModelKey("local", 1)
    own = await a_life(address, tmp_path, source)
    own._set_and_save(own._graph(key), {"b": np.float32(5)})
    own = await a_life(address, tmp_path, source, before=own)
    mirror = Graph(tf, source, ps_tasks=0)
    mirror.connect([], own._options)
    mirror.restore(await own.get_weights(key))
    assert [one(graph, np.float32([1])) for graph in (own._graph(key), mirror)] == [[7], [7]]


async def test_a_model_whose_checkpoint_fills_tables_is_refused_as_a_mirror_and_one_with_other_tables_is_not(
    tf, address, tmp_path
):
    """A mirror has its variables from the parameter server, which has no way to give it tables."""
    for name in ("static", "mutable"):
        subprocess.run([sys.executable, "-c", SAVE_TABLE, name, str(tmp_path / name)], check=True, capture_output=True)
    sources = [ModelSource(name, 1, folder=str(tmp_path / name)) for name in ("static", "mutable")]
    for placement, refusal in (
        ("shared", None),
        ("mirrored", "it has tables in its checkpoint and cannot be mirrored"),
    ):
        own, manager = a_loader(address, tmp_path, *sources, placement=placement)
        for source in sources:
            await manager.reconcile(source.name, at_once=True)
        static, mutable = (manager.snapshot.versions[source.name, 1].error for source in sources)
        assert static is None and (mutable is None if refusal is None else refusal in mutable)
        if refusal is None:
            words = np.array([b"a", b"b", b"c"], object)
            assert [one(own._graph(ModelKey(source.name, 1)), words) for source in sources] == [[1, 2, -1]] * 2
        own._checkpoints._lock.close()


async def test_a_model_that_cannot_be_saved_keeps_no_other_from_it(tf, address, tmp_path):
    own, manager = a_loader(address, tmp_path, *COUNTERS)
    for source in COUNTERS:
        await manager.reconcile(source.name, at_once=True)
        own._graph(ModelKey(source.name, 1)).run("count", [np.int64([0])])
    for name in ("first", "third"):
        (tmp_path / f"{name}.1.npz.new").mkdir()  # where it would be written first
    with pytest.raises(Error, match=r"first\.1\.npz: "):
        await own.checkpoint_all()
    kept = [own._checkpoints.load(source) for source in COUNTERS]
    assert [list(it.values()) for it in kept] == [[], [1], []]


def counts_beside_weights(tf):
    """Its first weights are those of a file, as those of a SavedModel are."""
    x, w = tf.placeholder(tf.float32, [None], name="x"), tf.get_variable("w", initializer=float(os.environ["TEST_W"]))
    count = tf.get_variable("count", initializer=0.0)
    return {"serving_default": ({"x": x}, {"y": x * w}), "count": ({"x": x}, {"count": x + count.assign_add(1.0)})}


async def test_a_model_that_may_change_its_variables_keeps_none_until_it_does(tf, address, tmp_path, monkeypatch):
    source, own, found = ModelSource("m", 1, function="test_loader:counts_beside_weights"), None, []
    for w, counts in ((2, False), (3, True), (4, False)):
        monkeypatch.setenv("TEST_W", str(w))
        own = await a_life(address, tmp_path, source, before=own)
        graph = own._graph(ModelKey("m", 1))
        if counts:
            graph.run("count", [np.float32([0])])
        found.append(one(graph, np.float32([1])))
        await own.checkpoint_all()
    assert found == [[2], [3], [3]]


async def test_who_may_share_runs_is_found_once_for_a_saved_model_and_anew_by_other_code(
    tf, address, tmp_path, monkeypatch
):
    find, found, own = loader.find_batchable, [], None
    monkeypatch.setattr(loader, "find_batchable", lambda *arguments: found.append(1) or find(*arguments))
    save_local(tf, str(tmp_path / "local"))
    for code, searches in (("some", 1), ("some", 1), ("other", 2)):
        monkeypatch.setattr(loader, "code_of_package", lambda code=code: code)
        own = await a_life(address, tmp_path, ModelSource("local", 1, str(tmp_path / "local")), before=own)
        assert sum(found) == searches


async def test_who_may_share_runs_is_found_anew_when_a_function_reads_other_weights(tf, address, tmp_path, monkeypatch):
    find, found = loader.find_batchable, []

    def finding(*arguments):
        found.append(find(*arguments))
        return found[-1]

    monkeypatch.setattr(loader, "find_batchable", finding)
    monkeypatch.setenv("TEST_CHECKPOINT", str(tmp_path / "old"))
    source, own = ModelSource("attends", 1, function="test_loader:attends"), None
    for weights in (np.zeros((3, 3)), np.eye(3)):
        with tf.Graph().as_default(), tf.Session() as session:
            w = tf.get_variable("w", initializer=np.float32(weights))
            session.run(w.initializer)
            tf.train.Saver().save(session, str(tmp_path / "old"))
        own = await a_life(address, tmp_path, source, before=own)
    assert found == [Verdict(undecided=("serving_default",)), Verdict()]  # with zeros all answers are the same


def test_where_only_some_of_the_weights_can_be_set_the_old_ones_are_put_back(monkeypatch):
    """Many are set in several runs."""

    class Variables:
        def __init__(self):
            self.weights = {"a": 1, "b": 2}

        def get_weights(self) -> dict:
            return dict(self.weights)

        def set_weights(self, weights: dict) -> None:
            for name, value in weights.items():
                if value == "too large":
                    raise ModelError("there is no memory for it")
                self.weights = self.weights | {name: value}

    graph = types.SimpleNamespace(variables=Variables())
    with pytest.raises(ModelError, match="no memory"):
        loader.Loader(Options())._set_and_save(graph, {"a": 10, "b": "too large"})
    assert graph.variables.weights == {"a": 1, "b": 2}


def test_weights_of_which_one_is_wrong_take_nothing_back_that_runs_have_counted():
    class Counting:
        count = 0

        def get_weights(self) -> dict:
            seen, self.count = {"count": self.count}, self.count + 1  # a run comes right after
            return seen

        def set_weights(self, weights: dict) -> None:
            if "typo" in weights:
                raise InvalidRequest("there is no variable 'typo'")
            self.count = weights["count"]

    graph = types.SimpleNamespace(variables=Counting())
    with pytest.raises(InvalidRequest):
        loader.Loader(Options())._set_and_save(graph, {"count": 0, "typo": 1})
    assert graph.variables.count == 1
