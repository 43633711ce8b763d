"""How fast, and in how much memory: this project beside what one would do without it, measured in one run.

    python tests/benchmark.py                                # everything; prints a table
    python tests/benchmark.py --only adds,start --rounds 5   # some parts, more rounds

All servers of a comparison are up at the same time, and bursts of load go to them in turn (A B C A B C ...), since these
machines drift: a figure is the median of the ratios of neighbouring bursts, with their spread. Load comes from `wrk` where it
is installed, else from a client of our own in a process of its own.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
REPOSITORY = os.path.dirname(HERE)
sys.path[:0] = [REPOSITORY, HERE]


# -- the models --------------------------------------------------------------------------------------------------------


def small(tf):
    """A convolutional network of about 3 ms a run on two cores: 28 x 28 pixels to 10 classes."""
    return network(tf, [64, 128, 192, 192], 28)


def large(tf):
    """The same kind with about 50 ms a run."""
    return network(tf, [512, 768, 768, 768], 28)


def network(tf, channels: list[int], size: int):
    x = tf.placeholder(tf.float32, [None, size, size], name="x")
    y = x[..., tf.newaxis]
    for layer, width in enumerate(channels):
        initializer = tf.glorot_uniform_initializer(seed=layer)
        y = tf.nn.relu(tf.nn.conv2d(y, tf.get_variable(f"kernel_{layer}", [3, 3, y.shape[-1], width], initializer=initializer), 1, "SAME"))
    weights = tf.get_variable("weights", [channels[-1], 10], initializer=tf.glorot_uniform_initializer(seed=9))
    return {"serving_default": ({"x": x}, {"y": tf.nn.softmax(tf.matmul(tf.reduce_mean(y, [1, 2]), weights))})}


def heavy(tf):
    """400 MB of weights."""
    x = tf.placeholder(tf.int64, [None], name="x")
    table = tf.get_variable("table", [1_000_000, 100], initializer=tf.random_uniform_initializer(seed=0))
    return {"serving_default": ({"x": x}, {"y": tf.gather(table, x)})}


SIZES = {"small": 28, "large": 28}


def body(model: str) -> bytes:
    size = SIZES[model]
    return json.dumps({"instances": [[[(i * j % 7) / 7 for i in range(size)] for j in range(size)]]}).encode()


# -- what it is compared with ------------------------------------------------------------------------------------------


def private_session(model: str):
    """A plain session of all cores in this process: run(array) -> array."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import tensorflow.compat.v1 as tf

    tf.disable_eager_execution()
    with tf.Graph().as_default():
        (inputs, outputs), = globals()[model](tf).values()
        session = tf.Session()
        session.run(tf.global_variables_initializer())
        run = session.make_callable(outputs["y"], [inputs["x"]])
    run([[[0.0] * SIZES[model]] * SIZES[model]])
    return run


def constant_app():
    """Starlette answering a constant: the limit of any server on it."""
    from starlette.applications import Starlette
    from starlette.responses import Response
    from starlette.routing import Route

    async def constant(request):
        return Response(b'{"result": 1.0}', media_type="application/json")

    return Starlette(routes=[Route("/", constant)])


def threads_app(model: str):
    """An in-process session in Starlette's thread pool, one run a request."""
    import numpy as np
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    run = private_session(model)

    async def predict(request):
        instances = json.loads(await request.body())["instances"]
        result = await run_in_threadpool(run, np.array(instances, np.float32))
        return JSONResponse({"predictions": result.tolist()})

    return Starlette(routes=[Route("/{path:path}", predict, methods=["POST"])])


def gathered_app(model: str):
    """An in-process session, requests gathered by hand: what queued up while the last run went is the next run."""
    import numpy as np
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    run = private_session(model)
    waiting = []
    running = False

    async def work():
        nonlocal running
        running = True
        while waiting:
            batch, waiting[:] = waiting[:64], waiting[64:]
            result = await asyncio.to_thread(run, np.concatenate([rows for rows, _ in batch]))
            for row, (_, future) in zip(result, batch):
                future.set_result(row)
        running = False

    async def predict(request):
        rows = np.array(json.loads(await request.body())["instances"], np.float32)
        future = asyncio.get_running_loop().create_future()
        waiting.append((rows, future))
        if not running:
            asyncio.create_task(work())
        return JSONResponse({"predictions": [(await future).tolist()]})

    return Starlette(routes=[Route("/{path:path}", predict, methods=["POST"])])


