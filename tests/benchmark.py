"""How fast, and in how much memory: this project beside what one would do without it, measured in one run.

    python tests/benchmark.py                                   # everything; prints a table
    python tests/benchmark.py --only adds,start --rounds 5      # some parts, more rounds
    python tests/benchmark.py --only map --rows 2000            # minutes a round
    python tests/benchmark.py --against ../before               # another version's front ends get the same load
    pip install mosec litserve "ray[serve]==2.60.0"             # once: then it is compared with these three as well

All servers of a comparison are up at the same time, and bursts of load go to them in turn (A B C A B C ...), since
machines drift: a figure is the median of the ratios of neighbouring bursts, with the least and the most. Beside it are
the medians of both sides, and the CPU milliseconds that each of their processes spends on a request, which drift less.

The other version may be the package or the single file that it once was. What it cannot do is a row that says so.
"""

import argparse
import asyncio
import collections
import concurrent.futures
import contextlib
import functools
import http.client
import importlib
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
REPOSITORY = os.path.dirname(HERE)
SHARED = os.path.join(os.path.dirname(REPOSITORY), "shared")
SAVED_MODELS = {
    "basic_pitch": os.path.join(SHARED, "models", "basic_pitch"),
    "estimator": os.path.join(SHARED, "more_models", "estimator_taxi"),
}


# -- the models, with weights that are always the same, and what is asked of them --------------------------------------


def weights(tf, name: str, *shape: int):
    return tf.get_variable(name, shape, initializer=tf.glorot_uniform_initializer(seed=len(name)))


def small(tf):
    """A convolutional network of about 3 ms a run on two cores: 28 x 28 pixels to 10 classes."""
    return network(tf, [64, 128, 192, 192])


def large(tf):
    """The same kind with about 50 ms a run."""
    return network(tf, [512, 768, 768, 768])


def network(tf, channels: list[int]):
    x = tf.placeholder(tf.float32, [None, 28, 28], name="x")
    y = x[..., tf.newaxis]
    for layer, width in enumerate(channels):
        y = tf.nn.relu(tf.nn.conv2d(y, weights(tf, f"kernel_{layer}", 3, 3, int(y.shape[-1]), width), 1, "SAME"))
    y = tf.reduce_mean(y, [1, 2]) @ weights(tf, "classes", channels[-1], 10)
    return {"serving_default": ({"x": x}, {"y": tf.nn.softmax(y)})}


def classifier(tf):
    """Texts to 54 labels and their scores. One text takes about 3 ms, most of it in some hundred operations on strings.

    A text is cleaned in six ways, each is cut into words, pairs and triples, and these are looked up in a vocabulary,
    or hashed where they are not in it: 18 features, each with embeddings of its own.
    """

    class Vocabulary(tf.lookup.KeyValueTensorInitializer):
        _shared_name = "vocabulary"  # else it is drawn by lot, and no two processes mean the same table

    vocabulary, hashed, width, features = words(), 4_000, 32, []
    numbers = tf.range(len(vocabulary), dtype=tf.int64)
    table = tf.lookup.StaticVocabularyTable(Vocabulary(tf.constant(vocabulary), numbers), hashed)
    text = tf.placeholder(tf.string, [None], name="text")
    lower = tf.strings.lower(text, encoding="utf-8")
    for pattern, replacement in (
        (r"[^\w\s]", " "),
        (r"([^\w\s])", r" \1 "),
        (r"\d", "0"),
        (r"[aeiou]", ""),
        (r"(\w)\w*", r"\1"),
        (r"\b\w{1,3}\b", " "),
    ):
        clean = tf.strings.regex_replace(tf.strings.regex_replace(lower, pattern, replacement), r"\s+", " ")
        split = tf.strings.split(clean, result_type="RaggedTensor")
        for grams in (split, tf.strings.ngrams(split, 2), tf.strings.ngrams(split, 3)):
            embeddings = weights(tf, f"embeddings_{len(features)}", len(vocabulary) + hashed, width)
            vectors = grams.with_values(tf.gather(embeddings, table.lookup(grams.values)))
            features.append(tf.reduce_sum(vectors, 1) / tf.cast(1 + grams.row_lengths()[:, tf.newaxis], tf.float32))
    hidden = tf.nn.relu(tf.concat(features, 1) @ weights(tf, "hidden", width * len(features), 256))
    scores = tf.nn.softmax(100 * hidden @ weights(tf, "out", 256, 54))
    labels = tf.constant([[f"{word} ({number})" for number, word in enumerate(vocabulary[:54])]])
    labels = tf.tile(labels, [tf.shape(text)[0], 1])
    return {"serving_default": ({"text": text}, {"labels": labels, "scores": scores})}


@functools.cache
def words(count: int = 8_000) -> list[str]:
    chance, found = random.Random(0), {}
    while len(found) < count:
        syllables = (chance.choice("bcdfghklmnprstvw") + chance.choice("aeiou") for _ in range(chance.randint(1, 4)))
        found["".join(syllables)] = True
    return list(found)


def sentences(seed: int) -> str:
    """200 to 1,000 characters."""
    chance, text = random.Random(seed), ""
    length = chance.randint(200, 1000)
    while len(text) < length:
        word = chance.choice(words()) if chance.random() < 0.95 else str(chance.randint(0, 3000))
        text += (word.title() if chance.random() < 0.1 else word) + chance.choice([" "] * 6 + [", ", ". ", " - ", "! "])
    return text[:length]


