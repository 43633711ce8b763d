"""Another server's model as an operation of one's own graph."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
import urllib.parse

import numpy as np

from shared_graph.errors import DeadlineExceeded, Error, InvalidRequest, ModelError, Unavailable, first_sentence
from shared_graph.json_codec import json_ready, json_text, load, parse_tensor
from shared_graph.models import Arrays, array_of
from shared_graph.tensorflow_runtime import import_tensorflow

# HTTP status to tensorflow::error::Code, where a server of TensorFlow Serving's REST contract answered with an error
ERROR_CODES = {400: 3, 401: 16, 403: 7, 404: 5, 409: 10, 413: 3, 429: 8, 499: 1, 501: 12, 502: 14, 503: 14, 504: 4}


def remote_predict(
    input_tensor_aliases: list[str],
    input_tensors: list,
    output_tensor_aliases: list[str],
    target_address: str,
    model_name: str,
    model_version: int = -1,
    max_rpc_deadline_millis: int = 3000,
    output_types: list | None = None,
    name: str = "remote_predict",
    signature_name: str = "serving_default",
    fail_op_on_rpc_error: bool = True,
):
    """In a graph: the outputs of a model at ``target_address`` ("host:port"), a server of TensorFlow Serving's REST.

    Returns the output tensors, of ``output_types`` (float32 if not given) and unknown shape; a run fails when the call
    does. With ``fail_op_on_rpc_error=False`` returns (status_code, status_error_message, output tensors) and never
    fails because of the call: the code is an int32 ``tensorflow::error::Code``, 0 for success, and outputs are zeros or
    empty strings after an error. ``model_version`` -1 is the latest. The deadline is one for the whole call.

    Source: tensorflow_serving/experimental/tensorflow/ops/remote_predict. Raises ValueError when lengths do not agree.
    """
    tf = import_tensorflow(is_ours=False)
    types = [tf.as_dtype(dtype) for dtype in output_types or [tf.float32] * len(output_tensor_aliases)]
    if not model_name:
        raise ValueError("model_name must be specified.")
    if not target_address.rpartition(":")[2].isdecimal():
        raise ValueError(f"target_address must be host:port, not {target_address}")
    sides = {"input_tensors": (input_tensor_aliases, input_tensors), "output_types": (output_tensor_aliases, types)}
    for kind, (aliases, there) in sides.items():
        if len(aliases) != len(there):
            raise ValueError(f"{len(aliases)} aliases do not fit {len(there)} {kind}")
    dtypes = {alias: np.dtype(t.as_numpy_dtype) for alias, t in zip(output_tensor_aliases, types)}
    path = f"/v1/models/{urllib.parse.quote(model_name, safe='')}"
    path += f"/versions/{model_version}" if model_version >= 0 else ""

    def call(*inputs):
        named = dict(zip(input_tensor_aliases, map(array_of, inputs)))
        asked = target_address, path, signature_name, named, dtypes, max_rpc_deadline_millis / 1000
        try:
            return [np.int32(0), b"", *call_remote(*asked)]
        except Error as error:
            if fail_op_on_rpc_error:
                raise RuntimeError(f"HTTP {error.status}: {error}") from None
            return [np.int32(ERROR_CODES.get(error.status, 13)), str(error).encode(), *map(nothing, dtypes.values())]

    code, message, *outputs = tf.numpy_function(call, input_tensors, [tf.int32, tf.string, *types], name=name)
    for scalar in (code, message):
        scalar.set_shape([])
    return outputs if fail_op_on_rpc_error else (code, message, outputs)


def nothing(dtype: np.dtype) -> np.ndarray:
    return np.array(b"", object) if dtype == object else np.zeros((), dtype)


def call_remote(
    address: str, path: str, signature_name: str, inputs: Arrays, dtypes: dict[str, np.dtype], seconds: float
) -> list[np.ndarray]:
    """The outputs of one predict over REST. Raises Error whatever goes wrong, the server's own if there is one."""
    deadline = time.monotonic() + seconds
    try:
        document = json.loads(request_http(address, "GET", f"{path}/metadata", None, deadline))
        signature = document["metadata"]["signature_def"]["signature_def"].get(signature_name)
        if signature is None:
            raise InvalidRequest(f'Serving signature name: "{signature_name}" not found in signature def')
        if inputs.keys() != signature["inputs"].keys() or dtypes.keys() - signature["outputs"].keys():
            there = [sorted(signature[side]) for side in ("inputs", "outputs")]
            raise InvalidRequest(f"aliases {sorted(inputs)} and {sorted(dtypes)} do not fit {there[0]} and {there[1]}")
        columns = {name: json_ready(array, "_bytes") for name, array in inputs.items()}
        body = json_text({"signature_name": signature_name, "inputs": columns})
        outputs = load(request_http(address, "POST", f"{path}:predict", body, deadline))["outputs"]
        named = outputs if len(signature["outputs"]) > 1 else dict.fromkeys(signature["outputs"], outputs)
        return [parse_tensor(name, named[name], dtype) for name, dtype in dtypes.items()]
    except Error:
        raise
    except TimeoutError:
        raise DeadlineExceeded(f"{address} did not answer within {seconds * 1000:g} ms") from None
    except OSError as error:
        raise Unavailable(f"{address} cannot be reached: {error.strerror or error}") from None
    except Exception as error:
        raise ModelError(f"{address} does not answer as it should: {first_sentence(error)}") from None


def request_http(address: str, method: str, path: str, body: bytes | None, deadline: float) -> bytes:
    """The body of a 200 answer. Raises Error with status and message of another, TimeoutError, OSError."""
    host, _, port = address.rpartition(":")
    left = max(0.001, deadline - time.monotonic())
    with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=left)) as connection:
        connection.request(method, path, body)
        response = connection.getresponse()
        text = response.read()
    if time.monotonic() >= deadline:
        raise TimeoutError
    if response.status != 200:
        if not 400 <= response.status < 600:
            raise ValueError(f"with status {response.status}")
        raise Error(json.loads(text).get("error", "no reason was given"), response.status)
    return text