def serve(kind: str, port: int) -> None:
    """Run one of the above, in a process of its own."""
    name, _, model = kind.partition(":")
    if name == "flask":
        from flask import Flask, Response
        from werkzeug.serving import make_server

        import logging

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        app = Flask("constant")
        app.route("/")(lambda: Response(b'{"result": 1.0}', mimetype="application/json"))
        make_server("127.0.0.1", port, app, threaded=True).serve_forever()
    else:
        import uvicorn

        app = {"constant": lambda _: constant_app(), "threads": threads_app, "gathered": gathered_app}[name](model)
        uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


@contextlib.contextmanager
def running(*command: str, ready: str = "/"):
    """A server process for as long as the block runs; its port. Ready when the path answers 2xx to 4xx and nothing is starting."""
    from conftest import free_port

    port = free_port()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([HERE, REPOSITORY])}
    process = subprocess.Popen([sys.executable, *command, "--port", str(port)], env=environment, stderr=subprocess.DEVNULL)
    try:
        while True:
            if process.poll() is not None:
                sys.exit(f"{' '.join(command)} ended with status {process.returncode}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", ready)
                response = connection.getresponse()
                text = response.read()
                if response.status < 500 and b'"starting"' not in text:
                    break
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait()


def ours(front_end: str, *options: str):
    return running(os.path.join(REPOSITORY, f"ray_tensorflow_{front_end}.py"), *options, ready="/health")


def other(kind: str):
    return running(os.path.abspath(__file__), "--serve", kind)


# -- load --------------------------------------------------------------------------------------------------------------


class Client(asyncio.Protocol):
    """One connection of the client of our own: the next request goes out as soon as the answer to the last is there."""

    def __init__(self, request: bytes, load: "Load"):
        self.request, self.load, self.buffer = request, load, b""

    def connection_made(self, transport):
        self.transport = transport
        self.send()

    def send(self):
        self.sent = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data):
        self.buffer += data
        head, separator, rest = self.buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        if len(rest) < length:
            return
        self.buffer = b""
        self.load.answered(head.split(b" ", 2)[1] == b"200", time.perf_counter() - self.sent)
        if time.perf_counter() >= self.load.end:
            self.transport.close()
        elif self.load.pause:
            asyncio.get_running_loop().call_later(self.load.pause(), self.send)
        elif b"connection: close" not in head.lower():
            self.send()

    def connection_lost(self, error):
        self.load.lost(self)


