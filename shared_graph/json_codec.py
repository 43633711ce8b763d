"""JSON to arrays and back: how bodies are read and answers written, and the only module that knows orjson.

orjson does both. Where it refuses what we take (NaN and Infinity, a byte order mark, half a surrogate pair, numbers
past a double) or would read something else (whole numbers past 64 bits become floats), the standard library reads.
``json_ready`` prepares what orjson would write otherwise: floats not finite or of 16 bits, strings not in UTF-8.

How many values a document may have is held on its bytes, before an object is made of them, and so for either parser.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import re
from typing import Any

import numpy as np
import orjson

from shared_graph.errors import InvalidRequest, first_sentence

MAX_VALUES = 4_000_000  # commas, colons and opening brackets; strings and lists count two more, objects three more
MAX_AXES = 64  # numpy's

# -- reading -----------------------------------------------------------------------------------------------------------

# What is left of a body when all that is before a value is a comma, and all digits and minus signs are zeros
OUTLINE = bytes.maketrans(b",:[{ \t\r\n-0123456789", b",,,,,,,,00000000000")
LONG_NUMBER = b"," + b"0" * 20  # the shortest integers past 64 bits: 20 digits, or a minus and 19


def parse_json(body: bytes) -> dict[str, Any]:
    """A JSON object, with NaN and Infinity as bare tokens. Raises InvalidRequest."""
    try:
        document = load_exactly(body) if survey(body) else load(body)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not JSON that can be read: byte {error.start} of it is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else first_sentence(error)
        raise InvalidRequest(f"The body is not JSON that can be read: {why}") from None
    if not isinstance(document, dict):
        raise InvalidRequest(f"The body must be a JSON object, not {excerpt(document)}")
    return document


def survey(body: bytes) -> bool:
    """May there be integers past 64 bits? Raises InvalidRequest where there are too many values."""
    outline = body.translate(OUTLINE)
    if len(body) > MAX_VALUES // 4:
        count = count_of(outline, b",") + count_of(body, b'"') + 2 * count_of(body, b"[") + 3 * count_of(body, b"{")
        if count > MAX_VALUES:
            count -= sum(count_of(body, blank) for blank in (b" ", b"\t", b"\r", b"\n"))
        if count > MAX_VALUES:
            raise InvalidRequest(f"The body has more than {MAX_VALUES:,} values", 413)
    return LONG_NUMBER in outline


def count_of(text: bytes, byte: bytes) -> int:
    """``text.count(byte)`` in a seventh of the time."""
    return int(np.count_nonzero(np.frombuffer(text, np.uint8) == ord(byte)))


def load(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return load_exactly(body)


def load_exactly(body: bytes) -> Any:
    """With whole numbers of any size. Raises ValueError, RecursionError."""
    return json.loads(body.decode("utf-8-sig"))


def excerpt(value: Any) -> str:
    """A JSON value in an error message, cut short: no more of it is made text than is shown."""
    text = ""
    with contextlib.suppress(RecursionError):
        for part in json.JSONEncoder(ensure_ascii=False).iterencode(value):
            text += part
            if len(text) > 100:
                return text[:100] + "..."
        return text
    return "(something nested deeply)"


JSON_TYPES = {  # by the kind of a dtype (V is bfloat16): what its elements may be
    "b": ({bool}, "true or false"),
    "i": ({int}, "a whole number"),
    "u": ({int}, "a whole number"),
    "O": ({str, dict}, 'a string or {"b64": "..."}'),
    "f": ({int, float}, "a number"),
    "V": ({int, float}, "a number"),
}


def parse_tensor(where: str, value: Any, dtype: np.dtype) -> np.ndarray:
    """A nested list, or a scalar, to an array. Raises InvalidRequest."""
    if dtype.kind not in JSON_TYPES:
        raise InvalidRequest(f"{where}: {dtype} cannot be given as JSON", 501)
    shape, flat, types = flatten(value)
    array = to_vector(flat, types, dtype) if types <= JSON_TYPES[dtype.kind][0] else None
    if array is None:
        raise refusal(where, shape, flat, types, dtype)
    return array.reshape(shape)


def flatten(value: Any) -> tuple[tuple[int, ...], list[Any], set[type]]:
    """Shape, elements in a row and their types: as deep as all lists beside each other are of one length."""
    shape: list[int] = []
    flat, types = [value], {type(value)}
    while types == {list} and len(shape) < MAX_AXES and len(lengths := set(map(len, flat))) == 1:
        shape += lengths
        rows, flat = flat, []
        for row in rows:
            flat += row  # half the time of itertools.chain where rows are short
        types = set(map(type, flat))
    return tuple(shape), flat, types


def to_vector(flat: list[Any], types: set[type], dtype: np.dtype) -> np.ndarray | None:
    """None if there is a value that the dtype does not have."""
    if dtype == object:
        if types == {str}:
            with contextlib.suppress(UnicodeEncodeError):
                return np.fromiter(map(str.encode, flat), object)
        strings = list(map(parse_string, flat))
        return None if None in strings else np.fromiter(strings, object)
    with np.errstate(over="ignore"):
        try:
            return np.array(flat, dtype if dtype.kind in "biu" else float).astype(dtype, copy=False)
        except OverflowError:  # a number of hundreds of digits, or one that the dtype does not have
            if dtype.kind in "iu":
                return None
            return np.array([float(str(element)) for element in flat]).astype(dtype)


def refusal(where: str, shape: tuple[int, ...], flat: list[Any], types: set[type], dtype: np.dtype) -> InvalidRequest:
    """The error that names the place of the first element which cannot be taken."""
    allowed, expected = JSON_TYPES[dtype.kind]
    if list in types:
        sizes = [len(element) if isinstance(element, list) else None for element in flat]
        wrong = (size != sizes[0] for size in sizes)
        if len({*sizes}) == 1:
            expected = f"at most {MAX_AXES} axes"
        elif sizes[0]:
            expected = f"a list of {sizes[0]}"
    elif dtype == object:
        wrong = (parse_string(element) is None for element in flat)
    elif not types <= allowed:
        wrong = (type(element) not in allowed for element in flat)
    else:
        limits, expected = np.iinfo(dtype), f"a whole number that {dtype} has"
        wrong = (not limits.min <= element <= limits.max for element in flat)
    index = next((index for index, is_wrong in enumerate(wrong) if is_wrong), 0)
    place = "".join(f"[{i}]" for i in np.unravel_index(index, shape))
    if dtype == object and list not in types:
        expected = string_problem(flat[index]) or expected
    return InvalidRequest(f"{where}{place}: expected {expected}, got {excerpt(flat[index])}")


def string_problem(value: Any) -> str | None:
    """What is expected of a value that is meant as a string and is none; None if it is meant as something else."""
    if isinstance(value, str):
        return "a string without half of a surrogate pair"
    if isinstance(value, dict) and value.keys() == {"b64"} and isinstance(value["b64"], str):
        return 'base64 in {"b64": "..."}'
    return None


def parse_string(value: Any) -> bytes | None:
    """The bytes of a string or of ``{"b64": "..."}``; None if it is neither."""
    try:
        if isinstance(value, str):
            return value.encode()
        [text] = value.values() if value.keys() == {"b64"} else ()
        with contextlib.suppress(binascii.Error):
            return binascii.a2b_base64(text, strict_mode=True)
        text = re.sub(r"\s", "", text, flags=re.A)
        return base64.b64decode(text if "=" in text else text + "=" * (-len(text) % 4), validate=True)
    except (AttributeError, TypeError, ValueError):
        return None


# -- writing -----------------------------------------------------------------------------------------------------------

NOT_A_NUMBER, INFINITE, MINUS_INFINITE = map(orjson.Fragment, (b"NaN", b"Infinity", b"-Infinity"))


def json_text(value: Any) -> bytes:
    """Lists, objects by name and arrays, as ``json_ready`` makes them, in any nesting, as one document."""
    return orjson.dumps(value, default=as_list, option=orjson.OPT_SERIALIZE_NUMPY)


def as_list(array: np.ndarray) -> Any:
    """What orjson does not take as an array: one of objects, or a scalar."""
    return array.tolist() if array.ndim else array[()]


def json_ready(array: np.ndarray, name: str) -> np.ndarray:
    """An output of this name as ``json_text`` takes it, for a whole batch at once, since numpy's calls are dear.

    Numbers stay the array that they are, but for floats of 16 bits (float64 with the same few decimals) and for those
    of which one is not finite. Raises InvalidRequest.
    """
    if array.dtype == object:
        flat = array.ravel().tolist()
        values = [{"b64": base64.b64encode(v).decode()} for v in flat] if name.endswith("_bytes") else decoded(flat)
        return np.fromiter(values, object).reshape(array.shape)
    if array.dtype.kind not in "biufV":
        raise InvalidRequest(f"Output {name!r} is of type {array.dtype}, which JSON does not have", 501)
    array = np.asarray(array, array.dtype.newbyteorder("="), order="C")
    if array.dtype.kind in "fV" and array.itemsize < 4:
        array = shortest(array)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return with_tokens(array)
    return array


def decoded(strings: list[bytes]) -> list[Any]:
    """As JSON strings; what is not UTF-8 passes as it is."""
    try:
        return list(map(bytes.decode, strings))
    except UnicodeDecodeError:
        texts = (json.dumps(string.decode("utf-8", "surrogateescape"), ensure_ascii=False) for string in strings)
        return [orjson.Fragment(text.encode("utf-8", "surrogateescape")) for text in texts]


def shortest(array: np.ndarray) -> np.ndarray:
    """Float64 with the same few decimals as floats of 16 or 8 bits have, of which there are only so many."""
    numbers, places = np.unique(array.reshape(-1).view(f"u{array.itemsize}"), return_inverse=True)
    decimals = np.array([float(str(number)) for number in numbers.view(array.dtype)], np.float64)
    return decimals[places].reshape(array.shape)


def with_tokens(array: np.ndarray) -> np.ndarray:
    """Objects: numbers with the decimals that orjson gives to their dtype, and what JSON only has as bare tokens."""
    flat = array.reshape(-1)
    result = np.fromiter(orjson.loads(orjson.dumps(flat, option=orjson.OPT_SERIALIZE_NUMPY)), object)
    result[np.isnan(flat)] = NOT_A_NUMBER
    result[flat == np.inf] = INFINITE
    result[flat == -np.inf] = MINUS_INFINITE
    return result.reshape(array.shape)