def ranking(tf):
    """Rows of 32 numbers, the first 8 of which are indices of things that have embeddings, to rows of 8 numbers."""
    x = tf.placeholder(tf.float32, [None, 32], name="x")
    things = tf.gather(weights(tf, "things", 20_000, 32), tf.cast(x[:, :8], tf.int64))
    y = tf.concat([tf.reshape(things, [-1, 256]), x[:, 8:]], 1)
    for layer, (inputs, outputs) in enumerate(((280, 256), (256, 128), (128, 8))):
        y = tf.tanh(y @ weights(tf, f"layer_{layer}", inputs, outputs))
    return {"serving_default": ({"x": x}, {"y": y})}


def heavy(tf):
    """400 MB of weights."""
    x = tf.placeholder(tf.int64, [None], name="x")
    return {"serving_default": ({"x": x}, {"y": tf.gather(weights(tf, "table", 1_000_000, 100), x)})}


def image_floats(tf):
    """An image as it came: all that it costs is its way in and out."""
    x = tf.placeholder(tf.float32, [None, 224, 224, 3], name="x")
    return {"serving_default": ({"x": x}, {"y": tf.identity(x)})}


def image_bytes(tf):
    """The same in whole numbers from 0 to 255."""
    x = tf.placeholder(tf.uint8, [None, 224, 224, 3], name="x")
    return {"serving_default": ({"x": x}, {"y": tf.identity(x)})}


def fast(tf):
    x = tf.placeholder(tf.float32, [None], name="x")
    return {"serving_default": ({"x": x}, {"y": x / 2 + 2})}


def slow(tf):
    """About 2 s of one core for each request: a batch axis that is not free, so that requests do not share runs."""
    x = tf.placeholder(tf.float32, [1], name="x")
    a = tf.constant(1 / 512, shape=[512, 512])
    _, y = tf.while_loop(lambda i, y: i < 400, lambda i, y: (i + 1, y @ a), [0, tf.fill([512, 512], x[0])])
    return {"serving_default": ({"x": x}, {"y": y[:1, 0]})}


def requests(model: str) -> list[list[Any]]:
    """The rows of some different requests."""
    chance = random.Random(0)
    if model in ("fast", "slow"):
        return [[1.0]]
    if model in IMAGES:
        kind = (lambda: round(chance.random(), 4)) if model == "image_floats" else (lambda: chance.randrange(256))
        return [[[[[kind() for _ in range(3)] for _ in range(224)] for _ in range(224)]]]

    def numbers(count: int) -> list[float]:
        return [round(chance.random(), 4) for _ in range(count)]

    if model == "classifier":
        return [[sentences(seed)] for seed in range(16)]
    if model == "ranking":
        return [[[*chance.choices(range(20_000), k=8), *numbers(24)] for _ in range(200)] for _ in range(4)]
    if model == "basic_pitch":
        return [[[[number] for number in numbers(43_844)]]]
    if model == "estimator":
        return [[taxi_ride(seed)] for seed in range(16)]
    return [[[numbers(28) for _ in range(28)]] for _ in range(4)]


def taxi_ride(seed: int) -> dict[str, Any]:
    """As a ``tf.train.Example`` in JSON."""
    chance = random.Random(seed)
    integers = ("trip_start_month", "trip_start_hour", "trip_start_day", "trip_start_timestamp", "trip_seconds")
    floats = ("trip_miles", "fare", "pickup_latitude", "pickup_longitude", "dropoff_latitude", "dropoff_longitude")
    ride = {name: chance.randint(1, 7) for name in integers} | {name: chance.randint(1, 50) + 0.5 for name in floats}
    return ride | {"payment_type": chance.choice(["Cash", "Credit Card"]), "company": chance.choice("xyz")}


IMAGES = {"image_floats": "float32", "image_bytes": "uint8"}  # and their dtypes


# -- what it is compared with ------------------------------------------------------------------------------------------


