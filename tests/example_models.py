"""Models for the tests: functions that build a graph, as users write them, and SavedModels of TensorFlow 1 and 2.

Importing this file imports no tensorflow.
"""

import functools
import importlib
import json
import os
import subprocess
import sys
import time

# -- one's own graphs: module:function ---------------------------------------------------------------------------------


def linear(tf):
    """y = x W + b with three inputs and two outputs, its variables initialized to known numbers."""
    x = tf.placeholder(tf.float32, [None, 3], name="x")
    w = tf.get_variable("w", initializer=[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    b = tf.get_variable("b", initializer=[0.5, -0.5])
    return {"serving_default": ({"x": x}, {"y": tf.matmul(x, w) + b})}


def same_names(tf):
    """Variables with the names of those in ``linear``, and other values."""
    x = tf.placeholder(tf.float32, [None, 3], name="x")
    w = tf.get_variable("w", initializer=[[10.0], [20.0], [30.0]])
    b = tf.get_variable("b", initializer=[7.0])
    return {"serving_default": ({"x": x}, {"y": tf.matmul(x, w) + b})}


def echo(tf):
    """Every dtype of JSON's, each input given back: signature "all", and one for each dtype."""
    dtypes = ("float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint32", "uint64", "bool", "string")
    inputs = {dtype: tf.placeholder(dtype, None, name=f"in_{dtype}") for dtype in dtypes}
    outputs = {dtype: tf.identity(tensor) for dtype, tensor in inputs.items()}
    half = tf.placeholder(tf.float16, None)
    return {
        "serving_default": ({"x": inputs["float32"]}, {"y": outputs["float32"]}),
        "all": (inputs, outputs),
        "to_bytes": ({"x": inputs["string"]}, {"y_bytes": outputs["string"]}),
        "half": ({"x": half}, {"y": tf.identity(half)}),
        **{dtype: ({"x": inputs[dtype]}, {"y": outputs[dtype]}) for dtype in dtypes},
    }


def several(tf):
    """Two inputs of different dtypes, three outputs."""
    x = tf.placeholder(tf.float32, [None, 2], name="x")
    n = tf.placeholder(tf.int64, [None], name="n")
    scaled = x * tf.cast(n, tf.float32)[:, tf.newaxis]
    outputs = {"scaled": scaled, "total": tf.reduce_sum(scaled, axis=1), "next": n + 1}
    return {"serving_default": ({"x": x, "n": n}, outputs)}


def scalar(tf):
    """A scalar output: the mean over the whole batch, which must not be mixed with other requests'."""
    x = tf.placeholder(tf.float32, [None], name="x")
    return {"serving_default": ({"x": x}, {"mean": tf.reduce_mean(x)})}


def fixed(tf):
    """A fixed batch axis of two rows."""
    x = tf.placeholder(tf.float32, [2, 3], name="x")
    return {"serving_default": ({"x": x}, {"y": tf.cumsum(x, axis=0)})}


def centered(tf):
    """A free batch axis, but rows that depend on each other: batching would be wrong."""
    x = tf.placeholder(tf.float32, [None, 1], name="x")
    return {"serving_default": ({"x": x}, {"y": x - tf.reduce_mean(x, axis=0, keepdims=True)})}


def picky(tf):
    """Refuses negative numbers; positive ones are halved."""
    x = tf.placeholder(tf.float32, [None], name="x")
    with tf.control_dependencies([tf.debugging.assert_non_negative(x, message="x must not be negative")]):
        return {"serving_default": ({"x": x}, {"y": x / 2})}


def counter(tf):
    """State of one's own: each run of "count" adds one; "read" does not."""
    count = tf.get_variable("count", [], tf.int64, tf.zeros_initializer())
    x = tf.placeholder(tf.int64, [None], name="x")
    with tf.control_dependencies([x]):
        counted = tf.CriticalSection().execute(lambda: tf.identity(count.assign_add(1)))
        read = count.read_value()
    return {"count": ({"x": x}, {"count": counted}), "read": ({"x": x}, {"count": read})}


def dictionary(tf):
    """A table from words to numbers, to which TensorFlow gives a random name."""
    x = tf.placeholder(tf.string, [None], name="x")
    entries = tf.lookup.KeyValueTensorInitializer(["one", "two"], tf.constant([1, 2], tf.int64))
    return {"serving_default": ({"x": x}, {"y": tf.lookup.StaticHashTable(entries, 0).lookup(x)})}


def failing(tf):
    """Signatures that fail, each with another of TensorFlow's error codes, and some whose outputs are no rows."""
    x = tf.placeholder(tf.int32, None, name="x")
    missing = tf.io.read_file(tf.strings.join(["/no/such/file/", tf.strings.as_string(x)]))
    table = tf.raw_ops.HashTableV2(key_dtype=tf.string, value_dtype=tf.int64, shared_name="never filled")
    found = tf.raw_ops.LookupTableFindV2(
        table_handle=table, keys=tf.strings.as_string(x), default_value=tf.constant(0, tf.int64)
    )
    count = tf.get_variable("count", [], tf.int32, tf.zeros_initializer(), use_resource=True)
    end = tf.raw_ops.ResourceCountUpTo(resource=count.handle, limit=0, T=tf.int32) + x
    queue = tf.FIFOQueue(1, tf.int32, [[]], shared_name="closed")
    with tf.control_dependencies([queue.close()]), tf.control_dependencies([queue.enqueue(x)]):
        cancelled = tf.identity(x)
    outputs = {"NOT_FOUND": missing, "FAILED_PRECONDITION": found, "OUT_OF_RANGE": end, "CANCELLED": cancelled}
    return {
        **{code: ({"x": x}, {"y": output}) for code, output in outputs.items()},
        "first_row": ({"x": x}, {"all": tf.identity(x), "first": x[:1]}),
        "no_rows": ({"x": x}, {"a": x[:0], "b": tf.strings.as_string(x)[:0]}),
    }


def peak(tf):
    """The largest number of each row: rows as wide as one likes, and little to write."""
    x = tf.placeholder(tf.float32, [None, None], name="x")
    return {"serving_default": ({"x": x}, {"y": tf.reduce_max(x, axis=1)})}


def line(tf):
    """y = w x + b, to be learned: "train" takes one step of gradient descent on its rows, at a learning rate of 0.5."""
    x, y = (tf.placeholder(tf.float32, [None], name=name) for name in "xy")
    w, b = (tf.get_variable(name, [], initializer=tf.zeros_initializer()) for name in "wb")
    loss = tf.reduce_mean(tf.square(w * x + b - y)) / 2
    step = tf.train.GradientDescentOptimizer(0.5).minimize(loss)
    with tf.control_dependencies([step]):
        trained = tf.identity(loss)
    return {"serving_default": ({"x": x}, {"y": w * x + b}), "train": ({"x": x, "y": y}, {"loss": trained})}


def gate(tf):
    """Answers with the name of a file, when that file exists."""
    path = tf.placeholder(tf.string, [None], name="path")

    def wait(path):
        end = time.monotonic() + 60
        while not os.path.exists(path[0]) and time.monotonic() < end:
            time.sleep(0.01)
        return path

    return {"serving_default": ({"path": path}, {"path": tf.numpy_function(wait, [path], tf.string)})}


def spinning(tf):
    """y = x, but a run with 12345 in it never ends: a loop, as far as TensorFlow may end it."""
    x = tf.placeholder(tf.float32, [None], name="x")
    is_endless = tf.reduce_any(tf.equal(x, 12345))
    y = tf.while_loop(lambda y: is_endless, lambda y: y + 0, [x])
    return {"serving_default": ({"x": x}, {"y": y})}


def asleep(tf):
    """y = x, but a run with 12345 in it never ends: a Python function, which nobody can end."""
    x = tf.placeholder(tf.float32, [None], name="x")

    def sleep(x):
        while 12345 in x:
            time.sleep(1)
        return x

    return {"serving_default": ({"x": x}, {"y": tf.numpy_function(sleep, [x], tf.float32)})}


def napping(tf):
    """y = x, after as many seconds as the first row says."""
    x = tf.placeholder(tf.float32, [None], name="x")
    nap = lambda x: time.sleep(float(x[0])) or x
    return {"serving_default": ({"x": x}, {"y": tf.numpy_function(nap, [x], tf.float32)})}


def announced(tf):
    """y = 2 x; a new file in a folder tells that it is being built."""
    with open(os.path.join(os.environ["RAY_TENSORFLOW_TEST_GATE"], str(os.getpid())), "x"):
        pass
    x = tf.placeholder(tf.float32, [None], name="x")
    return {"serving_default": ({"x": x}, {"y": 2 * x})}


def broken(tf):
    """Cannot be built."""
    raise RuntimeError("this model is broken\nin two lines")


FUNCTIONS = (
    "linear",
    "same_names",
    "echo",
    "several",
    "scalar",
    "fixed",
    "centered",
    "picky",
    "counter",
    "failing",
    "dictionary",
    "line",
    "gate",
)


# -- graphs for tests that start their own servers ---------------------------------------------------------------------


def half_plus_two(tf):
    x = tf.placeholder(tf.float32, [None], name="x")
    return {"serving_default": ({"x": x}, {"y": 0.5 * x + 2})}


def half_plus_remote(tf):
    """y = 0.5x + b, where b is what half_plus_two on this very server makes of 2."""
    from shared_graph.remote_predict_op import remote_predict

    x = tf.placeholder(tf.float32, [None], name="x")
    address = f"127.0.0.1:{os.environ['RAY_TENSORFLOW_TEST_PORT']}"
    (b,) = remote_predict(["x"], [tf.constant([2.0])], ["y"], address, "half_plus_two")
    return {"serving_default": ({"x": x}, {"y": 0.5 * x + b})}


def remote(tf):
    """For each of REMOTE_CASES (JSON: name to arguments) a signature that may fail, and NAME_status that does not."""
    from shared_graph.remote_predict_op import remote_predict

    signatures = {}
    for name, case in json.loads(os.environ["REMOTE_CASES"]).items():
        inputs = {alias: tf.placeholder(dtype, None) for alias, dtype in case.pop("inputs", {"x": "float32"}).items()}
        outputs = case.pop("outputs", {"y": "float32"})
        address = f"127.0.0.1:{os.environ['RAY_TENSORFLOW_TEST_PORT']}"
        case = {"target_address": address, "model_name": "half_plus_two"} | case
        call = functools.partial(
            remote_predict,
            list(inputs),
            list(inputs.values()),
            list(outputs),
            output_types=list(outputs.values()),
            **case,
        )
        code, message, tensors = call(fail_op_on_rpc_error=False)
        signatures[name] = (inputs, dict(zip(outputs, call())))
        signatures[f"{name}_status"] = (inputs, {"code": code, "message": message, **dict(zip(outputs, tensors))})
    return signatures


def crowd(tf):
    """y = x, but to 12345 the answer is how many rows ran together, which the trial of random rows does not see."""
    x = tf.placeholder(tf.float32, [None], name="x")
    count = tf.fill(tf.shape(x), tf.cast(tf.size(x), tf.float32))
    return {"serving_default": ({"x": x}, {"y": tf.where(tf.equal(x, 12345), count, x)})}


def table(tf, rows: int = 1_000_000):
    """An embedding table of 100 columns in two parts: 400 MB."""
    ids = tf.placeholder(tf.int64, [None], name="ids")
    partitioner, initializer = tf.fixed_size_partitioner(2), tf.random_uniform_initializer(seed=1)
    embeddings = tf.get_variable("embeddings", [rows, 100], tf.float32, initializer, partitioner=partitioner)
    return {"serving_default": ({"ids": ids}, {"rows": tf.nn.embedding_lookup(embeddings, ids)})}


def small_table(tf):
    return table(tf, rows=1000)


# -- SavedModels -------------------------------------------------------------------------------------------------------


def write(v1, session, folder: str, signatures: dict) -> None:
    """A SavedModel of TF1, with its tables and their files."""
    builder = v1.saved_model.Builder(folder)
    builder.add_meta_graph_and_variables(
        session,
        ["serve"],
        main_op=v1.tables_initializer(),
        assets_collection=v1.get_collection(v1.GraphKeys.ASSET_FILEPATHS),
        signature_def_map={name: v1.saved_model.predict_signature_def(*sides) for name, sides in signatures.items()},
    )
    builder.save()


def save_words(tf, folder: str) -> None:
    """TF1: text to number and back by tables with a vocabulary in assets; two versions, of which the higher counts."""
    v1, vocabulary = tf.compat.v1, folder + ".txt"
    line, number_of_line = tf.lookup.TextFileIndex.WHOLE_LINE, tf.lookup.TextFileIndex.LINE_NUMBER
    for version, words in ((2, "old\n"), (10, "zero\none\ntwo\n")):
        with open(vocabulary, "w") as file:
            file.write(words)
        with v1.Graph().as_default(), v1.Session() as session:
            to_number = tf.lookup.StaticVocabularyTable(
                tf.lookup.TextFileInitializer(vocabulary, tf.string, line, tf.int64, number_of_line), 1
            )
            to_word = tf.lookup.StaticHashTable(
                tf.lookup.TextFileInitializer(vocabulary, tf.int64, number_of_line, tf.string, line), "?"
            )
            word, number = v1.placeholder(tf.string, [None]), v1.placeholder(tf.int64, [None])
            v1.add_to_collection(v1.GraphKeys.ASSET_FILEPATHS, v1.constant(vocabulary))
            signatures = {
                "serving_default": ({"word": word}, {"number": to_number.lookup(word)}),
                "back": ({"number": number}, {"word": to_word.lookup(number)}),
                "upper": ({"word": word}, {"word": tf.strings.upper(word), "length": tf.strings.length(word)}),
            }
            session.run(v1.tables_initializer())
            write(v1, session, os.path.join(folder, str(version)), signatures)


def save_picture(tf, folder: str) -> None:
    """Keras: a small convolutional network, by ``export``."""
    tf.keras.utils.set_random_seed(1)
    layers = tf.keras.layers
    model = tf.keras.Sequential(
        [
            tf.keras.Input((28, 28, 1)),
            layers.Conv2D(8, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(16, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(10, activation="softmax"),
        ]
    )
    model.export(os.path.join(folder, "3"), verbose=False)


def save_affine(tf, folder: str) -> None:
    """TF2: a module with a variable and two signatures."""
    module = tf.Module()
    module.w = tf.Variable([[2.0], [-1.0]])

    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32, name="x")])
    def serve(x):
        return {"y": x @ module.w}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int32, name="n")])
    def double(n):
        return {"twice": n * 2}

    tf.saved_model.save(module, os.path.join(folder, "1"), signatures={"serving_default": serve, "double": double})


