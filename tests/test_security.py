"""Who can reach a front end's processes; what comes over HTTP is never unpickled, evaluated, or used as a path."""

import base64
import contextlib
import glob
import io
import json
import os
import pickle
import re
import socket
import struct
import subprocess
import sys
from urllib.parse import quote

import numpy as np
import pytest
from conftest import error, family, plain_environment
from websockets.sync.client import connect

SECRET = "what no answer may hold"
LOOPBACK = "0100007F", "0000000000000000FFFF00000100007F", "0" * 24 + "01000000"  # 127.0.0.1, as IPv6 has it, and ::1


@pytest.fixture
def commands(front_end) -> dict[int, str]:
    return family(front_end.process.pid)


@pytest.fixture
def listening(commands) -> dict[tuple[str, int], str]:
    """(address in hexadecimal, port) to command line, of every TCP socket of all its processes that listens."""
    owners, found = {}, {}
    for pid, command in commands.items():
        for path in glob.glob(f"/proc/{pid}/fd/*"):
            with contextlib.suppress(OSError):
                owners[os.readlink(path)] = command
    for table in ("tcp", "tcp6"):
        with open(f"/proc/net/{table}") as file:
            for fields in map(str.split, file.readlines()[1:]):
                if fields[3] == "0A" and (command := owners.get(f"socket:[{fields[9]}]")):
                    address, port = fields[1].split(":")
                    found[address, int(port, 16)] = command
    return found


def test_everything_but_one_port_of_tensorflows_listens_on_this_machine_alone(front_end, commands, listening):
    """grpc_server_lib.cc asks for 0.0.0.0 whatever the ClusterSpec says, which gRPC makes [::] where there is IPv6."""
    for name in ("gcs_server", "raylet", "ray::ParameterServer", "ray::Worker"):
        assert any(name in command for command in commands.values())
    assert (LOOPBACK[0], front_end.port) in listening
    [command] = [command for (address, _), command in listening.items() if address not in LOOPBACK]
    assert command.startswith("ray::ParameterServer")


def raylet(commands: dict[int, str]) -> tuple[int, str]:
    return next((pid, command) for pid, command in commands.items() if "/raylet " in command)


def test_ray_refuses_who_has_no_token_which_is_on_no_command_line(commands):
    address = re.search(r"--gcs-address=(\S+)", raylet(commands)[1])[1]
    program = f"from ray._raylet import GcsClient; print(GcsClient({address!r}).internal_kv_keys(b'', None))"
    environment = plain_environment() | {"RAY_AUTH_MODE": "disabled"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and done.stdout == "" and "token" in done.stderr.lower(), done
    with open(f"/proc/{raylet(commands)[0]}/environ", "rb") as file:
        token = re.search(rb"\0RAY_AUTH_TOKEN=(\w{64})\0", file.read())[1].decode()
    assert not any(token in command for command in commands.values())


def test_no_other_user_of_the_machine_gets_at_its_files(commands):
    """Ray's own folder is open to everybody, sockets included; the one around it is not."""
    folder = re.search(r"--raylet_socket_name=(/\S*?/ray_tensorflow_\w+)/", raylet(commands)[1])[1]
    assert os.stat(folder).st_mode & 0o777 == 0o700


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def canary(tmp_path):
    """A path that exists after the test only if the server did what a request wanted of it."""
    path = str(tmp_path / "canary")
    yield path
    assert not os.path.exists(path)
    pickle.loads(bombs(path)[0])  # and this is how it would have come into being
    assert os.path.exists(path)


@pytest.fixture
def secret(tmp_path) -> str:
    """The path of a file that the server could read."""
    (tmp_path / "secret").write_text(SECRET)
    return str(tmp_path / "secret")


def bombs(canary: str) -> list[bytes]:
    """A pickle, and what numpy.load would unpickle."""
    file = io.BytesIO()
    np.save(file, np.array([Bomb(canary)], object), allow_pickle=True)
    return [pickle.dumps(Bomb(canary), 2), file.getvalue()]


def expressions(canary: str) -> list[str]:
    call = f"__import__('os').mkdir({canary!r})"
    return [call, f"{{{{{call}}}}}", f"$(mkdir {canary})", f"!!python/object/apply:os.mkdir [{canary}]"]


def places(secret: str) -> list[str]:
    """What would be a path or a function, if a name could be one."""
    return [
        "/etc/passwd",
        secret,
        "../" * 12 + secret.lstrip("/"),
        "..%2f" * 12 + "etc%2fpasswd",
        f"file://{secret}",
        f"{secret}\0.pb",
        "os:system",
        "example_models:linear",
    ]


def assert_is_refused(answer):
    assert 400 <= answer.status < 500
    message = error(answer, answer.status)
    assert SECRET not in message and "root:" not in message


@pytest.mark.parametrize("key", [b"", bytes(32)], ids=["no key", "a wrong one"])
def test_a_worker_takes_nothing_from_whoever_has_not_its_key(front_end, listening, canary, key):
    message, answers = bombs(canary)[0], []
    for (_, port), command in listening.items():
        if command.startswith("ray::Worker"):
            with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port), 10) as connection:
                connection.sendall(key + struct.pack("<IQ", 1, len(message)) + message)
                answers.append(connection.recv(1000))
    assert b"" in answers  # the others are Ray's own
    assert front_end.get("/?value=0").status == 200


def test_neither_a_body_nor_a_value_is_ever_unpickled_or_evaluated(front_end, canary):
    for bomb in bombs(canary):
        headers = {"Content-Type": "application/x-python-pickle"}
        assert_is_refused(front_end.request("POST", "/v1/models/adder:predict", bomb, headers))
    for value in [{"b64": base64.b64encode(bomb).decode()} for bomb in bombs(canary)] + expressions(canary):
        assert_is_refused(front_end.predict("linear", {"instances": [value]}))
    for expression in expressions(canary):
        assert_is_refused(front_end.get(f"/?value={quote(expression)}"))


def test_a_name_is_never_a_path_nor_a_function(front_end, secret):
    for name in places(secret):
        for written in (quote(name, safe=""), quote(name)):
            for path in (f"v1/models/{written}/metadata", f"v1/models/linear/versions/{written}", written):
                assert_is_refused(front_end.get(f"/{path}"))
            assert_is_refused(front_end.predict(written, {"instances": [[1, 2, 3]]}))
        assert_is_refused(front_end.predict("linear", {"signature_name": name, "instances": [[1, 2, 3]]}))
        assert_is_refused(front_end.predict("linear", {"instances": [{name: [1, 2, 3]}]}))


@pytest.mark.parametrize("front_end", ["starlette"], indirect=True)
def test_a_message_of_the_websocket_is_never_unpickled_evaluated_or_a_path(front_end, canary, secret):
    documents = [{"value": text} for text in expressions(canary)]
    documents += [{"model": name, "instances": [1]} for name in places(secret)]
    messages = [*bombs(canary), *expressions(canary), *map(json.dumps, documents)]
    with connect(f"ws://127.0.0.1:{front_end.port}/ws") as ws:
        for message in messages:
            ws.send(message)
        answers = [ws.recv(timeout=60) for _ in messages]
    assert all("error" in json.loads(answer) and SECRET not in answer and "root:" not in answer for answer in answers)