def private_session(model: str) -> Callable[[Any], dict[str, Any]]:
    """A plain session of all cores in this process: run(array) -> arrays by name."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import tensorflow.compat.v1 as tf

    tf.disable_eager_execution()
    with tf.Graph().as_default():
        session = tf.Session()
        if model == "basic_pitch":
            definitions = tf.saved_model.load(session, ["serve"], os.path.join(SAVED_MODELS[model], "1")).signature_def
            inputs, outputs = (
                {name: info.name for name, info in side.items()}
                for side in (definitions["serving_default"].inputs, definitions["serving_default"].outputs)
            )
        else:
            [(inputs, outputs)] = globals()[model](tf).values()
            session.run([tf.global_variables_initializer(), tf.tables_initializer()])
        return session.make_callable(outputs, list(inputs.values()))


def predictor(model: str) -> Callable[[list[list[Any]]], list[bytes]]:
    """One run for the rows of several requests; the answer to each, as TensorFlow Serving has it."""
    import numpy as np

    run, dtype = private_session(model), object if model == "classifier" else np.float32

    def predict(many: list[list[Any]]) -> list[bytes]:
        outputs = {name: array.tolist() for name, array in run(np.array([*itertools.chain(*many)], dtype)).items()}
        if "labels" in outputs:
            outputs["labels"] = [[label.decode() for label in row] for row in outputs["labels"]]
        rows = zip(*outputs.values())
        rows = (dict(zip(outputs, row)) if len(row) > 1 else row[0] for row in rows)
        return [json.dumps({"predictions": list(itertools.islice(rows, len(own)))}).encode() for own in many]

    predict(requests(model)[:1])
    return predict


def serve_starlette(port: str, endpoint) -> None:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.routing import Route

    app = Starlette(routes=[Route("/", endpoint, methods=["GET", "POST"])])
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning", access_log=False)


def serve_constant(framework: str, port: str) -> None:
    """A constant answer from the server that our front end has: the limit of any app on it."""
    if framework == "starlette":
        from starlette.responses import Response

        async def constant(request):
            return Response(b'{"result": 1.0}', media_type="application/json")

        serve_starlette(port, constant)
    else:
        from flask import Flask, Response

        from shared_graph.http_server import Server, Threaded
        from shared_graph.logs import listen

        app = Flask("constant")
        app.route("/")(lambda: Response(b'{"result": 1.0}', mimetype="application/json"))
        Server(Threaded(app, bool, bool, 30), 30).run([listen("127.0.0.1", int(port))])


def serve_gathered(model: str, port: str) -> None:
    """An in-process session, requests gathered by hand: what queued up while the last run went is the next run."""
    from starlette.responses import Response

    predict, waiting, is_running, running = predictor(model), [], False, None

    async def work():
        nonlocal is_running
        is_running = True
        while waiting:
            batch, waiting[:] = waiting[:64], waiting[64:]
            answers = await asyncio.to_thread(predict, [rows for rows, _ in batch])
            for answer, (_, future) in zip(answers, batch):
                future.set_result(answer)
        is_running = False

    async def endpoint(request):
        nonlocal running
        rows, future = json.loads(await request.body())["instances"], asyncio.get_running_loop().create_future()
        waiting.append((rows, future))
        if not is_running:
            running = asyncio.create_task(work())
        return Response(await future, media_type="application/json")

    serve_starlette(port, endpoint)


mosec = importlib.import_module("mosec") if sys.argv[1:2] in (["mosec"], ["mosec_json"]) else None
litserve = importlib.import_module("litserve") if sys.argv[1:2] == ["litserve"] else None


class MosecWorker(mosec.Worker if mosec else object):
    """The process that mosec starts; answers are JSON already, since mosec's own are indented, which is slow."""

    def __init__(self):
        self.predict = predictor(sys.argv[2])

    def forward(self, data: list[dict[str, Any]]) -> list[bytes]:
        return self.predict([document["instances"] for document in data])

    def serialize(self, data: bytes) -> bytes:
        return data


def serve_mosec(model: str, port: str) -> None:
    os.environ.update(MOSEC_ADDRESS="127.0.0.1", MOSEC_PORT=port, MOSEC_TIMEOUT="60000")
    server = mosec.Server()
    server.append_worker(MosecWorker, max_batch_size=64, max_wait_time=1)  # in ms; of 1, 3 and 10 the fastest
    server.run()


