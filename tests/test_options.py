"""Options: what each defaults to, where it is read from, which beats which, and what is refused with which words."""

import dataclasses
import errno
import os
import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from shared_graph.errors import OptionError
from shared_graph.model_source import ADDER, ModelSource
from shared_graph.options import COMMAND, FRONT_END, Options

DEFAULTS = {
    "workers": 4,
    "threads": 1,
    "model": (),
    "parameter_servers": 1,
    "placement": "shared",
    "max_batch": 64,
    "batch_wait_ms": 0,
    "max_queue": 1024,
    "timeout_s": 30,
    "exact": False,
    "checkpoint_dir": None,
    "address": None,
    "host": "127.0.0.1",
    "port": 8080,
    "allow_origin": (),
    "input": None,
    "output": None,
}

F_AND_G = ModelSource("f", 1, function="m:f"), ModelSource("g", 1, function="m.n:h")
RIGHT = [  # option, text, value
    ("workers", "7", 7),
    ("threads", "3", 3),
    ("parameter-servers", "2", 2),
    ("placement", "mirrored", "mirrored"),
    ("max-batch", "1", 1),
    ("batch-wait-ms", "2.5", 2.5),
    ("max-queue", "9", 9),
    ("timeout-s", "1e3", 1000.0),
    ("checkpoint-dir", "kept here", os.path.abspath("kept here")),
    ("address", "auto", "auto"),
    ("host", "::1", "::1"),
    ("port", "65535", 65535),
    ("allow-origin", "https://Example.org:8443,*", ("https://example.org:8443", "*")),
    ("model", "m=a.b:c", (ModelSource("m", 1, function="a.b:c"),)),
]

NUMBERS = ("", " ", "x", "nan", "inf", "-1", "1e999", "1" * 400, "0x10", "1,000", "None", "True")
WRONG = [  # option, text or a value of a wrong type
    *(("workers", text) for text in (*NUMBERS, "0", "1.5", "4.0")),
    *((option, "0") for option in ("threads", "parameter-servers", "max-batch", "max-queue", "timeout-s")),
    ("threads", "99999999999"),
    *((option, text) for option in ("batch-wait-ms", "timeout-s") for text in ("", "x", "nan", "inf", "-0.001")),
    *(("port", text) for text in ("-1", "65536", "80.5", "http")),
    *(
        ("allow-origin", text)
        for text in ("", "example.org", "https://", "https://a/b", "null", "https://a b", 5, None)
    ),
    ("address", ""),
    ("host", ""),
    ("checkpoint-dir", ""),
    ("placement", "Shared"),
    ("placement", "both"),
    *(("model", text) for text in ("/no/such/folder", "m=/no/such/folder", "m=", "a:b:c", "m=1a:b", "a b:c")),
    *(("workers", value) for value in (True, 2.5, None, [4], 10**400)),
    ("host", 5),
    ("timeout-s", 10**400),
    ("address", b"auto"),
    ("placement", None),
    ("exact", 2),
    ("model", None),
    ("model", [5]),
]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    """As if none of our variables were set."""
    for name in list(os.environ):
        if name == "PORT" or (name.startswith("RAY_TENSORFLOW_") and not name.startswith("RAY_TENSORFLOW_TEST_")):
            monkeypatch.delenv(name)


def command_line(*arguments: str, kind: str = FRONT_END) -> Options:
    return Options.from_command_line("A test.", kind, list(arguments))


def source(text) -> ModelSource:
    return Options(model=[text]).model[0]


def test_each_option_has_its_documented_default():
    for options in (Options(), command_line(), Options.from_environment()):
        assert dataclasses.asdict(options) == DEFAULTS


@pytest.mark.parametrize("option, text, value", RIGHT)
def test_each_option_is_read_from_command_line_and_environment_and_the_command_line_wins(
    option, text, value, monkeypatch
):
    name = option.replace("-", "_")
    assert getattr(command_line(f"--{option}", text), name) == value
    monkeypatch.setenv(f"RAY_TENSORFLOW_{name.upper()}", text)
    assert getattr(command_line(), name) == value
    monkeypatch.setenv(f"RAY_TENSORFLOW_{name.upper()}", "a wrong value, which nobody looks at")
    assert getattr(command_line(f"--{option}={text}"), name) == value


