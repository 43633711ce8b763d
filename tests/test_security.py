"""Who can reach a front end's processes, and where; what comes over HTTP is never unpickled, evaluated, or used as a path."""

import base64
import contextlib
import io
import ipaddress
import json
import os
import pickle
import re
import socket
import struct
import subprocess
import sys

import numpy as np
import pytest
from test_command import listeners
from test_places import descendants
from websockets.sync.client import connect

SECRET = "what no answer may hold"

# -- what listens where ------------------------------------------------------------------------------------------------


def all_processes(front_end) -> dict[int, str]:
    """The front end's process and all that it started: pid to command line."""
    return {pid: command for pid, (_, _, command) in descendants(front_end.process.pid).items()}


@pytest.fixture
def listening(front_end) -> dict[tuple[str, int], str]:
    """(address, port) to command line, of every TCP socket of all its processes that listens."""
    return listeners(all_processes(front_end))


def is_loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def is_tensorflows(command: str) -> bool:
    return command.startswith("ray::ParameterServer")


def test_everything_but_tensorflows_server_listens_on_this_machine_alone(front_end, listening):
    commands = " ".join(all_processes(front_end).values())
    for name in ("gcs_server", "raylet", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::ParameterServer", "ray::Worker"):
        assert name in commands
    assert {port for (_, port), command in listening.items() if not is_tensorflows(command)} >= {front_end.port}
    assert [place for place, command in listening.items() if not is_loopback(place[0]) and not is_tensorflows(command)] == []


def test_tensorflows_server_is_one_port_and_the_only_one_on_all_interfaces(listening):
    """grpc_server_lib.cc asks for 0.0.0.0 whatever the ClusterSpec says, which gRPC makes [::] where there is IPv6."""
    [(address, _)] = [place for place, command in listening.items() if not is_loopback(place[0])]
    assert ipaddress.ip_address(address).is_unspecified


def first_bytes(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 10) as connection, contextlib.suppress(OSError):
        connection.settimeout(2)
        connection.sendall(request)
        return connection.recv(1000)
    return b""


def test_one_port_serves_http_and_it_is_the_one_asked_for(front_end, listening):
    """Ray's runtime environment agent speaks HTTP as well, but wants the token."""
    answers = {port: first_bytes(port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") for _, port in listening}
    http = {port: answer.split()[1] for port, answer in answers.items() if answer.startswith(b"HTTP/")}
    assert {port for port, status in http.items() if status != b"401"} == {front_end.port}
    assert http[front_end.port] == b"200"


def own_addresses() -> set[str]:
    """All addresses of this machine but 127.0.0.1, which for Linux is any that starts with 127."""
    with open("/proc/net/fib_trie") as file:
        found = set(re.findall(r"\|-- ([\d.]+)\n\s+/32 host LOCAL", file.read()))
    with contextlib.suppress(OSError), open("/proc/net/if_inet6") as file:
        for line in file:
            address = ipaddress.ip_address(bytes.fromhex(line.split()[0]))
            found |= set() if address.is_link_local else {str(address)}
    return found - {"127.0.0.1"} | {"127.0.0.2"}


def test_a_front_end_on_the_default_host_is_reached_through_no_other_address(front_end):
    for address in own_addresses():
        with pytest.raises(OSError):
            socket.create_connection((address, front_end.port), 2).close()


def test_ray_refuses_who_has_no_token(front_end):
    command = next(command for command in all_processes(front_end).values() if "/raylet " in command)
    address = re.search(r"--gcs-address=(\S+)", command)[1]
    program = f"from ray._raylet import GcsClient; print(GcsClient({address!r}).internal_kv_keys(b'', None))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment |= {"RAY_AUTH_MODE": "disabled"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and done.stdout == "" and "token" in done.stderr.lower(), done


def test_the_token_is_on_no_command_line(front_end):
    living = all_processes(front_end)
    with open(f"/proc/{next(pid for pid, command in living.items() if '/raylet ' in command)}/environ", "rb") as file:
        token = re.search(rb"\0RAY_AUTH_TOKEN=(\w{64})\0", file.read())[1].decode()
    assert not any(token in command for command in living.values())


def test_no_other_user_of_the_machine_gets_at_its_files(front_end):
    """Ray's own folder is open to everybody, sockets included; the one around it is not."""
    command = next(command for command in all_processes(front_end).values() if "/raylet " in command)
    folder = re.search(r"/\S*?/ray_tensorflow_\w+(?=/)", command[command.index("--raylet_socket_name"):])[0]
    assert os.stat(folder).st_mode & 0o777 == 0o700


# -- what comes over HTTP ----------------------------------------------------------------------------------------------


class Bomb:
    """Makes a file when it is unpickled."""

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


@pytest.fixture
def secret(tmp_path) -> str:
    """The path of a file that the server could read."""
    (tmp_path / "secret").write_text(SECRET)
    return str(tmp_path / "secret")


def assert_is_refused(answer):
    assert 400 <= answer.status < 500 and list(answer.json) == ["error"], answer
    assert SECRET not in answer.body.decode() and "root:" not in answer.body.decode()


def test_the_bomb_goes_off_when_it_is_unpickled(tmp_path):
    pickle.loads(pickle.dumps(Bomb(str(tmp_path / "made"))))
    assert (tmp_path / "made").exists()


def pickled(canary: str) -> bytes:
    return pickle.dumps(Bomb(canary), 2)


def array_file(canary: str) -> bytes:
    """As numpy.save writes it, with an object in it: numpy.load would unpickle it."""
    file = io.BytesIO()
    np.save(file, np.array([Bomb(canary)], object), allow_pickle=True)
    return file.getvalue()


def archive(canary: str) -> bytes:
    file = io.BytesIO()
    np.savez(file, instances=np.array([Bomb(canary)], object))
    return file.getvalue()


@pytest.mark.parametrize("key", [b"", bytes(32), bytes(31)], ids=["no key", "a wrong one", "one cut short"])
def test_a_worker_takes_nothing_from_whoever_has_not_its_key(front_end, listening, canary, key):
    message = pickled(canary)
    framed = key + struct.pack("!i", len(message)) + message
    answers = [first_bytes(port, framed) for (_, port), command in listening.items() if command.startswith("ray::Worker")]
    assert b"" in answers  # the others are Ray's own
    assert front_end.get("/?value=0").status == 200


@pytest.mark.parametrize("kind", ["application/octet-stream", "application/x-python-pickle", "application/json"])
@pytest.mark.parametrize("make", [pickled, array_file, archive], ids=lambda make: make.__name__)
def test_a_body_is_never_unpickled(front_end, canary, make, kind):
    headers = {"Content-Type": kind}
    assert_is_refused(front_end.request("POST", "/v1/models/adder:predict", make(canary), headers))
    front_end.request("GET", "/?value=0", make(canary), headers)


@pytest.mark.parametrize("make", [pickled, array_file, archive], ids=lambda make: make.__name__)
def test_base64_in_json_is_never_unpickled(front_end, canary, make):
    value = {"b64": base64.b64encode(make(canary)).decode()}
    for model in ("adder", "linear"):
        for document in ({"instances": [value]}, {"inputs": value}, {"instances": value}, {"instances": [[value]]}):
            assert_is_refused(front_end.predict(model, document))
    for text in (value["b64"], make(canary).decode("latin-1")):
        assert_is_refused(front_end.predict("adder", {"instances": [text]}))


def expressions(canary: str) -> list[str]:
    call = f"__import__('os').mkdir({canary!r})"
    return [call, f"eval({call!r})", f"{{{{{call}}}}}", f"${{{call}}}", f"$(mkdir {canary})",
            f"`mkdir {canary}`", f"1;{call}", f"!!python/object/apply:os.mkdir [{canary}]"]


def test_a_value_is_never_evaluated(front_end, canary):
    for expression in expressions(canary):
        quoted = "".join(f"%{byte:02x}" for byte in expression.encode())
        assert_is_refused(front_end.get(f"/?value={quoted}"))
        assert_is_refused(front_end.predict("adder", {"instances": [expression]}))
        assert_is_refused(front_end.post("/v1/models/adder:predict", expression))


def places(secret: str) -> list[str]:
    """What would be a path or a function, if a name could be one."""
    relative = "../" * 12 + secret.lstrip("/")
    names = ["../../etc/passwd", "/etc/passwd", secret, relative, f"file://{secret}", "os:system",
             "example_models:linear", "ray_tensorflow:main"]
    return names + ["..%2f" * 12 + "etc%2fpasswd", "%2e%2e%2f" * 12 + "etc/passwd",
                    "..\\..\\etc\\passwd", "~/.ssh/id_rsa", f"{secret}\0.pb", "linear/../../secret"]


def test_a_models_name_is_never_a_path_nor_a_function(front_end, secret):
    for name in places(secret):
        quoted = "".join(f"%{byte:02x}" for byte in name.encode())
        for written in {quoted, quoted.replace("%2f", "/"), name if name.isprintable() else quoted}:
            for ending in ("", "/metadata", "/versions/1"):
                assert_is_refused(front_end.get(f"/v1/models/{written}{ending}"))
            assert_is_refused(front_end.predict(written, {"instances": [1]}))
        assert_is_refused(front_end.post("/v1/models/adder:predict", {"instances": [1], "model": name, "signature_name": name}))


def test_a_version_a_signature_an_input_and_a_method_are_never_a_path_nor_a_function(front_end, secret):
    for name in places(secret):
        quoted = "".join(f"%{byte:02x}" for byte in name.encode())
        assert_is_refused(front_end.get(f"/v1/models/linear/versions/{quoted}"))
        assert_is_refused(front_end.predict("linear", {"signature_name": name, "instances": [[1, 2, 3]]}))
        assert_is_refused(front_end.predict("linear", {"inputs": {name: [[1, 2, 3]]}}))
        assert_is_refused(front_end.predict("linear", {"instances": [{name: [1, 2, 3]}]}))
        assert_is_refused(front_end.post(f"/v1/models/linear:{quoted}", {"instances": [[1, 2, 3]]}))
        assert_is_refused(front_end.get(f"/{quoted}"))


@pytest.mark.parametrize("front_end", ["starlette"], indirect=True)
def test_a_message_of_the_websocket_is_never_unpickled_evaluated_or_a_path(front_end, canary, secret):
    bombs = [make(canary) for make in (pickled, array_file, archive)]
    texts = [bomb.decode("latin-1") for bomb in bombs] + expressions(canary)
    values = [*texts, *({"b64": base64.b64encode(bomb).decode()} for bomb in bombs)]
    messages = [*bombs, *texts, *(json.dumps({"id": 1, "value": value}) for value in values)]
    messages += [json.dumps({"id": 1, "model": "adder", "instances": [value]}) for value in values]
    messages += [json.dumps({"id": 1, "model": name, "instances": [1]}) for name in places(secret)]
    message = {"id": 1, "model": "linear", "instances": [[1, 2, 3]]}
    messages += [json.dumps(message | {"signature_name": name}) for name in places(secret)]
    with connect(f"ws://127.0.0.1:{front_end.port}/ws") as ws:
        for message in messages:
            ws.send(message)
        answers = [ws.recv(timeout=60) for _ in messages]
    assert all("error" in json.loads(answer) and SECRET not in answer and "root:" not in answer for answer in answers)


def test_all_this_changed_nothing(front_end, canary):
    before = front_end.get("/?value=0").json["result"]
    pids = [worker["pid"] for worker in front_end.get("/health").json["workers"]]
    for expression in expressions(canary):
        assert_is_refused(front_end.predict("adder", {"instances": [expression]}))
    assert front_end.get("/?value=0").json["result"] == before
    assert [worker["pid"] for worker in front_end.get("/health").json["workers"]] == pids