class MosecImages(mosec.Worker if mosec else object):
    """With mosec's own JSON, in and out."""

    def __init__(self):
        self.run = image_runner(sys.argv[2])

    def forward(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [self.run(document) for document in data]


def image_runner(model: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    import numpy as np

    run = private_session(model)
    return lambda document: {"predictions": run(np.array(document["instances"], IMAGES[model]))["y"].tolist()}


def serve_mosec_json(model: str, port: str) -> None:
    """As many processes as we have workers."""
    os.environ.update(MOSEC_ADDRESS="127.0.0.1", MOSEC_PORT=port, MOSEC_TIMEOUT="60000")
    server = mosec.Server()
    server.append_worker(MosecImages, num=IMAGE_WORKERS, max_batch_size=64, max_wait_time=1)
    server.run()


class LitServeImages(litserve.LitAPI if litserve else object):
    def setup(self, device):
        self.run = image_runner(sys.argv[2])

    def decode_request(self, request):
        return request

    def predict(self, document):
        return self.run(document)

    def encode_response(self, answer):
        return answer


def serve_litserve(model: str, port: str) -> None:
    """With LitServe's own JSON, in and out, and as many processes as we have workers."""
    server = litserve.LitServer(LitServeImages(), accelerator="cpu", workers_per_device=IMAGE_WORKERS, timeout=60)
    server.run(host="127.0.0.1", port=int(port), generate_client_file=False, log_level="warning")


def serve_ray_serve(model: str, port: str) -> None:
    import ray
    from ray import serve
    from starlette.responses import Response

    @serve.deployment(max_ongoing_requests=1000)
    class Deployment:
        def __init__(self):
            self.predict = importlib.import_module("benchmark").predictor(model)

        @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.01)
        async def gather(self, many: list[list[Any]]) -> list[bytes]:
            return await asyncio.to_thread(self.predict, many)

        async def __call__(self, request):
            answer = await self.gather(json.loads(await request.body())["instances"])
            return Response(answer, media_type="application/json")

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    serve.run(Deployment.bind(), route_prefix="/")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        signal.pause()
    finally:
        ray.shutdown()


def pool_process() -> None:
    global run_in_pool
    run_in_pool = private_session("large")


def predict_in_pool(rows):
    return run_in_pool(rows)


def map_rows(count: str, options: str) -> None:
    """Print how many rows a second our ``map`` does, or without options a pool of processes with a session in each."""
    import numpy as np

    rows = np.random.default_rng(0).random((int(count), 28, 28), np.float32)
    batches = [rows[start : start + 16] for start in range(0, len(rows), 16)]
    if options:
        try:
            from shared_graph import Cluster
        except ImportError:  # the single file that it once was
            from ray_tensorflow import Cluster

        changes = {name.replace("-", "_"): value for name, value in re.findall(r"--([\w-]+)[ =](\S+)", options)}
        place = Cluster(model="benchmark:large", **changes)
        place.start(place.options.workers)
        predict = functools.partial(place.map, model="large")
    else:
        place = multiprocessing.get_context("spawn").Pool(initializer=pool_process)
        predict = functools.partial(place.map, predict_in_pool, chunksize=1)
    with place:
        list(predict(batches[:4]))
        started = time.perf_counter()
        list(predict(batches))
        print(len(rows) / (time.perf_counter() - started))


# -- servers, each in processes of its own -----------------------------------------------------------------------------


class Target(NamedTuple):
    """What load goes to: requests for a model, or adds, on a server."""

    port: int
    pid: int
    path: str
    model: str | None
    form: str = "json"  # or "npy"

    def ask(self, path: str | None = None) -> tuple[int, bytes]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            body = None if path else self.bodies()[0]
            connection.request("POST" if body else "GET", path or self.path, body)
            response = connection.getresponse()
            return response.status, response.read()

    def bodies(self) -> list[bytes]:
        if self.model is None:
            return [b""]
        if self.form == "npy":
            return [npy(rows, IMAGES[self.model]) for rows in requests(self.model)]
        rows = "examples" if self.path.endswith(":classify") else "instances"
        return [json.dumps({rows: own}).encode() for own in requests(self.model)]

    def health(self) -> dict[str, Any]:
        return json.loads(self.ask("/health")[1])

    def has_all_workers(self) -> bool:
        return all(worker["state"] == "ready" for worker in self.health()["workers"])


def npy(rows: list[Any], dtype: str) -> bytes:
    import numpy as np

    file = io.BytesIO()
    np.save(file, np.array(rows, dtype))
    return file.getvalue()


class Lacks(Exception):
    """A version cannot do what is measured."""


@contextlib.contextmanager
def running(*command: str, path: str = "/", model: str | None = None, ready: str = "", folder: str = REPOSITORY):
    """A server process, as a Target, for as long as the block runs; that begins when all of it answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([HERE, folder]), "TF_CPP_MIN_LOG_LEVEL": "3"}
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, *command, "--port", str(port)]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)  # Ray looks there, too
        target, end, is_ready = Target(port, process.pid, path, model), time.monotonic() + 300, False
        try:
            while not is_ready:
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise Lacks(f"{' '.join(command)} does not serve:\n{log.read().decode(errors='replace')[-2000:]}")
                with contextlib.suppress(OSError, http.client.HTTPException):
                    status, answer = target.ask(ready)
                    is_ready = status == 200 and b'"starting"' not in answer  # which our actors are in /health
                time.sleep(0.02)
            yield target
        finally:
            members = family(process.pid)
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            for member in members:  # LitServe leaves its own behind
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member, signal.SIGKILL)
            process.wait()


def ours(folder: str, front_end: str, options: str, model: str | None = None, ready: str = "/health"):
    """One of our front ends, of the version in this folder."""
    path, command = "/", [os.path.join(folder, f"ray_tensorflow_{front_end}.py"), *options.split()]
    if model:
        saved = SAVED_MODELS.get(model)
        command += ["--model", f"{model}={saved}" if saved else f"benchmark:{model}"]
        path = f"/v1/models/{model}:{'classify' if model == 'estimator' else 'predict'}"
    return running(*command, path=path, model=model, ready=ready, folder=folder)


def other(kind: str, of: str):
    """One of those that it is compared with."""
    path = {"mosec": "/inference", "mosec_json": "/inference", "litserve": "/predict"}.get(kind, "/")
    model = None if kind == "constant" else of
    return running(__file__, kind, of, path=path, model=model)


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                children += map(int, file.read().split())
    return [pid, *(descendant for child in children for descendant in family(child))]


def cpu_ms(pid: int) -> collections.Counter:
    """What the processes of a server have used until now, by what they are; Ray's own together."""
    used, numbers = collections.Counter(), itertools.count()
    for member in sorted(family(pid)):
        with contextlib.suppress(OSError):
            with open(f"/proc/{member}/cmdline", "rb") as file:
                command = file.read().decode(errors="replace")
            with open(f"/proc/{member}/stat") as file:
                ticks = sum(map(int, file.read().rpartition(")")[2].split()[11:13]))
            actor = re.match(r"ray::(?:\w+:)*(\w+)", command)
            name = "main" if member == pid else actor[1] if actor else "mosec" if "mosec" in command else "session"
            if "/ray/" in command or name in ("IDLE", "DashboardAgent", "RuntimeEnvAgent"):
                name = "Ray"
            used[f"{name} {next(numbers)}" if name == "Worker" else name] += 1000 * ticks / os.sysconf("SC_CLK_TCK")
    return used


def pss_mb(pid: int) -> float:
    total = 0
    for member in family(pid):
        with contextlib.suppress(OSError), open(f"/proc/{member}/smaps_rollup") as file:
            total += next(int(line.split()[1]) for line in file if line.startswith("Pss:")) / 1024
    return total


# -- load, from a process of its own -----------------------------------------------------------------------------------


def run_load(arguments: str) -> None:
    """Some clients for some seconds, as fast as answers come or at a constant rate over all of them; prints the result.

    A client is one connection at a time; its next request goes out when the answer to the last is there, and it is due.
    """
    import uvloop

    target, clients, seconds, rate = json.loads(arguments)
    target, good, times, due = Target(*target), 0, [], time.perf_counter()
    head = f"{'POST' if target.model else 'GET'} {target.path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
    requests = itertools.cycle([f"{head}{len(body)}\r\n\r\n".encode() + body for body in target.bodies()])

    class Client(asyncio.Protocol):
        def connection_made(self, transport):
            self.transport, self.buffer, self.lost = transport, bytearray(), loop.create_future()
            self.length = None  # of the answer that comes
            self.send()

        def send(self):
            self.sent = time.perf_counter()
            self.transport.write(next(requests))

        def data_received(self, data):
            nonlocal good, due
            self.buffer += data
            head, separator, _ = self.buffer[:4096].partition(b"\r\n\r\n")
            if self.length is None and separator:
                self.length = len(head) + 4 + int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            if self.length is None or len(self.buffer) < self.length:
                return
            answer, self.buffer, self.length, now = self.buffer, bytearray(), None, time.perf_counter()
            if head.split(b" ", 2)[1] == b"200":
                good += 1
            else:
                print(bytes(answer[:2000]), file=sys.stderr)
            times.append(now - self.sent)
            if now >= end:
                self.transport.close()
            elif rate:
                due = max(due, now - 1) + 1 / rate
                loop.call_later(max(0, due - now), self.send)
            elif b"connection: close" not in head.lower():
                self.send()

        def connection_lost(self, error):
            self.lost.set_result(None)

    async def client():
        while time.perf_counter() < end:
            with contextlib.suppress(OSError):
                _, connection = await loop.create_connection(Client, "127.0.0.1", target.port)
                await connection.lost

    async def all_clients():
        async with asyncio.timeout(seconds + 120):
            await asyncio.gather(*(client() for _ in range(clients)))

    loop, before, start = uvloop.new_event_loop(), cpu_ms(target.pid), time.perf_counter()
    end = start + seconds
    loop.run_until_complete(all_clients())
    took, used = time.perf_counter() - start, cpu_ms(target.pid) - before
    percentiles = statistics.quantiles(times if len(times) > 1 else 2 * times, n=100)
    print(
        json.dumps(
            {
                "rate": good / took,
                "errors": len(times) - good,
                "p50": percentiles[49],
                "p99": percentiles[98],
                "cpu": {name: ms / len(times) for name, ms in used.items()},
            }
        )
    )


def burst(target: Target, clients: int, seconds: float, rate: float | None = None) -> dict[str, Any]:
    """Requests a second, errors, latencies in seconds, and CPU milliseconds a request by process."""
    command = [sys.executable, __file__, "load", json.dumps([target, clients, seconds, rate])]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def in_turn(options, clients: int, targets: list[Target]) -> list[list[dict[str, Any]]]:
    """A burst on each for warming up, then on all of them in turn; the results of each."""
    for target in targets:
        burst(target, clients, min(1.0, options.seconds))
    results = [[] for _ in targets]
    for _, (own, target) in itertools.product(range(options.rounds), list(zip(results, targets))):
        own.append(burst(target, clients, options.seconds))
        if own[-1]["errors"]:
            sys.exit(f"a burst on {target} had {own[-1]['errors']} errors")
    return results


def check_same(targets: list[Target]) -> None:
    """All servers of a model give the same answer, to rounding."""
    first = None
    for target in targets:
        floats = []
        document = json.loads(target.ask()[1], parse_float=lambda text: floats.append(float(text)))
        first = first or (document, sum(floats))
        if document != first[0] or abs(sum(floats) - first[1]) > 1e-3 * abs(first[1]):
            sys.exit(f"{target} answers {document!s:.300}, but {targets[0]} {first!s:.300}")


# -- the parts of the table --------------------------------------------------------------------------------------------

NAMES = {
    "constant": "constant answer of the same server",
    "gathered": "in-process session gathered by hand",
    "mosec": "mosec",
    "ray_serve": "Ray Serve with `serve.batch`",
    "mosec_json": "mosec with its own JSON",
    "litserve": "LitServe with its own JSON",
}
NEEDS = {"mosec": "mosec", "ray_serve": "fastapi", "mosec_json": "mosec", "litserve": "litserve"}  # modules
THAT = "that version"
# what, front end, model, and the goals beside each of the others by the number of clients
COMPARISONS = {
    "adds": ("adds, Starlette", "starlette", None, {"constant": {256: "0.70", 16: "0.30"}}),
    "flask": ("adds, Flask", "flask", None, {"constant": {64: "0.70"}}),
    "classifier": (
        "text classifier",
        "starlette",
        "classifier",
        {"gathered": {64: "1.2", 16: "1.0", 1: "0.65"}, "mosec": {64: "0.90", 16: "0.85", 1: "1.0"}},
    ),
    "ray_serve": ("text classifier", "starlette", "classifier", {"ray_serve": {64: "12"}}),
    "network": ("convolutional network (3 ms)", "starlette", "small", {"gathered": {64: "1.2", 16: "1.0"}}),
    "ranking": ("ranking model, 200 rows", "starlette", "ranking", {"gathered": {16: "", 1: ""}}),
    "basic_pitch": ("basic_pitch", "starlette", "basic_pitch", {"gathered": {4: ""}}),
    "estimator": ("Estimator's examples, `:classify`", "starlette", "estimator", {THAT: {64: ">= 5"}}),
}
CPU_GOALS = {("mosec", 64): "below 1.25"}


def compare(options, what: str, front_end: str, model: str | None, goals: dict[str, dict[int, str]]):
    """Rows of our front end beside that version's and the others, at each number of clients."""
    kinds = [kind for kind in goals if kind != THAT and importlib.util.find_spec(NEEDS.get(kind, "json"))]
    is_alone = not kinds and len(options.folders) == 1
    if is_alone or (model in SAVED_MODELS and not os.path.isdir(SAVED_MODELS[model])):
        return
    with contextlib.ExitStack() as stack:
        targets, all_clients = [], next(iter(goals.values()))
        for folder in options.folders:
            try:
                targets.append(stack.enter_context(ours(folder, front_end, options.options, model)))
            except Lacks:
                if not targets:
                    raise
                yield from (lacking(what, f"{clients} clients") for clients in all_clients)
        those = [THAT] * len(targets[1:])
        targets += [stack.enter_context(other(kind, model or front_end)) for kind in kinds]
        if model:
            check_same(targets)
        for clients in all_clients:
            first, *rest = in_turn(options, clients, targets)
            for kind, bursts in zip(those + kinds, rest):
                name, at, goal = NAMES.get(kind, THAT), f"{clients} clients", goals.get(kind, {}).get(clients, "")
                rates, cpu = (
                    [[value(burst) for burst in side] for side in (first, bursts)]
                    for value in (lambda burst: burst["rate"], lambda burst: sum(burst["cpu"].values()))
                )
                yield row(f"{what} / {name}", at, goal, *rates, f"{cpu_text(first)} / {cpu_text(bursts)}")
                if (kind, clients) in CPU_GOALS:
                    what_cpu = f"CPU of all processes for one request, {what} / {name}"
                    yield row(what_cpu, at, CPU_GOALS[kind, clients], *cpu)


def lacking(what: str, at: str, goal: str = "") -> tuple[str, ...]:
    return (f"{what} / {THAT}", at, "that version cannot", goal, "", "")


def row(what: str, at: str, goal: str, ours: list[float], others: list[float], cpu: str = "") -> tuple[str, ...]:
    ratios = sorted(a / b for a, b in zip(ours, others))
    return (
        what,
        at,
        f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        goal,
        f"{statistics.median(ours):.4g} / {statistics.median(others):.4g}",
        cpu,
    )


def cpu_text(bursts: list[dict[str, Any]]) -> str:
    used = {name: statistics.median(burst["cpu"].get(name, 0) for burst in bursts) for name in bursts[0]["cpu"]}
    return f"{sum(used.values()):.2f} ({', '.join(f'{name} {ms:.2f}' for name, ms in used.items() if ms >= 0.005)})"


def measured(
    options,
    what: str,
    name: str,
    at: str,
    goal: str,
    measure: Callable[[str], float],
    reference: Callable[[], float],
    that_goal: str = "",
):
    """Rows of what is measured of this version and of that one, beside a reference, in turn."""
    ours, *those = [[] for _ in options.folders]
    others = []
    for _ in range(options.rounds):
        ours.append(measure(options.folders[0]))
        for folder, values in zip(options.folders[1:], those):
            with contextlib.suppress(Lacks):
                values.append(measure(folder))
        others.append(reference())
    yield row(f"{what} / {name}", at, goal, ours, others)
    for values in those:
        yield row(f"{what} / {THAT}", at, that_goal, ours, values) if values else lacking(what, at, that_goal)


def latency(options):
    with contextlib.ExitStack() as stack:
        servers = {folder: ours(folder, "starlette", options.options) for folder in options.folders}
        targets = {folder: stack.enter_context(server) for folder, server in servers.items()}

        def measure(folder: str) -> float:
            rate = burst(targets[folder], 64, options.seconds)["rate"] / 2
            result = burst(targets[folder], 64, options.seconds, rate)
            return result["p99"] / result["p50"]

        what = "adds at half of the top rate: p99 / p50"
        yield from measured(options, what, "1", "64 clients", "below 4", measure, lambda: 1.0)


def mapped(options):
    def measure(folder: str | None = None) -> float:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([HERE, folder or REPOSITORY])}
        command = [sys.executable, __file__, "map", str(options.rows), options.options if folder else ""]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True)
        return float(done.stdout.split()[-1])

    what, at = "`map` of the 50 ms model", f"{options.rows} rows, batches of 16"
    yield from measured(options, what, "`multiprocessing.Pool.map`", at, "1.0", measure, measure)


