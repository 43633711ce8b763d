"""Other people's servers: the same requests get the same answers from each of them, under a prefix too."""

import _thread
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import types

import pytest
from conftest import REPOSITORY, Server, free_port, wait_until
from test_readme import BLOCKS
from websockets.sync.client import connect

from shared_graph.errors import Error
from shared_graph.threads import check_threads

REQUESTS = [  # method, path, body, status, answer; None: whatever it is, and empty for HEAD
    ("GET", "/?value=0", None, 200, '{"result":0.0}'),
    ("GET", "/?value=x", None, 400, '{"error":"value must be one finite number, not \'x\'"}'),
    ("HEAD", "/", None, 405, ""),
    ("POST", "/", b"", 405, '{"error":"/ answers GET, not POST"}'),
    ("GET", "/health", None, 200, None),
    ("HEAD", "/health", None, 200, ""),
    ("GET", "/metrics", None, 200, None),
    ("GET", "/monitoring/prometheus/metrics", None, 200, None),
    ("GET", "/dashboard", None, 200, None),
    ("GET", "/v1/models", None, 400, '{"error":"Missing model name in request."}'),
    (
        "GET",
        "/v1/models/%6Cinear",
        None,
        200,
        '{"model_version_status":[{"version":"1","state":"AVAILABLE","status":{"error_code":"OK","error_message":""}}]}',
    ),
    ("GET", "/v1/models/linear/versions/1/metadata", None, 200, None),
    ("GET", "/v1/models/a%2Fb", None, 404, None),
    ("HEAD", "/v1/models/linear", None, 400, ""),
    ("OPTIONS", "/v1/models/linear", None, 400, '{"error":"Malformed request: OPTIONS /v1/models/linear"}'),
    ("POST", "/v1/models/linear:predict", b'{"instances":[[1,0,0]]}', 200, '{"predictions":[[1.5,1.5]]}'),
    ("POST", "/V1/models/linear/versions/1:predict?x=/", b'{"inputs":[[1,0,0]]}', 200, '{"outputs":[[1.5,1.5]]}'),
    (
        "POST",
        "/v1/models/linear%3Apredict",
        b"{}",
        400,
        '{"error":"Malformed request: POST /v1/models/linear%3Apredict"}',
    ),
    ("POST", "/v1/models/a%2Fb:predict", b"{}", 404, '{"error":"Servable not found for request: Latest(a/b)"}'),
    (
        "POST",
        "/v1/models/linear/labels/no%20such:predict",
        b"{}",
        400,
        '{"error":"Unrecognized servable version label: no such"}',
    ),
]

MOUNTED = """
from starlette.applications import Starlette
from starlette.routing import Mount
import ray_tensorflow_starlette
ours = ray_tensorflow_starlette.app
app = Starlette(routes=[Mount("/tf", ours)], lifespan=ours.router.lifespan_context)
without = Starlette(routes=[Mount("/tf", ours)])
"""
GUNICORN = "-m gunicorn --bind 127.0.0.1:{port} --timeout 0 --threads 128 ray_tensorflow_flask:app"
UVICORN = "-m uvicorn --port {port} ray_tensorflow_starlette:app"
SERVERS = {  # command, prefix of the requests, environment
    "gunicorn": (GUNICORN, "", {}),
    "gunicorn with SCRIPT_NAME": (GUNICORN, "/tf", {"SCRIPT_NAME": "/tf"}),
    "uvicorn": (UVICORN, "", {}),
    "uvicorn with --root-path": (f"{UVICORN} --root-path /tf", "", {}),
    "uvicorn with --workers 2": (f"{UVICORN} --workers 2", "", {}),
    "Mount": ("-m uvicorn --port {port} mounted:app", "/tf", {}),
    "Mount without lifespan": ("-m uvicorn --port {port} mounted:without", "/tf", {}),
}


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@pytest.mark.long
@pytest.mark.parametrize("name", SERVERS)
def test_the_same_requests_get_the_same_answers_from_each_server(name, tmp_path):
    command, prefix, more = SERVERS[name]
    if "gunicorn" in command and not has("gunicorn"):
        pytest.skip("gunicorn is not installed")
    (tmp_path / "mounted.py").write_text(MOUNTED)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([REPOSITORY, str(tmp_path), os.environ["PYTHONPATH"]]),
        "RAY_TENSORFLOW_WORKERS": "1",
        "RAY_TENSORFLOW_MODEL": "example_models:linear",
    }
    command = [sys.executable, *command.split()]
    with Server(name, command=command, cwd=tmp_path, env=environment | more) as server:
        wait_until(server.is_listening)
        wait_until(lambda: ready_in_a_row(server, prefix) == 20, what="all processes to be ready")
        for method, path, body, status, expected in REQUESTS:
            answer = server.request(method, prefix + path, body)
            assert answer.status == status, (method, path, answer)
            assert expected is None or answer.body.decode() == expected, (method, path, answer)
        # uvicorn ends a program whose lifespan it does not know to be ours by SIGTERM itself, as if killed
        number = signal.SIGINT if "without" in name else signal.SIGTERM
        assert server.stop(number) in (0, 1, 128 + number, -number)
        output = server.output()
        assert "Traceback" not in output
        assert (
            " INFO starting: 1 worker\n" in output
            and " INFO ready: 1 worker\n" in output
            and " INFO stopping" in output
        )