class Load:
    """Some clients for some seconds on one port."""

    def __init__(self, port: int, clients: int, seconds: float, path: str, data: bytes | None, rate: float | None = None):
        self.port, self.clients = port, clients
        head = f"{'POST' if data else 'GET'} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data or b'')}\r\n\r\n"
        self.bytes = head.encode() + (data or b"")
        self.count, self.errors, self.times = 0, 0, []
        self.seconds, self.rate = seconds, rate
        self.pause = (lambda: max(0.0, self.interval())) if rate else None
        self.next = 0.0

    def interval(self) -> float:
        """Until the next request is due, at a constant rate over all clients."""
        self.next = max(self.next, time.perf_counter() - 1) + 1 / self.rate
        return self.next - time.perf_counter()

    def answered(self, good: bool, seconds: float) -> None:
        self.count, self.errors = self.count + good, self.errors + (not good)
        self.times.append(seconds)

    def lost(self, client: Client) -> None:
        if time.perf_counter() < self.end:
            self.open()
        else:
            self.left -= 1
            if not self.left:
                self.done.set_result(None)

    def open(self) -> None:
        loop = asyncio.get_running_loop()

        async def connect():
            try:
                await loop.create_connection(lambda: Client(self.bytes, self), "127.0.0.1", self.port)
            except OSError:
                loop.call_later(0.01, self.lost, None)

        self.tasks.add(task := loop.create_task(connect()))
        task.add_done_callback(self.tasks.discard)

    async def run(self) -> dict:
        self.done, self.left, self.tasks = asyncio.get_running_loop().create_future(), self.clients, set()
        start = self.next = time.perf_counter()
        self.end = start + self.seconds
        for _ in range(self.clients):
            self.open()
        await asyncio.wait_for(self.done, self.seconds + 60)
        times = sorted(self.times)
        return {"rate": self.count / (time.perf_counter() - start), "errors": self.errors,
                "p50": times[len(times) // 2], "p99": times[len(times) * 99 // 100]}


def load(port: int, clients: int, seconds: float, path: str = "/", data: bytes | None = None, rate: float | None = None) -> dict:
    """Requests a second, errors, and latencies in seconds; from a process of its own."""
    if shutil.which("wrk") and rate is None:
        with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
            if data:
                script.write(f"wrk.method = 'POST'\nwrk.body = [==[{data.decode()}]==]\n")
            script.flush()
            command = ["wrk", "-t1", f"-c{clients}", f"-d{max(1, round(seconds))}s", "--latency", "-s", script.name, f"http://127.0.0.1:{port}{path}"]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        errors = sum(int(word) for line in text.splitlines() if "Non-2xx" in line for word in line.split() if word.isdigit())
        return {"rate": float(text.partition("Requests/sec:")[2].split()[0]), "errors": errors}
    arguments = json.dumps([port, clients, seconds, path, data and data.decode(), rate])
    return json.loads(subprocess.run([sys.executable, os.path.abspath(__file__), "--load", arguments], stdout=subprocess.PIPE, check=True).stdout)


def run_load(arguments: str) -> None:
    import uvloop

    port, clients, seconds, path, data, rate = json.loads(arguments)
    runner = Load(port, clients, seconds, path, data and data.encode(), rate)
    print(json.dumps(uvloop.run(runner.run())))


def in_turn(options, *bursts) -> list[list[float]]:
    """Each burst once for warming up, then all in turn; the rates of each."""
    for burst in bursts:
        burst(min(1.0, options.seconds))
    rates = [[] for _ in bursts]
    for _ in range(options.rounds):
        for own, burst in zip(rates, bursts):
            result = burst(options.seconds)
            if result["errors"]:
                sys.exit(f"a burst had {result['errors']} errors")
            own.append(result["rate"])
    return rates


def ratio(a: list[float], b: list[float]) -> str:
    ratios = sorted(x / y for x, y in zip(a, b))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


# -- the parts ---------------------------------------------------------------------------------------------------------


ADDERS = "--workers", "2"


def adds(options):
    with ours("starlette", *ADDERS, "--max-batch", "256") as server, ours("starlette", *ADDERS, "--max-batch", "1") as single, \
            other("constant") as constant:
        for clients, goal in ((256, 0.70), (16, 0.30)):
            a, b = in_turn(options, lambda s: load(server, clients, s), lambda s: load(constant, clients, s))
            yield "adds through Starlette / constant answer", f"{clients} clients", ratio(a, b), f"{goal:.2f}", a, b
        a, b = in_turn(options, lambda s: load(server, 64, s), lambda s: load(single, 64, s))
        yield "adds / the same with `--max-batch 1`", "64 clients", ratio(a, b), "20", a, b


def flask(options):
    with ours("flask", *ADDERS) as server, other("flask") as constant:
        a, b = in_turn(options, lambda s: load(server, 64, s), lambda s: load(constant, 64, s))
        yield "adds through Flask / constant answer, same server", "64 clients", ratio(a, b), "0.70", a, b


def predictions(options, model: str = "small", plan=((64, "1.2"), (16, "1.0"), (1, "0.65"))):
    arguments = ["--model", f"benchmark:{model}", "--placement", "mirrored", "--workers", str(os.cpu_count())]
    path, data = f"/v1/models/{model}:predict", body(model)
    with ours("starlette", *arguments) as server, other(f"gathered:{model}") as gathered, other(f"threads:{model}") as threads:
        for clients, goal in plan:
            a, b, c = in_turn(options, *(lambda s, port=port: load(port, clients, s, path, data) for port in (server, gathered, threads)))
            name = {"small": "3 ms", "large": "50 ms"}[model]
            yield f"predictions ({name} model) / in-process session, gathered by hand", f"{clients} clients", ratio(a, b), goal, a, b
            yield f"predictions ({name} model) / in-process session in the thread pool", f"{clients} clients", ratio(a, c), "", a, c


def slow(options):
    yield from predictions(options, "large", ((16, "0.95"),))


def latency(options):
    with ours("starlette", *ADDERS) as server:
        ratios = []
        for _ in range(options.rounds):
            top = load(server, 64, options.seconds)["rate"]
            result = load(server, 64, options.seconds, rate=top / 2)
            ratios.append(result["p99"] / result["p50"])
        ones = [1.0] * len(ratios)
        yield "p99 / p50 under constant load at half of the top rate", "adds, 64 clients", ratio(ratios, ones), "below 4", ratios, ones


POOL = """
import sys, time, multiprocessing
sys.path[:0] = {path!r}
import numpy as np
def start():
    global run
    import benchmark
    run = benchmark.private_session("large")
def work(rows):
    return run(rows)
if __name__ == "__main__":
    rows = np.random.default_rng(0).random(({rows}, 28, 28), np.float32)
    batches = np.array_split(rows, max(1, {rows} // 8))
    with multiprocessing.get_context("spawn").Pool(initializer=start) as pool:
        pool.map(work, batches[:2 * multiprocessing.cpu_count()])
        started = time.perf_counter()
        pool.map(work, batches)
        print(time.perf_counter() - started)
"""


def mapped(options):
    import numpy as np
    from ray_tensorflow import Cluster

    os.environ["PYTHONPATH"] = HERE
    rows = np.random.default_rng(0).random((options.rows, 28, 28), np.float32)
    batches = np.array_split(rows, max(1, options.rows // 8))
    a, b = [], []
    for _ in range(options.rounds):
        with Cluster(workers=os.cpu_count(), placement="mirrored", model="benchmark:large").start(os.cpu_count()) as cluster:
            list(cluster.map(batches[:2 * os.cpu_count()], "large"))
            started = time.perf_counter()
            for _ in cluster.map(batches, "large"):
                pass
            a.append(options.rows / (time.perf_counter() - started))
        with tempfile.TemporaryDirectory() as folder:
            script = os.path.join(folder, "pool.py")
            with open(script, "w") as file:
                file.write(POOL.format(path=[HERE, REPOSITORY], rows=options.rows))
            b.append(options.rows / float(subprocess.run([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout))
    yield f"`map` over {options.rows} rows of the 50 ms model / `multiprocessing.Pool.map`", "", ratio(a, b), "0.95", a, b


def start(options):
    a, b = [], []
    for _ in range(options.rounds):
        started = time.perf_counter()
        with running(os.path.join(REPOSITORY, "ray_tensorflow_starlette.py"), ready="/?value=1"):
            a.append(time.perf_counter() - started)
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import tensorflow"], check=True, stderr=subprocess.DEVNULL)
        b.append(time.perf_counter() - started)
    yield "from start to the first add answered / `import tensorflow` alone", "4 workers", ratio(a, b), "below 2.2", a, b


def pss_mb(pid: int) -> float:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:")) / 1024
    return 0.0


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    with contextlib.suppress(OSError):
        children = []
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                children += map(int, file.read().split())
        return [pid, *(p for child in children for p in family(child))]
    return []


def memory(options):
    from ray_tensorflow import Cluster

    os.environ["PYTHONPATH"] = HERE

    def measure(workers: int, **changes):
        with Cluster(workers=workers, **changes).start(workers) as cluster:
            cluster.add(1)
            return sum(map(pss_mb, family(os.getpid())))


    bare = subprocess.Popen([sys.executable, "-c", "import tensorflow; print(1, flush=True); input()"], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    bare.stdout.readline()
    alone = pss_mb(bare.pid)
    bare.communicate(b"\n")
    four, five, with_model = measure(4), measure(5), measure(4, model="benchmark:heavy")
    megabytes = [with_model - four]
    yield "memory (PSS) of all processes with a 400 MB model, over the same without it", "4 workers, shared", f"{megabytes[0]:.0f} MB", "below 500 MB", [with_model], [four]
    yield "memory (PSS) of one more worker / a bare process with tensorflow imported", "", ratio([five - four], [alone]), "below 1.1", [five - four], [alone]


PARTS = {"adds": adds, "flask": flask, "predictions": predictions, "slow": slow, "latency": latency, "map": mapped, "start": start, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="bursts of each (default: 3)")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of a burst (default: 1.5)")
    parser.add_argument("--rows", type=int, default=96, help="rows for map (default: 96; 10,000 take ten minutes a side)")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, separated by commas (default: {','.join(PARTS)})")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.port)
    if options.load:
        return run_load(options.load)
    print("| what | at | measured | goal | medians |\n| --- | --- | --- | --- | --- |", flush=True)
    for name in options.only.split(","):
        for what, at, measured, goal, a, b in PARTS[name](options):
            print(f"| {what} | {at} | {measured} | {goal} | {statistics.median(a):.4g} / {statistics.median(b):.4g} |", flush=True)


if __name__ == "__main__":
    main()