FOUR = "--workers 4 --threads 1"


def start(options):
    yield from until(options, "to the first add answered", "below 2.2", lambda target: True)


def start_all(options):
    yield from until(options, "to all workers ready", "2.9", Target.has_all_workers)


def until(options, what: str, goal: str, is_done: Callable[[Target], bool]):
    """Seconds from the start of the program to the first add answered, and what is to come after that."""

    def measure(folder: str) -> float:
        started = time.perf_counter()
        with ours(folder, "starlette", FOUR, ready="/?value=1") as target:
            wait_until(lambda: is_done(target))
            return time.perf_counter() - started

    yield from measured(options, f"seconds from start {what}", IMPORT, FOUR, goal, measure, import_tensorflow)


IMPORT = "`import tensorflow.compat.v1` alone"


def import_tensorflow() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import tensorflow.compat.v1"], check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def wait_until(condition: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            sys.exit(f"not within {seconds} s: {condition}")
        time.sleep(0.02)


def memory(options):
    def used(folder: str, workers: int, model: str | None = None) -> float:
        with ours(folder, "starlette", f"--workers {workers} --threads 1", model) as target:
            target.ask("/?value=1")
            return pss_mb(target.pid)

    def bare() -> float:
        command, pipe = "import tensorflow; print(flush=True); input()", subprocess.PIPE
        with subprocess.Popen([sys.executable, "-c", command], stdin=pipe, stdout=pipe, stderr=pipe) as process:
            process.stdout.readline()
            megabytes = pss_mb(process.pid)
            process.communicate(b"\n")
            return megabytes

    once = argparse.Namespace(folders=options.folders, rounds=1)
    yield from measured(
        once,
        "memory (PSS) that a 400 MB model adds",
        "400 MB",
        FOUR,
        "below 1.25",
        lambda folder: used(folder, 4, "heavy") - used(folder, 4),
        lambda: 400.0,
    )
    yield from measured(
        once,
        "memory (PSS) of one more worker",
        "a bare process with tensorflow imported",
        FOUR,
        "below 1.1",
        lambda folder: used(folder, 5) - used(folder, 4),
        bare,
    )