@pytest.mark.parametrize(
    "variable, text, arguments, option, value",
    [
        *[
            ("EXACT", text, [], "exact", value)
            for text, value in (("1", True), ("true", True), ("0", False), ("", False))
        ],
        ("EXACT", "0", ["--exact"], "exact", True),
        ("WORKERS", "", [], "workers", 4),
        ("MODEL", "m:f,g=m.n:h", [], "model", F_AND_G),
        ("MODEL", "m:f,g=m.n:h", ["--model", "m:f"], "model", F_AND_G[:1]),
        ("MODEL", "", ["--model", "m:f", "--model", "g=m.n:h"], "model", F_AND_G),
    ],
)
def test_switches_are_bare_and_models_repeatable_and_an_empty_variable_counts_as_unset(
    variable, text, arguments, option, value, monkeypatch
):
    monkeypatch.setenv(f"RAY_TENSORFLOW_{variable}", text)
    assert getattr(command_line(*arguments), option) == value


def test_the_environment_is_read_only_when_asked_and_arguments_in_python_beat_it(monkeypatch):
    monkeypatch.setenv("RAY_TENSORFLOW_WORKERS", "8")
    monkeypatch.setenv("RAY_TENSORFLOW_THREADS", "2")
    read = Options.from_environment(workers=3)
    assert (Options().workers, read.workers, read.threads) == (4, 3, 2)


@pytest.mark.parametrize(
    "platform, arguments, expected",
    [
        ("", [], ("127.0.0.1", 8080)),
        ("5000", [], ("0.0.0.0", 5000)),
        ("5000", ["--port", "6000"], ("0.0.0.0", 6000)),
        ("5000", ["--host", "127.0.0.1"], ("127.0.0.1", 5000)),
        ("eighty", ["--port", "81"], ("0.0.0.0", 81)),
    ],
)
def test_port_of_the_platform_decides_host_and_port_unless_they_are_given(platform, arguments, expected, monkeypatch):
    monkeypatch.setenv("PORT", platform)
    options = command_line(*arguments)
    assert (options.host, options.port) == expected
    assert command_line(kind=COMMAND).port == 8080
    monkeypatch.setenv("RAY_TENSORFLOW_PORT", "7000")
    assert Options.from_environment().port == 7000


@pytest.mark.parametrize("option, value", WRONG, ids=lambda value: str(value)[:20])
def test_a_wrong_value_is_refused_in_python_with_a_sentence_that_names_it(option, value):
    with pytest.raises(OptionError) as caught:
        Options(**{option.replace("-", "_"): value})
    shown = re.escape(value[:200]) if isinstance(value, str) else r"\S*"
    assert re.fullmatch(rf"--{option} {shown}: must be \S.*", str(caught.value))