def save_scores(tf, folder: str) -> None:
    """TF1: signatures for classify and regress, on examples with two floats x and a name."""
    v1 = tf.compat.v1
    with v1.Graph().as_default(), v1.Session() as session:
        inputs, x = v1.placeholder(tf.string, [None]), v1.placeholder(tf.float32, [None])
        features = {"x": tf.io.FixedLenFeature([2], tf.float32), "name": tf.io.FixedLenFeature([], tf.string, "")}
        parsed = tf.io.parse_example(inputs, features)
        scores, name = parsed["x"], parsed["name"][:, tf.newaxis]
        classes = tf.concat([name + "-a", name + "-b"], axis=1)

        def signature(method, inputs, outputs):
            sides = [{k: v1.saved_model.build_tensor_info(v) for k, v in side.items()} for side in (inputs, outputs)]
            return v1.saved_model.build_signature_def(*sides, f"tensorflow/serving/{method}")

        builder = v1.saved_model.Builder(os.path.join(folder, "1"))
        builder.add_meta_graph_and_variables(
            session,
            ["serve"],
            signature_def_map={
                "serving_default": signature("predict", {"x": x}, {"y": x * 2}),
                "classify": signature("classify", {"inputs": inputs}, {"classes": classes, "scores": scores}),
                "regress": signature("regress", {"inputs": inputs}, {"outputs": tf.reduce_sum(scores, axis=1)}),
            },
        )
        builder.save()