def save_heavy(folder: str) -> None:
    """A SavedModel with 400 MB of weights."""
    import tensorflow.compat.v1 as tf

    with tf.Graph().as_default(), tf.Session() as session:
        [(inputs, outputs)] = heavy(tf).values()
        session.run(tf.global_variables_initializer())
        tf.saved_model.simple_save(session, folder, inputs, outputs)


def reload(options):
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "save", f"{folder}/1"], check=True, capture_output=True)
        command = [os.path.join(REPOSITORY, "ray_tensorflow_starlette.py"), *options.options.split()]
        with running(*command, "--model", f"heavy={folder}", ready="/health") as target:
            before, during = [], []
            for version in range(2, options.rounds + 2):
                before.append(1000 * burst(target, 8, 6)["p99"])
                link = functools.partial(shutil.copytree, f"{folder}/1", f"{folder}/{version}", copy_function=os.link)
                threading.Timer(1, link).start()
                during.append(1000 * burst(target, 8, 6)["p99"])
                if target.ask(f"/v1/models/heavy/versions/{version}")[0] != 200:
                    sys.exit(f"version {version} did not come")
            yield row(
                "p99 of adds in the 6 s in which a version of 400 MB comes / before",
                "8 clients",
                "below 3",
                during,
                before,
            )