NGINX = """
daemon off; worker_processes 1; pid nginx.pid; error_log stderr;
events {}
http {
    access_log off; client_body_buffer_size 64m; proxy_max_temp_file_size 0;  # without files
    client_body_temp_path body; proxy_temp_path proxy;
    fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    map $http_upgrade $connection_upgrade { default upgrade; "" ""; }
    server {
        listen 127.0.0.1:PORT;
        LOCATION
    }
}
"""


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed")
def test_behind_nginx_as_the_readme_has_it_all_is_answered_below_the_prefix(tmp_path):
    [block] = [block for block in BLOCKS if block.language == "nginx"]
    with Server("starlette", "--workers", "1", "--model", "example_models:linear") as server:
        server.wait_ready(1)
        text = NGINX.replace("LOCATION", block.text.replace("8080", str(server.port)))
        port = free_port()
        (tmp_path / "nginx.conf").write_text(text.replace("PORT", str(port)))
        command = ["nginx", "-e", "stderr", "-p", str(tmp_path), "-c", "nginx.conf"]
        with Server("nginx", command=command) as nginx:
            nginx.port = port
            wait_until(nginx.is_listening)
            for method, path, body, status, expected in REQUESTS:
                if "%" not in path:  # nginx passes a path on as it understands it
                    answer = nginx.request(method, "/graph" + path, body)
                    assert answer.status == status, (method, path, answer)
                    assert expected is None or answer.body.decode() == expected, (method, path, answer)
            large = b'{"inputs": [%b]}' % b",".join([b"[1,0,0]"] * 500_000)  # past nginx's own limit of 1 MiB
            assert nginx.request("POST", "/graph/v1/models/linear:predict", large).status == 200
            with connect(f"ws://127.0.0.1:{port}/graph/ws") as socket:
                socket.send('{"id": 1, "model": "linear", "instances": [[1, 0, 0]]}')
                assert json.loads(socket.recv(30)) == {"id": 1, "predictions": [[1.5, 1.5]]}


def ready_in_a_row(server, prefix: str) -> int:
    """How often, of 20 times, the process which answers is ready, and has heard that its worker has the model."""
    is_ready = lambda: server.get(f"{prefix}/health").status == 200
    is_available = lambda: b'"AVAILABLE"' in server.get(f"{prefix}/v1/models/linear").body
    return sum(is_ready() and is_available() for _ in range(20))


@pytest.mark.long
@pytest.mark.skipif(not (has("gunicorn") and has("gevent")), reason="gunicorn or gevent is not installed")
def test_gunicorn_with_gevent_is_refused_at_once_with_what_to_use(tmp_path):
    command = [sys.executable, "-m", "gunicorn", "--worker-class", "gevent", "--bind", "127.0.0.1:0"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([REPOSITORY, os.environ["PYTHONPATH"]])}
    done = subprocess.run(
        [*command, "ray_tensorflow_flask:app"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 3 and "use gunicorn's threads (--worker-class gthread" in done.stderr


@pytest.mark.parametrize("module", ["gevent._socket3", "eventlet.greenio.base"])
@pytest.mark.parametrize("replaced", [(socket, "socket"), (_thread, "start_new_thread")])
def test_threads_that_are_none_are_refused_with_what_to_use(monkeypatch, module, replaced):
    check_threads()
    monkeypatch.setattr(*replaced, types.SimpleNamespace(__module__="socks"))
    check_threads()
    monkeypatch.setattr(*replaced, types.SimpleNamespace(__module__=module))
    with pytest.raises(Error, match=r"^(gevent|eventlet) .*use gunicorn's threads"):
        check_threads()
