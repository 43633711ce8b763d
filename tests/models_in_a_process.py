"""Loads and runs models in this process, with TensorFlow imported in one of three ways; prints what came as JSON.

    python models_in_a_process.py slim|whole|on_top NAME=SOURCE ...

Of each model: the fingerprint of its files, its metadata, and for each signature what it says of itself and a hash of
all its outputs for the same random rows, on a server as a parameter server has it; or the sentence of its failure.
"""

import hashlib
import json
import os
import sys

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]

from shared_graph import tensorflow_runtime  # noqa: E402
from shared_graph.errors import first_sentence  # noqa: E402
from shared_graph.graph import Graph  # noqa: E402
from shared_graph.merging import find_batchable, sample_rows  # noqa: E402
from shared_graph.model_source import ADDER_SOURCE  # noqa: E402
from shared_graph.options import Options  # noqa: E402
from shared_graph.rest_api import serialize_example  # noqa: E402

RIDE = {
    "trip_miles": 1.0, "fare": 2.0, "trip_start_month": 3, "trip_start_hour": 4, "trip_start_day": 5,
    "trip_start_timestamp": 6, "pickup_latitude": 41.0, "pickup_longitude": -87.0, "dropoff_latitude": 41.0,
    "dropoff_longitude": -87.0, "trip_seconds": 60, "payment_type": "Cash", "company": "x"}  # fmt: skip


def bytes_of(array: np.ndarray) -> bytes:
    return repr(array.tolist()).encode() if array.dtype == object else array.tobytes()


def run(graph, signature, feed) -> list:
    """For each output dtype, shape and a hash; or what it failed with."""
    try:
        outputs = graph.run(signature.name, feed)
    except Exception as error:
        return [type(error).__name__, str(error), getattr(error, "status", None)]
    return [[str(a.dtype), a.shape, hashlib.sha256(bytes_of(a)).hexdigest()] for a in outputs]


def example(features: dict) -> bytes:
    """Always the same bytes, which a map of protobuf's has not by itself."""
    parsed = tensorflow_runtime.import_tensorflow().train.Example.FromString(serialize_example("x", features))
    return parsed.SerializeToString(deterministic=True)


def feeds(signature) -> list:
    for rows in (1, 3):
        yield sample_rows(signature, rows)
    if [spec.dtype for spec in signature.inputs.values()] == ["object"]:
        yield [np.fromiter([example(RIDE)] * 2, object)]
        yield [np.fromiter([example({"x": [1.0, 2.0], "name": "a"})], object)]


def answers(tf, server: str, source) -> dict:
    try:
        graph = Graph(tf, source)
        options = Options()
        mirror = Graph(tf, source, ps_tasks=0)
        graph.connect([server], options)
        graph.restore({})
        mirror.connect([], options)
        mirror.restore(graph.variables.get_weights())
        about = {"fingerprint": source.folder and graph.fingerprint, "metadata": graph.metadata()}
        about["batchable"] = find_batchable(graph, options)
        about["weights"] = {
            n: hashlib.sha256(bytes_of(a)).hexdigest() for n, a in graph.variables.get_weights().items()
        }
        for which, it in (("shared", graph), ("mirrored", mirror)):
            for signature in it.signatures.values():
                about[f"{which} {signature.name}"] = [str(signature)] + [
                    run(it, signature, feed)
                    for feed in feeds(signature)
                    if not signature.runs_python and not signature.refusal and source.name != "gate"
                ]
        graph.free()
        return about
    except Exception as error:
        return {"error": [type(error).__name__, first_sentence(error)]}


def main() -> None:
    how, *sources = sys.argv[1:]
    tf = tensorflow_runtime.import_tensorflow(whole=how == "whole")
    config = tensorflow_runtime.server_config(tf, Options(), False)
    server = tf.train.Server({"boot": ["localhost:0"]}, job_name="boot", task_index=0, config=config)
    if how == "on_top":
        tf = tensorflow_runtime.import_tensorflow(whole=True)
    found = {"adder": answers(tf, server.target.removeprefix("grpc://"), ADDER_SOURCE)}
    for source in Options(model=tuple(sources)).model:
        try:
            _, source = max(source.versions().items())
        except Exception as error:
            found[source.name] = {"error": str(error)}
            continue
        found[source.name] = answers(tf, server.target.removeprefix("grpc://"), source)
    modules = [name for name in sys.modules if name.startswith("tensorflow")]
    is_bare = "__path__" not in vars(sys.modules["tensorflow"])
    print(json.dumps({"models": found, "modules": len(modules), "is_bare": is_bare}, default=str))
    sys.stdout.flush()
    os._exit(0)


main()