def images(options):
    """Images of 224 x 224 x 3 numbers there and back, as JSON and as ``.npy``, beside what reads JSON by default."""
    kinds = [kind for kind in ("mosec_json", "litserve") if importlib.util.find_spec(NEEDS[kind])]
    for model in IMAGES:
        with contextlib.ExitStack() as stack:
            servers = [
                stack.enter_context(ours(folder, "starlette", options.options, model)) for folder in options.folders
            ]
            others = {NAMES[kind]: stack.enter_context(other(kind, model)) for kind in kinds}
            check_same([*servers, *others.values()])
            for clients, form in itertools.product((1, 16), ("json", "npy")):
                yield from images_in_turn(options, clients, form, servers, others)


def images_in_turn(options, clients: int, form: str, servers: list[Target], others: dict[str, Target]):
    mine, *those = [server._replace(form=form) for server in servers]
    what, at = f"{mine.model.replace('_', ' of ')} as {form}", f"{clients} clients"
    sides = dict(zip([THAT], (that for that in those if that.ask()[0] == 200))) | others
    if those and THAT not in sides:
        yield lacking(what, at)
    if form == "npy":
        sides["the same as json"] = servers[0]
    first, *rest = in_turn(options, clients, [mine, *sides.values()])
    for name, bursts in zip(sides, rest):
        rates, seconds = [[[burst[key] for burst in side] for side in (first, bursts)] for key in ("rate", "p50")]
        goal = "4.5" if form == "json" and name == NAMES["mosec_json"] else ""
        yield row(f"{what} / {name}", at, goal, *rates, f"{cpu_text(first)} / {cpu_text(bursts)}")
        if name == "the same as json" and clients == 1:
            yield row(f"seconds for an {what} / {name}", at, "0.25", *seconds)


IMAGE_WORKERS = 2  # processes of the others; as many as we have workers by default


def recovery(options):
    """From SIGKILL until all is well again."""
    with contextlib.ExitStack() as stack:
        targets = {folder: stack.enter_context(ours(folder, "starlette", FOUR)) for folder in options.folders}

        def kill_worker(folder: str) -> float:
            target, started = targets[folder], time.perf_counter()
            before = target.health()["workers"][0]["restarts"]
            os.kill(target.health()["workers"][0]["pid"], signal.SIGKILL)
            is_back = lambda: target.health()["workers"][0]["restarts"] > before and target.has_all_workers()
            wait_until(is_back)
            return time.perf_counter() - started

        def kill_server(folder: str) -> float:
            target = targets[folder]
            wait_until(target.has_all_workers)
            started, [server] = time.perf_counter(), target.health()["parameter_servers"]
            os.kill(server["pid"], signal.SIGKILL)
            wait_until(lambda: not os.path.exists(f"/proc/{server['pid']}"))  # an add on its way is no next one
            wait_until(lambda: target.ask("/?value=1")[0] == 200)
            took = time.perf_counter() - started
            wait_until(target.has_all_workers)
            return took

        for measure, what in (
            (kill_worker, "seconds from SIGKILL of a worker to all ready"),
            (kill_server, "seconds from SIGKILL of the parameter server to the next add"),
        ):
            yield from measured(options, what, IMPORT, FOUR, "", measure, import_tensorflow, that_goal="0.6")


def footprint(options):
    """A server without a model, or with a function of one's own: its memory, and what it costs when nobody asks."""
    idle_s, one = 10, "--workers 1 --threads 1"
    goals = {one: (1000.0, ""), f"{one} --model benchmark:fast": (1150.0, ""), FOUR: (1350.0, "1.0")}

    def used(folder: str, at: str) -> tuple[float, float]:
        with ours(folder, "starlette", at) as target:
            target.ask("/?value=1")
            time.sleep(2)
            before = cpu_ms(target.pid).total()
            time.sleep(idle_s)
            return pss_mb(target.pid), (cpu_ms(target.pid).total() - before) / idle_s / 10

    found = {(folder, at): used(folder, at) for folder in options.folders for at in goals}
    once = argparse.Namespace(folders=options.folders, rounds=1)
    for at, (mb, goal) in goals.items():
        what = "memory (PSS) of a server, MB"
        yield from measured(once, what, f"{mb:,.0f} MB", at, goal, lambda f: found[f, at][0], lambda: mb)
    what = "processor when nobody asks"
    yield from measured(once, what, "1 % of a core", FOUR, "", lambda folder: found[folder, FOUR][1], lambda: 1.0)


