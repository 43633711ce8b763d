"""500 malformed requests over raw sockets, made from a seed: each is refused in JSON or its connection closed, and nothing else happens."""

import contextlib
import functools
import gzip
import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor


SEED = 20_260
COUNT = 500
DEPTH = 500_000
GOOD = b"GET /?value=0 HTTP/1.1\r\nHost: a\r\n\r\n"


# -- the generator: each function makes one request of its kind, as pieces of bytes -----------------------------------


def post(body: bytes, path: bytes = b"/v1/models/linear:predict", *headers: bytes) -> bytes:
    lines = [b"POST %b HTTP/1.1" % path, b"Host: a", b"Connection: close", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def garbage(r: random.Random, most: int = 200) -> bytes:
    return r.randbytes(r.randint(1, most))


def wrong_value(r: random.Random):
    """A JSON value that is wrong wherever a row of three numbers is wanted."""
    return r.choice([
        None, True, "text", "", {}, [], [[]], {"b64": "!"}, {"b64": 1}, {"b64": "eA==", "more": 1}, {"x": {}}, [1, "2", 3], [1, [2], 3], [None] * 3,
        [{}] * 3, 10**400, r.randint(-10**30, 10**30), "\ud800", [[[1, 2, 3]]], {"y": [1, 2, 3]}, [1] * r.randint(4, 50), [1, 2]])


def wrong_document(r: random.Random) -> bytes:
    """The contract of predict, with one place wrong."""
    good = {"instances": [[1, 2, 3]]}
    document = r.choice([
        lambda: wrong_value(r) or 0,
        lambda: {"instances": wrong_value(r)},
        lambda: {"instances": [wrong_value(r)]},
        lambda: {"instances": [[1, 2, 3], wrong_value(r)]},
        lambda: {"instances": [{"x": [1, 2, 3]}, {"x": wrong_value(r)}]},
        lambda: {"instances": [{"x": [1, 2, 3], "z": wrong_value(r)}]},
        lambda: {"inputs": wrong_value(r)},
        lambda: {"inputs": {"x": wrong_value(r)}},
        lambda: good | {"inputs": wrong_value(r)},
        lambda: good | {"signature_name": r.choice([1, None, [], {}, True, "no such", "\x00", "x" * 10_000])},
        lambda: {r.choice(["instance", "", "Instances", "\x00", "predictions"]): [[1, 2, 3]]}])()
    return post(json.dumps(document).encode())


def wrong_example(r: random.Random) -> bytes:
    """The contract of classify and regress, with one place wrong."""
    document = r.choice([
        {"examples": wrong_value(r)}, {"examples": [wrong_value(r)]}, {"examples": [{"x": wrong_value(r)}]},
        {"examples": [{"x": 1}], "context": wrong_value(r)}, {"instances": [1]}, wrong_value(r) or 0])
    return post(json.dumps(document).encode(), b"/v1/models/scores:" + r.choice([b"classify", b"regress"]))


def wrong_json(r: random.Random) -> bytes:
    """A good document, damaged: cut, with bytes changed, not UTF-8, in another encoding, twice, or not JSON at all."""
    good = b'{"instances": [[1.0, 2.0, 3.0]]}'
    at = r.randrange(1, len(good) - 1)
    return post(r.choice([
        good[:at], good[:at] + bytes([r.randrange(128, 256)]) + good[at:], good + good, good[::-1], good.decode().encode("utf-16"),
        b'{"instances": ["\xff\xfe"]}', b'{"instances": ["\\ud800\\u"]}', b"", b" ", b"\0", garbage(r) + b"\xff", b"{" * r.randint(1, 1000),
        b'{"instances": [[1, 2, 0x3]]}', b'{"instances": [[1, 2, 3],]}', b"{'instances': [[1, 2, 3]]}", b'{"instances": [[01, 2, 3]]}']))


def deep_json(r: random.Random) -> bytes:
    opening, closing = r.choice([(b"[", b"]"), (b'{"a":', b"}"), (b'[{"x":', b"}]")])
    depth = DEPTH // len(opening)
    return post(b'{"instances": ' + opening * depth + b"1" + closing * r.choice([0, depth]) + b"}" * r.randint(0, 1))


@functools.cache
def bomb() -> bytes:
    return gzip.compress(bytes(70 * 2**20))


def wrong_gzip(r: random.Random) -> bytes:
    good = gzip.compress(b'{"instances": [[1, 2, 3]]}')
    body = r.choice([good[:r.randrange(len(good))], good[:12] + garbage(r), garbage(r), b"\x1f\x8b" + garbage(r), gzip.compress(b"x"),
                     bomb()])
    return post(body, b"/v1/models/linear:predict", b"Content-Encoding: gzip")


def wrong_path(r: random.Random) -> bytes:
    model = r.choice([b"linear", b"nobody", b"%ff", b"%00", b"..%2f..%2fetc%2fpasswd", b"%6", b"a" * r.randint(1, 3000), b"\xc3\xa4"])
    path = r.choice([
        b"/v1/models/" + model + b":predic", b"/v1/models/" + model + b"/versions/" + r.choice([b"x", b"-1", b"9" * 30, b"99", b"%31"]) + b":predict",
        b"/v1/models/" + model + b"/labels/" + garbage(r, 9).hex().encode() + b":predict", b"/v1/models/" + model + b"/metadat", b"/v1/models/:predict",
        b"/v1/models/linear:PREDICT", b"/v1/models/linear::predict", b"/v1//models/linear:predict", b"//etc/passwd", b"/../../etc/passwd",
        b"/" + garbage(r).hex().encode(), b"http://", b"http://[::1", b"*", b"v1/models/linear", b"/v2/models/linear:predict", b"/?value=" + garbage(r).hex().encode() + b"z",
        b"/?value=1&value=2", b"/?value=%ff", b"/?" + b"&".join([b"value=1"] * 500), b"/?value=%00", b"/?value=nan", b"/?value=1e999"])
    body = b"" if path.startswith(b"/?") else b'{"instances": [1]}'
    return post(body, path).replace(b"POST", b"GET" if path.startswith(b"/?") else b"POST", 1)


def wrong_method(r: random.Random) -> bytes:
    method = r.choice([b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"TRACE", b"CONNECT", b"BREW", b"get", b"G\0T", b"", b"POST" * 5000, b"PRI", garbage(r, 8).hex().encode()])
    return post(b"{}", r.choice([b"/", b"/health", b"/metrics", b"/v1/models/linear:predict"])).replace(b"POST", method, 1)


def wrong_version(r: random.Random) -> bytes:
    version = r.choice([b"HTTP/9.9", b"HTTP/1", b"HTTP/1.1.1", b"HTTP/-1.1", b"HTTP", b"http/1.1", b"HTTP/1.x", b"FTP/1.1", b"HTTP/1.1 more", b"\xff", b"HTTP/2.0", b"HTTP/1" + b"1" * 5000])
    return post(b"{}").replace(b"HTTP/1.1", version, 1)


def wrong_length(r: random.Random) -> bytes:
    length = r.choice([
        b"x", b"-1", b"-0", b"+3", b"1e3", b"0x10", b"9" * 30, b"18446744073709551616", b"99999999999", b"4294967297", b"", b"1 2", b"3, 4", b"\xb2", b"1.5",
        b"3\r\nContent-Length: 4", b"5\r\nTransfer-Encoding: chunked", b"2\r\nTransfer-Encoding: gzip", b"1\0"])
    return post(b"{}").replace(b"Content-Length: 2", b"Content-Length: " + length, 1)


def wrong_chunks(r: random.Random) -> bytes:
    chunks = r.choice([
        b"zz\r\n{}\r\n0\r\n\r\n", b"-2\r\n{}\r\n0\r\n\r\n", b"5\r\n{}\r\n0\r\n\r\n", b"1\r\n{}\r\n0\r\n\r\n", b"2\n{}\n0\n\n", b"\r\n\r\n", b"2\r\n{}", b"2\r\n{}\r\n",
        b"2;" + b"x" * 500 + b"\r\n{}\r\n0\r\n\r\n", b"f" * 40 + b"\r\n{}\r\n0\r\n\r\n", b"ffffffffffffffff\r\n{}\r\n", b"2\r\n{}\r\n0\r\nTrailer", b"0x2\r\n{}\r\n0\r\n\r\n",
        b"+2\r\n{}\r\n0\r\n\r\n", b" 2\r\n{}\r\n0\r\n\r\n", b"2\r\n{}0\r\n\r\n", b"2_0\r\n" + b"{" * 32 + b"\r\n0\r\n\r\n", garbage(r)])
    coding = r.choice([b"chunked", b"chunked", b"gzip, chunked", b"chunked, chunked", b"CHUNKED", b"xchunked", b"chunked\r\nTransfer-Encoding: identity"])
    return b"POST /v1/models/linear:predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: " + coding + b"\r\n\r\n" + chunks


def wrong_header(r: random.Random) -> bytes:
    header = r.choice([
        b"no colon", b": no name", b" folded: line", b"a b: c", b"a\0b: c", b"a: b\0c", b"a: \xff\xfe" + garbage(r).hex().encode(), b"a" * 100_000 + b": b", b"a: " + b"b" * 100_000,
        b"\r\n".join(b"h%d: x" % i for i in range(r.choice([101, 2000]))), b"Host: b", b"a:\rb", b"Expect: what", b"Upgrade: h2c", b"Connection: \x7f",
        b"Content-Type: " + garbage(r).hex().encode(), b"Content-Encoding: gzip", b"Transfer-Encoding: \x0bchunked"])
    return post(b"{", b"/v1/models/linear:predict", header)


def not_http(r: random.Random) -> bytes:
    return r.choice([
        garbage(r), b"\r\n" * r.randint(1, 50) + garbage(r), b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + garbage(r), b"\0" * r.randint(1, 5000), b"hello\r\n\r\n",
        b"GET\r\n\r\n", b"GET /\r\n\r\n", b" GET /nothing HTTP/1.1\r\n\r\n", b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + garbage(r)]) + b"\r\n\r\n"


def truncated(r: random.Random) -> bytes:
    """A good request that ends in the middle."""
    request = r.choice([GOOD, post(b'{"instances": [[1, 2, 3]]}'), post(b'{"instances": [3]}', b"/v1/models/adder:predict")])
    return request[:r.randrange(1, len(request) - 1)]


def pipelined(r: random.Random) -> bytes:
    """Good requests, and malformed ones right behind them or between."""
    wrong = r.choice([wrong_document, wrong_json, wrong_length, wrong_chunks, wrong_version, wrong_path, not_http, truncated])(r)
    return GOOD * r.randint(0, 3) + wrong + GOOD * r.randint(0, 3)


def too_large(r: random.Random) -> bytes:
    """The head of a request whose body is 100 MB."""
    return b"POST /v1/models/linear:predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


WELL_FORMED = (wrong_document, wrong_example, wrong_json, wrong_gzip, wrong_path, deep_json)  # as HTTP
MALFORMED = (wrong_method, wrong_version, wrong_length, wrong_chunks, wrong_header, not_http, truncated, pipelined)
WEIGHTS = {wrong_document: 3, wrong_example: 3, wrong_json: 3, deep_json: 0.2}


def make_requests() -> list[tuple[object, bytes]]:
    """The function that made each request, and the request; that of 100 MB is made while it is sent."""
    r = random.Random(SEED)
    kinds = (*WELL_FORMED, *MALFORMED)
    chosen = [*r.choices(kinds, [WEIGHTS.get(kind, 1.5) for kind in kinds], k=COUNT - 2), too_large, too_large]
    r.shuffle(chosen)
    return [(kind, kind(r)) for kind in chosen]


# -- sending them ------------------------------------------------------------------------------------------------------


def exchange(port: int, kind, request: bytes) -> bytes:
    """All that the server answers until it closes the connection; we close our half first where it may wait for more."""
    received = []
    with socket.create_connection(("127.0.0.1", port), 60) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(request)
        for _ in range(100 if kind is too_large else 0):
            connection.sendall(b"%x\r\n%b\r\n" % (2**20, b" " * 2**20))
        if kind not in WELL_FORMED:
            connection.shutdown(socket.SHUT_WR)
        while part := connection.recv(2**16):
            received.append(part)
    return b"".join(received)


def answers_of(received: bytes) -> list[tuple[int, str, bytes]]:
    """Status, content type and body of each answer on a connection; the last may be cut short, and is then left out."""
    answers = []
    while received:
        head, end, received = received.partition(b"\r\n\r\n")
        status_line, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        assert status_line.startswith("HTTP/1."), status_line
        if not end:
            break
        status = int(status_line.split()[1])
        length = int(headers.get("content-length", len(received))) if status >= 200 else 0
        body, received = received[:length], received[length:]
        if len(body) == length and status >= 200:
            answers.append((status, headers.get("content-type", ""), body))
    return answers


def pids(server) -> list[int]:
    health = server.get("/health").json
    return [server.process.pid, *(actor["pid"] for actor in health["parameter_servers"] + health["workers"])]


def test_500_malformed_requests_are_each_refused_in_json_and_change_nothing(front_end):
    total, before, logged = front_end.get("/?value=0").json, pids(front_end), len(front_end.output())
    requests = make_requests()
    with ThreadPoolExecutor(16) as pool:
        received = list(pool.map(lambda request: exchange(front_end.port, *request), requests))
    for (kind, sent), got in zip(requests, received):
        what = (kind.__name__, sent[:500], got[:2000])
        answers = answers_of(got)
        for status, content_type, body in answers:
            assert status == 200 and kind in (pipelined, truncated) or 400 <= status < 500, what
            assert content_type == "application/json", what
            document = json.loads(body)
            if status != 200:
                assert list(document) == ["error"] and document["error"] and "\n" not in document["error"], what
                assert "Traceback" not in document["error"], what
        assert len(answers) == 1 or kind is pipelined or kind not in WELL_FORMED and not answers, what
    assert front_end.get("/?value=0").json == total and pids(front_end) == before
    assert front_end.predict("linear", {"instances": [[1, 0, 0]]}).json == {"predictions": [[1.5, 1.5]]}
    assert "Traceback" not in front_end.output()[logged:]
