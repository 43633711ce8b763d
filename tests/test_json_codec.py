"""JSON to arrays and back: every value by its dtype, wrong ones by their place, and both libraries side by side."""

import base64
import decimal
import json
import math
import random
import re
import time

import numpy as np
import pytest

from shared_graph.errors import InvalidRequest, first_sentence
from shared_graph.json_codec import (
    LONG_NUMBER,
    MAX_VALUES,
    OUTLINE,
    excerpt,
    json_ready,
    json_text,
    load,
    load_exactly,
    parse_json,
    parse_string,
    parse_tensor,
)

INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
FLOATS = ("float16", "float32", "float64")
nan, inf = math.nan, math.inf


def column(text: str, dtype: str) -> np.ndarray:
    """The array that a JSON value becomes."""
    return parse_tensor("inputs", parse_json(f'{{"inputs": {text}}}'.encode())["inputs"], np.dtype(dtype))


def strings(values) -> np.ndarray:
    array = np.empty(np.shape(values), object)
    array[...] = values
    return array


def written(array, name: str = "y") -> bytes:
    """The JSON of an output of this name."""
    return json_text(json_ready(np.asarray(array), name))


def refused(where: str, function, *arguments, status: int = 400, **more) -> None:
    """Calling it is answered with this status and with one sentence, not too long, that has this in it."""
    with pytest.raises(InvalidRequest) as caught:
        function(*arguments, **more)
    assert caught.value.status == status
    assert where in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def assert_same(array: np.ndarray, expected, dtype: str) -> None:
    """Equal in dtype, shape and values, the sign of zero included."""
    expected = strings(expected) if dtype == "object" else np.array(expected, dtype)
    assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(array, expected)
    if dtype in FLOATS:
        np.testing.assert_array_equal(np.signbit(array), np.signbit(expected))


# -- reading -----------------------------------------------------------------------------------------------------------

NO_JSON = [
    b"", b" ", b"instances = [1, 2]", b'{"instances": [nan]}', b'{"instances": [1,]}', b'{"instances": [1]',
    b'{"instances": [1]} {}', b'{"x": "\xff", "instances": [1]}', b"\xff\xfe{\0}\0", b"[" * 100_000,
    b'{"instances": [' + b"1" * 5_000 + b"]}", '{"instances": [1]}'.encode("utf-16"), b'{"a": "\1"}', b'{"a": 01}',
    b'{"a": ' * 5_000 + b"1" + b"}" * 5_000]  # fmt: skip
NO_OBJECT = [b"[]", b"1", b'"instances"', b"null", b"NaN", json.dumps([1] * 10_000).encode(), b"1" * 30]


@pytest.mark.parametrize(
    "body, words", [*((body, "JSON") for body in NO_JSON), *((body, "object") for body in NO_OBJECT)]
)
def test_what_is_not_json_or_no_object_is_refused(body, words):
    refused(words, parse_json, body)