def save_numbered(tf, folder: str, versions: int = 12) -> None:
    """TF1: versions, each of which answers its number: of a reference variable, a table's file, its graph."""
    v1, line = tf.compat.v1, tf.lookup.TextFileIndex.LINE_NUMBER
    for version in range(1, versions + 1):
        with open(folder + ".txt", "w") as file:
            file.write(f"{version}\n")
        with v1.Graph().as_default(), v1.Session() as session:
            x, by = v1.placeholder(tf.float32, [None]), v1.placeholder(tf.int32, [])
            number = v1.get_variable("number", initializer=float(version), use_resource=False)
            count = v1.get_variable("count", initializer=100 * version, use_resource=True)
            table = tf.lookup.StaticHashTable(
                tf.lookup.TextFileInitializer(
                    folder + ".txt", tf.int64, line, tf.string, tf.lookup.TextFileIndex.WHOLE_LINE
                ),
                "?",
            )
            v1.add_to_collection(v1.GraphKeys.ASSET_FILEPATHS, v1.constant(folder + ".txt"))
            word = table.lookup(tf.zeros(tf.shape(x), tf.int64))
            outputs = {"number": 0 * x + number, "word": word, "constant": tf.cast(0 * x, tf.int32) + version}
            signatures = {"serving_default": ({"x": x}, outputs)}
            if os.path.basename(folder) == "counting":
                signatures["count"] = {"by": by}, {"count": tf.identity(count.assign_add(by))}
            session.run([v1.global_variables_initializer(), v1.tables_initializer()])
            write(v1, session, os.path.join(folder, str(version)), signatures)


