"""What importing a part of TensorFlow promises. Each test imports it in a process of its own."""

import ast
import glob
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import HERE, REPOSITORY, long

BEGIN = """
import gc, logging, sys, threading
logging.basicConfig(format="%(message)s", stream=sys.stdout)
import shared_graph.tensorflow_runtime as runtime

def is_slim():
    return "__path__" not in vars(sys.modules["tensorflow"])

def half(tf):
    "A session that halves, in a graph of its own."
    with tf.Graph().as_default() as graph:
        x = tf.placeholder(tf.float32, [None])
        y = tf.numpy_function(lambda x: x / 2, [x[:1] + x[:1]], tf.float32)
    session = tf.Session("", graph)
    return lambda value: session.run(y, {x: [value]}).tolist() == [value]
"""


def run(code: str, **environment: str) -> str:
    """What the code prints, after BEGIN, in a new process."""
    environment = os.environ | {"PYTHONPATH": REPOSITORY, "TF_CPP_MIN_LOG_LEVEL": "3"} | environment
    done = subprocess.run([sys.executable, "-c", BEGIN + code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_third_of_the_modules_is_imported_and_nothing_of_keras_or_of_data():
    names = json.loads(
        run("""
tf = runtime.import_tensorflow()
assert half(tf)(3.0) and is_slim()
import json
print(json.dumps([name for name in sys.modules if name.partition(".")[0] in ("tensorflow", "keras", "h5py")]))
""")
    )
    assert 300 < len(names) < 600
    left_out = ("keras", "h5py", "tensorflow.python.data", "tensorflow.lite")
    assert not [name for name in names if name.startswith(left_out)]


def test_each_name_is_what_the_public_api_has_under_it():
    assert (
        run("""
import inspect, operator
part, whole = runtime.import_tensorflow(), runtime.import_tensorflow(whole=True)
names = [entry.partition("=")[0] for names in runtime.NAMES.values() for entry in names.split()]
get = [operator.attrgetter(name) for name in names]
def plain(value):  # weak_tensor_ops of the whole wraps some functions once more
    return inspect.unwrap(value) if inspect.isfunction(value) else value
print([name for name, get in zip(names, get) if plain(get(part)) is not plain(get(whole))], len(names) > 40)
""")
        == "[] True\n"
    )


def names_used(path: str) -> set[str]:
    """All ``a.b`` of ``tf.a.b`` in a source file, those of a longer chain included."""
    with open(path) as file:
        tree = ast.parse(file.read())
    chains = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {chain[3:] for chain in chains if re.fullmatch(r"tf(\.\w+)+", chain)}


def test_the_package_uses_no_other_names():
    import shared_graph.tensorflow_runtime as runtime

    listed = {entry.partition("=")[0] for names in runtime.NAMES.values() for entry in names.split()}
    scopes = {name.rpartition(".")[0] for name in listed}
    paths = glob.glob(f"{REPOSITORY}/shared_graph/*.py")
    used = set().union(*map(names_used, paths)) - scopes
    unknown = {name for name in used if name not in listed and name.rpartition(".")[0] not in listed}
    assert not unknown and len(used) > 30


@pytest.mark.parametrize(
    "change, why",
    [
        long("runtime.NAMES['python.no_such_module'] = 'name'", "no_such_module"),
        ("runtime.NAMES['python.framework.ops'] += ' no_such_name'", "no_such_name"),
        long("runtime.MODULES += 'python.no_such_module',", "no_such_module"),
        ("runtime.VERSIONS = '2.0.'", "not 2.0.x"),
        long("import os; os.environ['TF_PLUGGABLE_DEVICE_LIBRARY_PATH'] = '/no/such/library'", "PLUGGABLE"),
    ],
)
def test_where_something_is_not_as_expected_the_whole_is_imported_and_a_line_says_why(change, why):
    # the library that is not there is no matter here, and TensorFlow would fail on it
    said, kind = run(
        change
        + """
unset = "os" in globals() and runtime._import_slim() is None and os.environ.pop("TF_PLUGGABLE_DEVICE_LIBRARY_PATH")
tf = runtime.import_tensorflow()
assert half(tf)(3.0) and not tf.executing_eagerly()
print(tf.keras.layers.Dense.__name__)
"""
    ).splitlines()
    assert why in said and "all of TensorFlow" in said and kind == "Dense"


@pytest.mark.parametrize(
    "statement, value",
    [
        long("import tensorflow as tf2", "tf2.keras.layers.Dense"),
        ("import tensorflow as tf2", "tf2.nn.relu"),
        long("import tensorflow as tf2", "tf2.__version__"),
        long("import tensorflow.compat.v1 as tf1", "tf1.train.AdamOptimizer"),
        long("from tensorflow.compat import v1", "v1.layers"),
        long("from tensorflow import data", "data.Dataset"),
        long("from tensorflow.keras import layers", "layers.Dense"),
        long("import tensorflow.keras", "tensorflow.keras.layers.Dense"),
        ("import keras", "keras.layers.Dense"),
        long("import tensorflow.lookup", "tensorflow.lookup.StaticHashTable"),
        long("from tensorflow.python.data.ops import dataset_ops", "dataset_ops.DatasetV2"),
        ("tf1 = runtime.import_tensorflow(whole=True)", "tf1.train.AdamOptimizer"),
    ],
)
def test_who_asks_for_more_gets_the_whole_and_what_was_made_before_goes_on(statement, value):
    assert (
        run(f"""
part = runtime.import_tensorflow()
works, session = half(part), part.Session
assert works(3.0) and is_slim()
{statement}
{value}
import tensorflow as there
assert not (hasattr(there, "no_such_name") or is_slim()) and there.nn.relu and there.compat.v1.Session is session
assert works(5.0) and half(runtime.import_tensorflow())(7.0) and half(there.compat.v1)(9.0)
print(there.executing_eagerly(), there is sys.modules["tensorflow"], runtime.import_tensorflow() is part)
""")
        == "False True True\n"
    )


def test_a_look_at_what_every_module_may_have_imports_nothing():
    assert (
        run("""
import inspect, pickle, warnings
tf = runtime.import_tensorflow()
inspect.getmodule(half), repr(sys.modules["tensorflow"]), pickle.loads(pickle.dumps(tf.ConfigProto()))
[hasattr(module, name) for module in list(sys.modules.values()) for name in ("__file__", "__warningregistry__")]
from tensorflow.python.framework import ops
from tensorflow.core.protobuf import config_pb2
print(is_slim())
""")
        == "True\n"
    )


def test_objects_are_frozen_once_in_a_process_however_often_tensorflow_is_asked_for():
    assert (
        run("""
calls, freeze = [], gc.freeze
gc.freeze = lambda: calls.append(freeze())
for whole in (False, False, True, True, False):
    runtime.import_tensorflow(whole)
print(len(calls), gc.get_freeze_count() > 10_000)
""")
        == "1 True\n"
    )


def test_two_threads_that_come_first_both_get_the_part():
    assert (
        run("""
found = []
threads = [threading.Thread(target=lambda: found.append(runtime.import_tensorflow())) for _ in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(found[0] is found[1], is_slim(), half(found[0])(3.0))
""")
        == "True True True\n"
    )


def test_the_whole_stays_whole_when_it_was_there_first():
    assert (
        run("""
import tensorflow.compat.v1 as tf
print(runtime.import_tensorflow() is tf, half(tf)(3.0))
""")
        == "True True\n"
    )


@pytest.mark.parametrize("function, slim", [("", True), ("example_models:linear", False)])
def test_functions_of_the_users_get_the_whole_and_the_adder_a_part(function, slim):
    assert (
        run(
            f"""
from shared_graph.graph import build_graph
from shared_graph.model_source import ADDER_SOURCE
from shared_graph.options import Options
options = Options(model={function!r} or ())
build_graph(options, *options.model or [ADDER_SOURCE])
print(is_slim())
""",
            PYTHONPATH=f"{REPOSITORY}:{HERE}",
        )
        == f"{slim}\n"
    )


def test_the_environment_is_as_tensorflow_needs_it():
    assert (
        run(
            """
import os
runtime.import_tensorflow()
print([name for name in os.environ if name.lower().endswith("_proxy")], round(sys.getswitchinterval() * 1000))
""",
            http_proxy="http://x",
            HTTPS_PROXY="http://y",
            no_proxy="z",
        )
        == "['no_proxy'] 1\n"
    )


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["ours", "real"])
def sources(request, tmp_path_factory) -> list[str]:
    """NAME=SOURCE of all SavedModels: those of the tests, or real ones where they are."""
    import example_models

    if request.param == "ours":
        folders = list(example_models.save(str(tmp_path_factory.mktemp("models"))).values())
    else:
        real = glob.glob(os.path.join(REPOSITORY, "..", "shared", "*models", "*", ""))
        folders = [path.rstrip("/") for path in sorted(real)] or pytest.skip("no real models here")
    return [f"{os.path.basename(folder)}={folder}" for folder in folders]


def answers(how: str, sources: list[str]) -> dict:
    command = [sys.executable, os.path.join(HERE, "models_in_a_process.py"), how, *sources]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.long
def test_all_saved_models_and_the_adder_are_the_same_with_a_part_to_the_last_bit_and_sentence(sources):
    part, whole = answers("slim", sources), answers("whole", sources)
    assert part["is_bare"] and not whole["is_bare"]
    assert list(part["models"]) == ["adder", *(source.partition("=")[0] for source in sources)]
    for name, found in part["models"].items():
        assert found == whole["models"][name], name
    failed = {name for name, found in part["models"].items() if "error" in found}
    assert failed <= {"missing_kernel", "missing_op", "other_tags_and_sparse"}


@pytest.mark.long
def test_functions_are_the_same_with_the_whole_on_top_of_a_part():
    import example_models

    functions = [f"{name}=example_models:{name}" for name in example_models.FUNCTIONS if name != "gate"]
    on_top, whole = answers("on_top", functions), answers("whole", functions)
    assert on_top["models"] == whole["models"] and on_top["modules"] == whole["modules"]