def mixed(options):
    """Slow requests beside everybody else's, with the defaults: medians of the others beside what they are alone."""
    models = "--model benchmark:fast --model benchmark:slow"
    for clients, goal in ((2, "below 4"), (4, "below 5"), (16, "below 8")):
        yield from beside(options, FOUR, models, ("slow", clients), (("fast", 2), ("adds", 2)), goal)


def crowded(options):
    """A queue that never empties beside a fast model."""
    options_of_it = "--workers 2 --threads 1 --max-batch 4"
    yield from beside(options, options_of_it, "--model benchmark:fast", ("adds", 64), (("fast", 2),), "below 6")


def beside(options, command: str, models: str, busy: tuple[str, int], others: tuple[tuple[str, int], ...], goal: str):
    """Medians of some clients beside busy ones and alone, on one server of each version."""
    words = {"slow": "a 2 s model", "fast": "a fast model", "adds": "adds"}
    found = {}
    for folder in options.folders:
        with ours(folder, "starlette", f"{command} {models}") as server:
            targets = {"adds": server} | {
                name: server._replace(path=f"/v1/models/{name}:predict", model=name) for name in ("fast", "slow")
            }
            for name, _ in (busy, *others):  # "ready" may be told while a model is still loaded
                wait_until(lambda: targets[name].ask()[0] == 200)
            for _ in range(options.rounds):
                alone = at_once(options.seconds, *((targets[name], clients) for name, clients in others))
                with concurrent.futures.ThreadPoolExecutor() as pool:
                    start_s = 2 if busy[0] == "slow" else 0.5
                    noise = pool.submit(burst, targets[busy[0]], busy[1], options.seconds + start_s + 1)
                    time.sleep(start_s)  # until they are under way
                    both = at_once(options.seconds, *((targets[name], clients) for name, clients in others))
                    failed = noise.result()["errors"] + sum(one["errors"] for one in both)
                for (name, _), first, second in zip(others, both, alone):
                    found.setdefault((folder, name), []).append((1000 * first["p50"], 1000 * second["p50"], failed))
    for name, clients in others:
        at = f"{busy[1]} clients of {words[busy[0]]}, {clients} of {words[name]}, {command}"
        mine, *those = [list(zip(*found[folder, name])) for folder in options.folders]
        yield row(f"ms for {words[name]} beside busy clients / alone", at, goal, *mine[:2], f"{sum(mine[2])} failed")
        for that in those:
            what = f"ms for {words[name]} beside busy clients / {THAT}"
            yield row(what, at, "", mine[0], that[0], f"{sum(mine[2])} failed / {sum(that[2])} failed")


def page(options):
    """Adds beside what a page that is looked at asks each second."""
    rates, seconds = [], max(3.0, options.seconds)
    with ours(options.folders[0], "starlette", options.options) as server:
        burst(server, 16, 1.0)
        for _ in range(options.rounds):
            without = burst(server, 16, seconds)
            with concurrent.futures.ThreadPoolExecutor() as pool:
                asked = [server._replace(path=path) for path in ("/health", "/metrics")]
                pages = [pool.submit(burst, target, 1, seconds + 2, rate=1.0) for target in asked]
                time.sleep(1.5)  # until they are under way
                both = burst(server, 16, seconds)
                failed = both["errors"] + sum(page.result()["errors"] for page in pages)
            rates.append((both["rate"], without["rate"], failed))
    mine, others, failed = zip(*rates)
    yield row("adds beside what the page asks / without", "16 clients", "0.95", mine, others, f"{sum(failed)} failed")


def at_once(seconds: float, *loads: tuple[Target, int]) -> list[dict[str, Any]]:
    """Bursts on several targets at the same time."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(lambda load: burst(*load, seconds), loads))


PARTS = {
    name: functools.partial(compare, what=what, front_end=front_end, model=model, goals=goals)
    for name, (what, front_end, model, goals) in COMPARISONS.items()
}
PARTS |= {"latency": latency, "reload": reload, "map": mapped, "start": start, "memory": memory}
PARTS |= {"images": images, "start_all": start_all, "recovery": recovery, "footprint": footprint}
PARTS |= {"mixed": mixed, "crowded": crowded, "page": page}
INSIDE = {
    "constant": serve_constant,
    "gathered": serve_gathered,
    "mosec": serve_mosec,
    "ray_serve": serve_ray_serve,
    "mosec_json": serve_mosec_json,
    "litserve": serve_litserve,
    "map": map_rows,
    "load": run_load,
    "save": save_heavy,
}  # what runs in processes of its own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="bursts of each (default: 3)")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of a burst (default: 1.5)")
    parser.add_argument("--rows", type=int, default=480, help="rows for map (default: 480; about 20 a second are done)")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas (default: %(default)s)")
    parser.add_argument("--against", metavar="FOLDER", help="a checkout of another version of this project")
    parser.add_argument("--options", default="--workers 2 --threads 2", help="of our front ends (default: %(default)s)")
    options = parser.parse_args()
    options.folders = [os.path.abspath(folder) for folder in (REPOSITORY, options.against) if folder]
    columns = "what", "at", "ratio: median (least to most)", "goal", "the two medians", "CPU ms a request"
    parts = (PARTS[name](options) for name in options.only.split(","))
    try:
        for cells in itertools.chain([columns, ["---"] * len(columns)], *parts):
            print("|", " | ".join(cells), "|", flush=True)
    except Lacks as error:  # it is ours, or one of the others, that does not serve
        sys.exit(str(error))


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in INSIDE:
        INSIDE[sys.argv[1]](*(argument for argument in sys.argv[2:] if argument != "--port"))
    else:
        main()