SAVED = {
    "words": save_words,
    "picture": save_picture,
    "affine": save_affine,
    "scores": save_scores,
    "numbered": save_numbered,
    "counting": functools.partial(save_numbered, versions=2),
}


def save(folder: str) -> dict[str, str]:
    """Save all of these under a folder, in a process of its own that ends with its TensorFlow; name to folder."""
    subprocess.run([sys.executable, __file__, folder], check=True, capture_output=True)
    return {name: os.path.join(folder, name) for name in SAVED}


if __name__ == "__main__":
    import tensorflow

    for name, function in SAVED.items():
        function(tensorflow, os.path.join(sys.argv[1], name))


# -- what a plain session answers --------------------------------------------------------------------------------------


class PlainSession:
    """The reference: one source in an ordinary in-process session, run as TensorFlow's own tutorials do."""

    def __init__(self, source: str):
        from shared_graph.options import Options
        from shared_graph.tensorflow_runtime import import_tensorflow

        tf, [source] = import_tensorflow(whole=True), Options(model=source).model
        _, source = max(source.versions().items())
        self.graph = tf.Graph()
        with self.graph.as_default():
            self.session = tf.Session()
            if source.folder:
                definitions = tf.saved_model.load(self.session, ["serve"], source.folder).signature_def
                signatures = {name: (d.inputs, d.outputs) for name, d in definitions.items()}
            else:
                module, _, function = source.function.partition(":")
                signatures = getattr(importlib.import_module(module), function)(tf)
                self.session.run([tf.global_variables_initializer(), tf.tables_initializer()])
        self.names = {  # of the tensors by that of the signature: inputs, outputs
            signature: [{key: tensor.name for key, tensor in side.items()} for side in sides]
            for signature, sides in signatures.items()
        }

    def predict(self, inputs: dict, signature: str = "serving_default") -> dict:
        feeds, fetches = self.names[signature]
        return self.session.run(fetches, {feeds[name]: value for name, value in inputs.items()})