@pytest.mark.parametrize(
    "kind, arguments, words",
    [
        (FRONT_END, ["--workers", "0"], "--workers 0: must be "),
        (FRONT_END, ["--worker", "2"], "--worker"),
        (FRONT_END, ["--workers"], "--workers"),
        (FRONT_END, ["2"], "2"),
        (FRONT_END, ["--input", "x.npy"], "--input"),
        (COMMAND, ["--host", "::"], "--host"),
        (COMMAND, ["--port", "80"], "--port"),
        (COMMAND, ["--input", "x.txt", "--output", "y.npy", "--model", "m:f"], "--input x.txt: must be "),
        (COMMAND, ["--input", "x.npy", "--model", "m:f"], "--output"),
        (COMMAND, ["--output", "y.npy", "--model", "m:f"], "--input"),
        (COMMAND, ["--input", "x.npy", "--output", "y.npy"], "--model"),
        (COMMAND, ["--input", "x.npy", "--output", "y.npy", "--model", "m:f", "--model", "m:g"], "--model"),
    ],
)
def test_a_wrong_command_line_ends_the_program_with_status_2(kind, arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        command_line(*arguments, kind=kind)
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert words in err.splitlines()[-1]


def run_script(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, os.path.join(REPOSITORY, script), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", ["ray_tensorflow.py", "ray_tensorflow_flask.py", "ray_tensorflow_starlette.py"])
def test_each_script_helps_and_ends_at_once_with_one_sentence_about_what_is_wrong(script):
    wrong, helped = run_script(script, RAY_TENSORFLOW_TIMEOUT_S="soon"), run_script(script, "--help")
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
    assert wrong.stderr.startswith(f"{script}: error: --timeout-s soon: must be ")
    others = {"input", "output"} if script != "ray_tensorflow.py" else {"host", "port", "allow_origin"}
    assert set(re.findall(r"^  --([\w-]+)", helped.stdout, re.M)) == {
        name.replace("_", "-") for name in DEFAULTS.keys() - others
    }
    shown = re.findall(r"\(default: ([^)]*)\)", " ".join(helped.stdout.split()))
    assert len(shown) == len(DEFAULTS.keys() - others)
    assert {"4", "64", "1024", "30.0", "0.0", "shared", "off", "none"} <= set(shown)


@pytest.mark.parametrize("script", ["ray_tensorflow.py", "ray_tensorflow_flask.py", "ray_tensorflow_starlette.py"])
def test_each_script_helps_where_python_leaves_docstrings_out(script):
    assert run_script(script, "--help", PYTHONOPTIMIZE="2").returncode == 0


def test_the_address_that_kubernetes_gives_of_a_service_called_ray_tensorflow_is_no_port(monkeypatch):
    monkeypatch.setenv("RAY_TENSORFLOW_PORT", "tcp://10.3.240.1:80")
    assert Options.from_environment().port == 8080
    monkeypatch.setenv("PORT", "5000")
    assert Options.from_environment().port == 5000
    monkeypatch.setenv("RAY_TENSORFLOW_PORT", "80")
    assert Options.from_environment().port == 80


def test_a_mistyped_variable_is_pointed_out_and_others_are_left_alone(monkeypatch, caplog):
    for name in (
        "RAY_TENSORFLOW_WORKER",
        "RAY_TENSORFLOW_ALLOW_ORIGINS",
        "RAY_TENSORFLOW_SERVICE_HOST",
        "RAY_TENSORFLOW",
    ):
        monkeypatch.setenv(name, "3")
    Options.from_environment()
    assert [record.getMessage() for record in caplog.records] == [
        "the environment variable RAY_TENSORFLOW_ALLOW_ORIGINS is not an option: is RAY_TENSORFLOW_ALLOW_ORIGIN meant?",
        "the environment variable RAY_TENSORFLOW_WORKER is not an option: is RAY_TENSORFLOW_WORKERS meant?",
    ]


@pytest.fixture
def saved_model(tmp_path):
    """``saved_model("a/1")``: a folder that looks like a SavedModel; its path."""

    def make(name: str, file: str = "saved_model.pb") -> str:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / file).touch()
        return str(folder)

    return make


@pytest.mark.parametrize(
    "path, prefix, name, version",
    [
        ("half", "my-model_2.0=", "my-model_2.0", 1),
        ("half/2", "", "half", 2),
        ("a=b/half", "", "half", 1),
        ("a,b", "m=", "m", 1),
    ],
)
def test_a_saved_model_has_the_name_of_its_folder_or_the_one_before_it(saved_model, path, prefix, name, version):
    folder = saved_model(path)
    assert source(prefix + folder) == source(f"{prefix}{folder}/") == ModelSource(name, version, folder)


def test_a_folder_of_numbered_versions_is_found_from_the_working_directory_and_has_those_that_are_whole(
    saved_model, tmp_path, monkeypatch
):
    for version in ("9", "10", "2", "not-a-version", "²"):
        saved_model(f"half/{version}", "saved_model.pbtxt" if version == "2" else "saved_model.pb")
    (tmp_path / "half" / "11").mkdir()  # just being copied
    folder = tmp_path / "half"
    for directory, path in ((tmp_path, folder), (tmp_path, "half"), (tmp_path, "./half"), (folder, ".")):
        monkeypatch.chdir(directory)
        assert source(path) == ModelSource("half", None, str(folder))
        assert sorted(source(path).versions()) == [2, 9, 10]


def test_neither_an_empty_source_nor_a_folder_without_a_model_is_one(tmp_path, saved_model, monkeypatch):
    monkeypatch.chdir(saved_model("half"))
    for text, message in (("", "^--model : must be "), ("m=", "^--model m=: must be "), (tmp_path, r"saved_model\.pb")):
        with pytest.raises(OptionError, match=message):
            source(text)


def test_a_folder_that_may_not_be_read_is_refused_in_a_sentence(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(OptionError, match=r"^--model .*: must be a folder that can be read: Permission denied$"):
        source(tmp_path)


@pytest.mark.parametrize(
    ["file", "what"],
    [
        ("m.keras", r"a Keras model: call keras.models.load_model\(FILE\).export\(DIR\)"),
        ("m.h5", "a Keras model"),
        ("frozen.pb", "a frozen graph: .* tf.import_graph_def"),
        ("model.ckpt", "a checkpoint: .* tf.train.init_from_checkpoint"),
        ("model.ckpt-100.index", "a checkpoint"),
        ("model.ckpt.data-00000-of-00001", "a checkpoint"),
    ],
)
def test_of_a_file_that_is_no_saved_model_it_is_said_what_to_do_with_it(tmp_path, file, what):
    (tmp_path / (f"{file}.index" if file == "model.ckpt" else file)).write_bytes(b"")
    with pytest.raises(OptionError, match=what):
        source(tmp_path / file)
    with pytest.raises(OptionError, match=f"a folder that exists.*: '{tmp_path / 'none' / file}' is neither"):
        Options(model=["math:sqrt", tmp_path / "none" / file])


def test_a_function_is_named_by_its_module_and_a_parsed_source_stays_as_it_is():
    parsed = source("a.b.c:build_2")
    assert parsed == source(parsed) == ModelSource("build_2", 1, function="a.b.c:build_2")
    assert dataclasses.replace(Options(model=[parsed]), workers=2).model == (parsed,)


@pytest.mark.parametrize(
    "models, name",
    [(["m:f", "n:f"], "f"), (["x=m:f", "x=m:g"], "x"), ([f"{ADDER}=m:f"], ADDER), ([f"m:{ADDER}"], ADDER)],
)
def test_two_models_of_one_name_are_refused_and_the_adders_is_taken(models, name):
    with pytest.raises(OptionError, match=f"'{name}'.*NAME="):
        Options(model=models)


OTHERS = {
    "workers": 3, "threads": 2, "model": ["m:f"], "parameter_servers": 2, "placement": "mirrored", "max_batch": 8,
    "exact": True, "checkpoint_dir": "/other"}  # fmt: skip
THEIR_OWN = {
    "batch_wait_ms": 5, "max_queue": 7, "timeout_s": 3, "address": "auto", "host": "::1", "port": 1,
    "allow_origin": ["*"]}  # fmt: skip


@pytest.mark.parametrize("name", [*OTHERS, *THEIR_OWN])
def test_front_ends_of_a_shared_cluster_agree_on_all_but_what_is_their_own(name):
    ours, others = Options().shared, Options(**{name: (OTHERS | THEIR_OWN)[name]}).shared
    assert {key for key in ours if ours[key] != others[key]} == (
        {f"--{name.replace('_', '-')}"} if name in OTHERS else set()
    )
    assert (
        "the code of shared_graph" in ours and OTHERS.keys() | THEIR_OWN.keys() | {"input", "output"} == DEFAULTS.keys()
    )


@pytest.mark.parametrize("threads, compute_threads", [(1, 3), (2, 3), (3, 4), (8, 9)])
def test_a_server_computes_in_one_thread_more_than_asked_for_and_at_least_in_three(threads, compute_threads):
    assert Options(threads=threads).compute_threads == compute_threads