LISTS, OBJECTS = b'{"x": [[]' + b",[]" * (MAX_VALUES // 2), b'{"x": [{}' + b",{}" * (MAX_VALUES // 5)
KEYS = b'{"x": 1' + b"".join(b',"%d":1' % i for i in range(MAX_VALUES // 3))


@pytest.mark.parametrize("body", [
    LISTS + b"]}", LISTS + b",NaN]}", LISTS, OBJECTS + b"]}", b'{"x": [0' + b",0" * MAX_VALUES + b"]}", KEYS + b"}",
    b"[" * (MAX_VALUES + 1), b'{"x": ["a"' + b',"a"' * (MAX_VALUES // 2) + b"]}"],
    ids=["lists", "NaN among them", "no JSON", "objects", "numbers", "keys", "depth", "strings"])  # fmt: skip
def test_more_values_than_can_be_held_are_counted_and_not_made(body):
    begun = time.thread_time()
    refused(f"{MAX_VALUES:,} values", parse_json, body, status=413)
    assert time.thread_time() - begun < 2


@pytest.mark.parametrize("comma", [b",", b", ", b" ,\n\t"])
def test_as_many_values_as_are_allowed_are_read(comma):
    body = b'{"x": [0' + (comma + b"0") * (MAX_VALUES - 10) + b"]}"
    assert parse_tensor("x", parse_json(body)["x"], np.dtype("uint8")).shape == (MAX_VALUES - 9,)


ACCEPTED = [
    ("[7, -0]", (*FLOATS, *INTEGERS), [7, 0]),
    ("[-1.5, 1e3, -0.0, 0.1]", FLOATS, [-1.5, 1000, -0.0, 0.1]),
    ("[1, 2.5, -0.0]", FLOATS, [1, 2.5, -0.0]),
    ("[NaN, Infinity, -Infinity, 1e400, -1e400, 1e-400]", FLOATS, [nan, inf, -inf, inf, -inf, 0]),
    ("[1e39, -1e39]", ("float32", "float16"), [inf, -inf]),
    ("[1" + "0" * 400 + ", NaN]", FLOATS, [inf, nan]),
    ("[9007199254740993, 123456789012345678901234567890]", ("float64",), [2.0**53, 123456789012345678901234567890.0]),
    ("[18446744073709551616, -9223372036854775809]", ("float64",), [2.0**64, -(2.0**63)]),
    *[
        (f"[{np.iinfo(dtype).min}, {np.iinfo(dtype).max}]", (dtype,), [np.iinfo(dtype).min, np.iinfo(dtype).max])
        for dtype in INTEGERS
    ],
    ("[true, false]", ("bool",), [True, False]),
    (r'["", "\u00e9\u20ac\ud83d\ude00", "a\u0000", "aGk="]', ("object",), [b"", "é€😀".encode(), b"a\0", b"aGk="]),
    ('[["a", {"b64": "AP8="}], [{"b64": ""}, "b"]]', ("object",), [[b"a", b"\0\xff"], [b"", b"b"]]),
    (r'[{"b64": "aGVsbG8"}, {"b64": " aG\nVs bG8= "}]', ("object",), [b"hello", b"hello"]),
    ("[[[], []]]", (*FLOATS, *INTEGERS, "bool", "object"), [[[], []]]),
    ("[]", (*FLOATS, *INTEGERS, "bool", "object"), []),
    ("5", (*FLOATS, *INTEGERS), 5),
]


@pytest.mark.parametrize("text, dtypes, expected", ACCEPTED)
def test_a_value_is_accepted(text, dtypes, expected):
    for dtype in dtypes:
        assert_same(column(text, dtype), expected, dtype)


NO_BASE64 = ('{"b64": "a"}', '{"b64": "aGk!"}', '{"b64": "_-8="}', '{"b64": "ü"}', '{"b64": "===="}')
REFUSED = [
    ("1", "1.0", INTEGERS), ("1", "NaN", INTEGERS), ("1", "1" + "0" * 400, INTEGERS), ("1", "1e400", INTEGERS),
    *[("1", wrong, (*FLOATS, *INTEGERS)) for wrong in ("true", "null", '"1"', '{"b64": "AAAA"}', "{}", "[1]", "[]")],
    ("1.5", "true", FLOATS), ("1.5", '"NaN"', FLOATS),
    ("true", "1", ("bool",)), ("true", "0.0", ("bool",)), ('"1"', "1", ("object",)), ('"1"', "null", ("object",)),
    ('"1"', "true", ("object",)), ('"1"', '["1"]', ("object",)),
    *[("1", str(end), (dtype,)) for dtype in INTEGERS for end in (np.iinfo(dtype).min - 1, np.iinfo(dtype).max + 1)],
    *[('"a"', wrong, ("object",)) for wrong in (
        *NO_BASE64, '{"b64": 5}', '{"b64": "aGk=", "x": 1}', "{}", r'"\ud800"')]]  # fmt: skip


@pytest.mark.parametrize("right, wrong, dtypes", REFUSED)
def test_a_value_of_another_type_or_beyond_its_range_is_refused_by_its_place(right, wrong, dtypes):
    for dtype in dtypes:
        if not wrong.startswith("["):
            refused("inputs", column, wrong, dtype)
        refused("inputs[1][0]", column, f"[[{right}], [{wrong}]]", dtype)


@pytest.mark.parametrize("wrong, dtype, sentence", [
    *[(wrong, "object", 'inputs[1]: expected base64 in {"b64": "..."}, got ') for wrong in NO_BASE64],
    ('{"b64": 5}', "object", 'inputs[1]: expected a string or {"b64": "..."}, got {"b64": 5}'),
    (r'"\ud800"', "object", 'inputs[1]: expected a string without half of a surrogate pair, got "?"'),
    ("18446744073709551616", "uint64", "inputs[1]: expected a whole number that uint64 has, got 18446744073709551616"),
    ("[1, 2]", "float32", "inputs[1]: expected a number, got [1, 2]"),
    ("true", "int32", "inputs[1]: expected a whole number, got true"),
    ("0", "bool", "inputs[1]: expected true or false, got 0")])  # fmt: skip
def test_the_sentence_says_what_is_expected_there(wrong, dtype, sentence):
    right = {"object": '"a"', "bool": "true"}.get(dtype, "1")
    refused(sentence, column, f"[{right}, {wrong}]", dtype)


@pytest.mark.parametrize("text, where", [
    ("[[1, 2], 3]", "inputs[1]: expected a list of 2, got 3"), ("[1, [2]]", "inputs[1]"),
    ("[[1, 2], [[3, 4], 5]]", "inputs[1][0]"), ("[[[1, 2], [3]]]", "inputs[0][1]: expected a list of 2, got [3]"),
    ("[[1], []]", "inputs[1]"), ("[[], [1]]", "inputs[1]"), ("[" * 70 + "1" + "]" * 70, "inputs[0]")])  # fmt: skip
def test_a_list_that_is_no_array_is_refused_at_the_place_where_it_is_none(text, where):
    for dtype in ("float32", "int64", "bool"):
        refused(where, column, text, dtype)


def test_a_string_among_lists_is_no_bad_string():
    refused('inputs[1]: expected a list of 2, got "c"', column, '[["a", "b"], "c"]', "object")
    refused('inputs[1]: expected a list of 2, got {"b64": "*"}', column, '[["a", "b"], {"b64": "*"}]', "object")


def test_as_many_axes_as_numpy_has_are_read():
    assert column("[" * 64 + "1" + "]" * 64, "int32").shape == (1,) * 64
    refused("expected at most 64 axes, got [1]", column, "[" * 65 + "1" + "]" * 65, "int32")


@pytest.mark.parametrize(
    "body, why",
    [
        ('{"instances": ["café"]}'.encode("latin-1"), "byte 19 of it is not UTF-8"),
        (b"\xff\xd8\xff\xe0 a picture", "byte 0 of it is not UTF-8"),
        (b"[" * 100_000, "it is nested too deeply"),
    ],
)
def test_what_is_no_json_is_said_without_what_it_is(body, why):
    refused(f"The body is not JSON that can be read: {why}", parse_json, body)


def test_what_is_shown_of_a_value_is_short_and_takes_no_longer_than_it_is():
    document = {"a": [1.5, None, "é"], "b": {"c": []}}
    assert excerpt(document) == '{"a": [1.5, null, "é"], "b": {"c": []}}'
    large, begun = [["x" * 10] * 1000] * 10_000, time.thread_time()
    assert excerpt(large) == json.dumps(large[:1])[:100] + "..."
    assert time.thread_time() - begun < 1


def test_the_first_sentence_of_forty_thousand_blanks_is_found_at_once():
    begun = time.thread_time()
    for text in ("x" + " " * 40_000 + "y", "x" + "[[" * 40_000, "\n" * 40_000 + "x", "[[a]]\n" * 40_000):
        first_sentence(text)
    assert time.thread_time() - begun < 1
    assert first_sentence("From /job:ps\n\n  [[{{node a}}]]\nThe rank is 2 [[{{node b}}]] [Op:c]\nmore") == (
        "The rank is 2 [Op:c]"
    )
    assert first_sentence(ValueError()) == "ValueError"


# -- writing -----------------------------------------------------------------------------------------------------------


def digits(number: str) -> int:
    """How many a decimal has, zeros at its ends aside."""
    return len(decimal.Decimal(number).normalize().as_tuple().digits)


@pytest.mark.parametrize("dtype, bits", [("float16", "uint16"), ("float32", "uint32"), ("float64", "uint64")])
def test_every_float_is_the_shortest_decimal_of_its_dtype_and_read_back_the_same_to_the_last_bit(dtype, bits):
    assert written(np.array([0.1, nan, inf, -inf, 3], dtype)) == b"[0.1,NaN,Infinity,-Infinity,3.0]"
    assert written(np.array([0.1, 3, -0.0, 1e-7], dtype)[:3]) == b"[0.1,3.0,-0.0]"
    numbers = np.random.default_rng(7).integers(0, np.iinfo(bits).max, 20_000, bits, endpoint=True).view(dtype)
    numbers[np.isnan(numbers)] = nan  # there are many, and one is answered
    for array in (numbers, numbers[np.isfinite(numbers)]):
        text = written(array)
        assert_same(np.array(json.loads(text), dtype), array, dtype)
        answered = [
            digits(number) for number in text.decode()[1:-1].split(",") if "N" not in number and "I" not in number
        ]
        assert answered == [digits(str(number)) for number in array[np.isfinite(array)]]


def test_bfloat16_has_the_decimals_that_it_shows_itself():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    numbers = np.arange(2**16, dtype=np.uint16).view(bfloat16)
    numbers = numbers[np.isfinite(numbers.astype(np.float32))].reshape(2, -1)
    assert json.loads(written(numbers)) == [[float(str(number)) for number in row] for row in numbers]
    assert written(np.array([[0.5, 1e20], [nan, -2]], bfloat16)) == b"[[0.5,9.97277e+19],[NaN,-2.0]]"
    assert written(np.array(-0.0, bfloat16)) == b"-0.0"


@pytest.mark.parametrize("shape", [(120_000,), (60_000, 2), (2, 60_000), (2, 3, 20_000)])
def test_a_large_array_is_written_as_a_small_one(shape):
    values = np.arange(math.prod(shape)).reshape(shape)
    assert json.loads(written(values)) == values.tolist()


def test_an_array_is_written_however_it_lies_in_memory():
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for view in (array.T, array[:, ::2], array[..., 1], np.asfortranarray(array), array[1], array.astype(">f4")):
        assert json.loads(written(view)) == view.tolist()
        assert (
            json.loads(written(np.where(view == 9, np.float32(inf), view))) == np.where(view == 9, inf, view).tolist()
        )


def test_a_string_that_is_not_utf_8_passes_as_it_is_and_a_dtype_that_json_does_not_have_is_not_implemented():
    assert written(strings([b'\xff"\x80', b"a"])) == b'["\xff\\"\x80","a"]'
    assert written(strings([b'\xff"\x80']), "y_bytes") == b'[{"b64":"/yKA"}]'
    refused("complex64", written, np.zeros(2, np.complex64), status=501)
    refused("complex64", column, "[1, 2]", "complex64", status=501)


# -- both libraries side by side ---------------------------------------------------------------------------------------


def outcome(read, body: bytes) -> str:
    """What comes of a body, exactly: types, order, the sign of zero; or that it is refused."""
    try:
        return repr(read(body))
    except (InvalidRequest, ValueError, RecursionError):
        return "refused"


def by_standard_library(body: bytes) -> dict:
    document = json.loads(body.decode("utf-8-sig"))
    if not isinstance(document, dict):
        raise ValueError
    return document


ATOMS = [
    "0", "-0", "-0.0", "1", "-1", "1.5", "1e5", "1E-5", "1e+400", "-1e400", "1e-400", "0.1", "NaN", "Infinity",
    "-Infinity", "true", "false", "null", "1" * 19, "1" * 20, "-" + "9" * 19, "0." + "1" * 30, "1" * 25 + ".5",
    "1" * 400,
    *[str(sign * 2**bits + more) for sign in (1, -1) for bits in (53, 63, 64) for more in (-1, 0, 1)],
    '""', '"a"', r'"\ud800"', r'"\udc00\ud800"', r'"\ud83d\ude00"', '"😀é"', r'"\u0000\"\\\/\b"', '"' + "1" * 20 + '"',
    '",:[{--------------------"', "[]", "{}", '{"b64": "aGk="}', "4.9e-324", "1.7976931348623159e308", "2e308",
    "01", "1.", ".5", "+1", "nan", "'a'", '"\1"', '"\x7f"', "--1", "1e", "[,]", "tru", r'"\x"', "\u00a0",
    "\f"]  # fmt: skip


def random_value(r: random.Random, depth: int) -> str:
    blank = r.choice(["", "", " ", "\n\t", "\r "])
    if depth == 0 or r.random() < 0.3:
        return blank + r.choice(ATOMS[: r.choice([10, len(ATOMS) - 16, len(ATOMS)])]) + blank
    if r.random() < 0.7:
        atom = random_value(r, depth - 1) if r.random() < 0.5 else None
        return f"[{','.join(atom or random_value(r, depth - 1) for _ in range(r.randrange(4)))}]{blank}"
    return f"{{{','.join(f'{r.choice(ATOMS[39:46])}:{random_value(r, depth - 1)}' for _ in range(r.randrange(3)))}}}"


def random_body(r: random.Random) -> bytes:
    body = f'{{"x":{random_value(r, 4)}}}'.encode("utf-8", "surrogatepass")
    if r.random() < 0.1:
        body = b"\xef\xbb\xbf" * r.choice([1, 1, 2]) + body
    if r.random() < 0.2:
        at = r.randrange(len(body))
        body = body[:at] + r.choice([b"", b"\xff", b"9" * 20, b",", b"]", b"NaN", b'"', b"\0"]) + body[at + 1 :]
    return body


def test_both_libraries_read_the_same_from_what_the_tests_have_and_from_random_documents():
    r = random.Random(18)
    values = [*ATOMS, *(text for text, *_ in ACCEPTED), *(wrong for _, wrong, _ in REFUSED)]
    bodies = [*NO_JSON, *NO_OBJECT, *(f'{{"x": {text}}}'.encode("utf-8", "surrogatepass") for text in values)]
    for body in bodies + [random_body(r) for _ in range(20_000)]:
        assert outcome(parse_json, body) == outcome(by_standard_library, body), body[:1000]


def test_an_integer_past_64_bits_is_the_one_thing_that_orjson_alone_would_read_otherwise():
    r, count = random.Random(19), 0
    for body in (random_body(r) for _ in range(20_000)):
        if outcome(load, body) != outcome(load_exactly, body):
            assert LONG_NUMBER in body.translate(OUTLINE), body
            count += 1
    assert count


def decimals(value):
    """An output's elements as the standard library takes them, each made on its own."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return float(str(value)) if isinstance(value, np.floating) else value.item()


def test_both_libraries_write_the_same_values():
    random_, words = np.random.default_rng(18), strings([b"a", "\u2028é😀".encode(), b"\xff\xfe", b'\0\x1f"\\/', b""])
    for dtype in (*FLOATS, *INTEGERS, "bool", "object"):
        for shape in ((), (7,), (0, 2), (2, 0), (3, 2, 5)):
            if dtype == "object":
                array = random_.choice(words, shape) if shape else strings(words[1])
            elif dtype in FLOATS:
                special = [0, -0.0, 0.1, 1e-7, 65504, 1e16, 1e22, 5e-324, 1 / 3, nan, inf, -inf]
                special = special[: random_.choice([9, 12])]
                with np.errstate(over="ignore"):
                    array = np.asarray(random_.choice(special, shape)).astype(dtype)
            else:
                array = np.asarray(random_.integers(0, 2 if dtype == "bool" else 127, shape)).astype(dtype)
            flat = list(map(decimals, array.reshape(-1)))
            expected = np.array(flat, object).reshape(array.shape).tolist()
            text = written(array).decode("utf-8", "surrogateescape")
            assert repr(json.loads(text)) == repr(json.loads(json.dumps(expected, ensure_ascii=False)))


def in_one_step(text: str) -> bytes | None:
    """What base64 without blanks, padded, is by the more patient of the two decoders."""
    text = re.sub(r"\s", "", text, flags=re.A)
    try:
        return base64.b64decode(text if "=" in text else text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        return None


def test_both_decoders_of_base64_read_the_same():
    r = random.Random(20)
    for _ in range(5_000):
        text = "".join(r.choices("aZ09+/= \n-ü", k=r.randrange(9)))
        assert parse_string({"b64": text}) == in_one_step(text), text
