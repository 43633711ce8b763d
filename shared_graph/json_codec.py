"""JSON values to arrays and back."""

from __future__ import annotations

import base64
import json
import re
import zlib
from typing import Any

import numpy as np

from shared_graph.errors import InvalidRequest, first_sentence
from shared_graph.models import objects

MAX_BODY_BYTES = 64 * 2**20
SLICE = 50_000  # numbers that are made JSON at once: Python's lock is held meanwhile


def parse_json(body: bytes, is_gzip: bool = False) -> dict[str, Any]:
    """A JSON object, with NaN and Infinity as bare tokens. Raises InvalidRequest."""
    try:
        if is_gzip:
            unzip = zlib.decompressobj(zlib.MAX_WBITS | 16)
            body = unzip.decompress(body, MAX_BODY_BYTES)
            if unzip.unconsumed_tail:
                raise InvalidRequest(f"The body is larger than {MAX_BODY_BYTES // 2**20} MiB", 413)
        document = json.loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError, zlib.error) as error:
        raise InvalidRequest(f"The body is not JSON that can be read: {first_sentence(error)}") from None
    if not isinstance(document, dict):
        raise InvalidRequest(f"The body must be a JSON object, not {shown(document)}")
    return document


def shown(value: Any) -> str:
    """A JSON value in an error message, cut short."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        text = "(something nested deeply)"
    return text if len(text) <= 100 else text[:100] + "..."


JSON_TYPES = {  # by the kind of a dtype (V is bfloat16): what its elements may be
    "b": ((bool,), "true or false"),
    "i": ((int,), "a whole number"),
    "u": ((int,), "a whole number"),
    "O": ((str, dict), 'a text or {"b64": "..."}'),
    "f": ((int, float), "a number"),
    "V": ((int, float), "a number"),
}


def parse_tensor(where: str, value: Any, dtype: np.dtype) -> np.ndarray:
    """A nested list, or a scalar, to an array. Raises InvalidRequest."""
    if dtype.kind not in JSON_TYPES:
        raise InvalidRequest(f"{where}: {dtype} cannot be given as JSON", 501)
    types, expected = JSON_TYPES[dtype.kind]
    elements = np.array(value, object)  # as deep as all its lists have the same length
    flat = elements.ravel().tolist()
    texts = list(map(parse_string, flat)) if dtype == object else ()
    try:
        if list in map(type, flat):
            sizes = [len(element) if isinstance(element, list) else None for element in flat]
            wrong, expected = [size != sizes[0] for size in sizes], f"a list of {sizes[0]}" if sizes[0] else expected
        elif texts:
            wrong = [text is None for text in texts]
        elif not set(map(type, flat)) <= set(types):
            wrong = [type(element) not in types for element in flat]
        else:
            with np.errstate(over="ignore"):
                return np.array(flat, dtype if dtype.kind in "biu" else float).astype(dtype).reshape(elements.shape)
    except OverflowError:  # a number of hundreds of digits, or one that the dtype does not have
        if dtype.kind not in "iu":
            return np.array([float(str(element)) for element in flat]).astype(dtype).reshape(elements.shape)
        limits, expected = np.iinfo(dtype), f"a whole number that {dtype} has"
        wrong = [not limits.min <= element <= limits.max for element in flat]
    if dtype == object and True not in wrong:
        return objects(texts).reshape(elements.shape)
    index = wrong.index(True) if True in wrong else 0
    place = "".join(f"[{i}]" for i in np.unravel_index(index, elements.shape))
    raise InvalidRequest(f"{where}{place}: expected {expected}, got {shown(flat[index])}")


def parse_string(value: Any) -> bytes | None:
    """The bytes of a text or of ``{"b64": "..."}``; None if it is neither."""
    try:
        if isinstance(value, str):
            return value.encode()
        [text] = value.values() if value.keys() == {"b64"} else ()
        text = re.sub(r"\s", "", text, flags=re.A)
        return base64.b64decode(text if "=" in text else text + "=" * (-len(text) % 4), validate=True)
    except (AttributeError, TypeError, ValueError):
        return None


def json_text(array: np.ndarray) -> str:
    """Nested lists, made in slices."""
    if array.size <= SLICE or not array.ndim:
        return json.dumps(array.tolist(), ensure_ascii=False)
    step = SLICE * len(array) // array.size
    slices = (
        (json_text(array[i : i + step])[1:-1] for i in range(0, len(array), step)) if step else map(json_text, array)
    )
    return "[" + ", ".join(slices) + "]"


def plain(array: np.ndarray, name: str) -> np.ndarray:
    """An output of this name with elements that JSON has, for a whole batch at once, since numpy's calls are dear."""
    if array.dtype == object and name.endswith("_bytes"):
        return objects({"b64": base64.b64encode(v).decode()} for v in array.flat).reshape(array.shape)
    if array.dtype == object:
        return objects(v.decode("utf-8", "surrogateescape") for v in array.flat).reshape(array.shape)
    if array.dtype.kind in "fV" and array.itemsize < 8:
        return shortest(array)
    if array.dtype.kind not in "fbiu":
        raise InvalidRequest(f"Output {name!r} is of type {array.dtype}, which JSON does not have", 501)
    return array


def shortest(array: np.ndarray) -> np.ndarray:
    """Float64 with the same few decimals that the narrower floats have: 0.1, and not 0.10000000149011612."""
    result = np.full(array.shape, np.nan)
    with np.errstate(all="ignore"):
        if array.dtype == np.float32:  # tried on all at once, which is twelve times faster
            wide = array.astype(np.float64)
            magnitude = np.floor(np.log10(np.abs(wide)))
            for digits in (6, 7, 8, 9):
                scale = 10.0 ** (digits - 1 - magnitude)
                near = np.where(scale >= 1, np.rint(wide * scale) / scale, np.rint(wide * scale) * (1 / scale))
                is_found = np.isnan(result) & (np.abs(magnitude) < 10) & (near.astype(np.float32) == array)
                result[is_found] = near[is_found]
    left = np.isnan(result)
    result[left] = [float(str(value)) for value in array[left]]
    return result
