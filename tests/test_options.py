"""Options: what each defaults to, where it is read from, which beats which, and what is refused with which words."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from ray_tensorflow import ADDER, COMMAND, FRONT_END, ModelSource, OptionError, Options, model_source

DEFAULTS = {
    "workers": 4, "threads": 1, "model": (), "max_batch": 64, "batch_wait_ms": 0, "max_queue": 1024, "timeout_s": 30,
    "address": None, "parameter_servers": 1, "placement": "shared", "host": None, "port": None, "input": None, "output": None}

# option, text, value
RIGHT = [
    ("workers", "7", 7), ("threads", "3", 3), ("max-batch", "1", 1), ("batch-wait-ms", "2.5", 2.5), ("batch-wait-ms", "0", 0),
    ("max-queue", "9", 9), ("timeout-s", "0.25", 0.25), ("timeout-s", "1e3", 1000), ("address", "auto", "auto"),
    ("placement", "mirrored", "mirrored"), ("host", "::1", "::1"),
    ("port", "0", 0), ("port", "65535", 65535), ("parameter-servers", "2", 2)]

WHOLE_NUMBERS = ("workers", "threads", "parameter-servers", "max-batch", "max-queue")
NUMBERS = ("", " ", "x", "nan", "inf", "-inf", "-1", "1e999", "1" * 400, "0x10", "1,000", "None", "True")
WRONG = [
    *((option, value) for option in WHOLE_NUMBERS for value in (*NUMBERS, "0", "1.5", "4.0")),
    *(("batch-wait-ms", value) for value in (*NUMBERS[:8], "-0.001")),
    *(("timeout-s", value) for value in (*NUMBERS[:8], "0", "-0.001")),
    *(("port", value) for value in (*NUMBERS, "65536", "80.5", "http")),
    ("address", ""), ("host", ""), ("placement", ""), ("placement", "Shared"), ("placement", "both"),
    *(("model", value) for value in ("", "/no/such/folder", "m=/no/such/folder", "m=", "a:b:c", "m=1a:b", "a b:c"))]

SCRIPTS = ("ray_tensorflow.py", "ray_tensorflow_flask.py", "ray_tensorflow_starlette.py")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    """As if none of our variables were set."""
    for name in list(os.environ):
        if name == "PORT" or name.startswith("RAY_TENSORFLOW_") and not name.startswith("RAY_TENSORFLOW_TEST_"):
            monkeypatch.delenv(name)


@pytest.fixture
def saved_model(tmp_path):
    """``saved_model("a/1")``: a folder that looks like a SavedModel; its path."""

    def make(name: str, file: str = "saved_model.pb") -> str:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / file).touch()
        return str(folder)

    return make


def command_line(*arguments: str, kind: str = FRONT_END) -> Options:
    return Options.from_command_line("A test.", kind, list(arguments))


def field_name(option: str) -> str:
    return option.replace("-", "_")


def environment_name(option: str) -> str:
    return f"RAY_TENSORFLOW_{field_name(option).upper()}"


def run_script(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, os.path.join(REPOSITORY, script), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)


# -- where values come from --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DEFAULTS)
def test_each_option_has_its_documented_default(name):
    assert [getattr(options, name) for options in (Options(), command_line(), Options.from_environment())] == [DEFAULTS[name]] * 3


def test_options_cannot_be_changed_behind_a_clusters_back():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().workers = 5


@pytest.mark.parametrize("option, text, value", RIGHT)
def test_each_option_is_read_from_the_command_line(option, text, value):
    read = getattr(command_line(f"--{option}", text), field_name(option))
    assert read == value and type(read) is type(getattr(Options(**{field_name(option): value}), field_name(option)))


@pytest.mark.parametrize("option, text, value", RIGHT)
def test_each_option_is_read_from_the_environment(option, text, value, monkeypatch):
    monkeypatch.setenv(environment_name(option), text)
    assert getattr(Options.from_environment(), field_name(option)) == getattr(command_line(), field_name(option)) == value


@pytest.mark.parametrize("option, text, value", RIGHT)
def test_the_command_line_beats_the_environment(option, text, value, monkeypatch):
    monkeypatch.setenv(environment_name(option), "a wrong value, which nobody looks at")
    assert getattr(command_line(f"--{option}={text}"), field_name(option)) == value


def test_arguments_in_python_beat_the_environment(monkeypatch):
    monkeypatch.setenv("RAY_TENSORFLOW_WORKERS", "8")
    monkeypatch.setenv("RAY_TENSORFLOW_THREADS", "2")
    assert (Options.from_environment(workers=3).workers, Options.from_environment(workers=3).threads) == (3, 2)


def test_the_environment_is_not_read_unless_asked(monkeypatch):
    monkeypatch.setenv("RAY_TENSORFLOW_WORKERS", "nonsense")
    assert Options().workers == 4


def test_an_empty_environment_variable_counts_as_unset(monkeypatch):
    monkeypatch.setenv("RAY_TENSORFLOW_WORKERS", "")
    assert command_line().workers == 4


def test_models_are_repeatable_on_the_command_line_and_separated_by_commas_in_the_environment(monkeypatch):
    expected = (ModelSource("f", 1, function="m:f"), ModelSource("g", 1, function="m.n:h"))
    assert command_line("--model", "m:f", "--model", "g=m.n:h").model == expected
    monkeypatch.setenv("RAY_TENSORFLOW_MODEL", "m:f,g=m.n:h")
    assert command_line().model == expected


def test_models_on_the_command_line_replace_those_in_the_environment(monkeypatch):
    monkeypatch.setenv("RAY_TENSORFLOW_MODEL", "m:f,m:g")
    assert command_line("--model", "m:h").model == (ModelSource("h", 1, function="m:h"),)


def test_a_folder_with_a_comma_in_its_name_can_be_given_on_the_command_line(saved_model):
    folder = saved_model("a,b")
    assert command_line("--model", f"m={folder}").model == (ModelSource("m", 1, folder),)


# -- what is refused ---------------------------------------------------------------------------------------------------


def assert_is_one_sentence_about(text: str, option: str, value: str):
    assert text.count("\n") <= 1 and "Traceback" not in text
    assert f"--{option}" in text and value.strip()[:100] in text
    assert re.search(r"must be \S+", text)


@pytest.mark.parametrize("option, value", WRONG)
def test_a_wrong_value_in_python_is_refused_with_a_sentence_that_names_it(option, value):
    with pytest.raises(OptionError) as raised:
        Options(**{field_name(option): value})
    assert_is_one_sentence_about(str(raised.value), option, value)


@pytest.mark.parametrize("option, value", WRONG)
def test_a_wrong_value_on_the_command_line_ends_the_program_with_status_2(option, value, capsys):
    with pytest.raises(SystemExit) as raised:
        command_line(f"--{option}={value}")
    out, err = capsys.readouterr()
    assert (raised.value.code, out) == (2, "")
    assert_is_one_sentence_about(err, option, value)


@pytest.mark.parametrize("option, value", [(option, value) for option, value in WRONG if value])
def test_a_wrong_value_in_the_environment_ends_the_program_with_status_2(option, value, capsys, monkeypatch):
    monkeypatch.setenv(environment_name(option), value)
    with pytest.raises(SystemExit) as raised:
        command_line()
    assert raised.value.code == 2
    assert_is_one_sentence_about(capsys.readouterr().err, option, value)


@pytest.mark.parametrize("changes", [
    {"workers": True}, {"workers": 2.5}, {"workers": None}, {"workers": [4]}, {"workers": 10**400}, {"timeout_s": 10**400},
    {"timeout_s": float("nan")}, {"host": 5}, {"address": b"auto"}, {"placement": None}, {"model": None}, {"model": 5},
    {"model": [5]}, {"input": 5, "output": "y.npy"}])
def test_a_value_of_a_wrong_type_is_refused_by_name(changes):
    with pytest.raises(OptionError, match=f"^--{next(iter(changes)).replace('_', '-')} "):
        Options(**changes)


def test_a_very_long_value_is_cut_short_in_the_message():
    with pytest.raises(OptionError) as raised:
        Options(workers="9" * 100_000 + "x")
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("arguments", [["--worker", "2"], ["--work", "2"], ["--workers"], ["2"], ["--nonsense"]])
def test_what_is_no_option_ends_the_program_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        command_line(*arguments)
    assert raised.value.code == 2 and "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind, option", [(COMMAND, "--host"), (COMMAND, "--port"), (FRONT_END, "--input"), (FRONT_END, "--output")])
def test_options_of_the_others_are_not_taken(kind, option, capsys):
    with pytest.raises(SystemExit) as raised:
        command_line(option, "1.npy", kind=kind)
    assert raised.value.code == 2 and option in capsys.readouterr().err


@pytest.mark.parametrize("arguments, named", [
    (["--input", "x.txt", "--output", "y.npy", "--model", "m:f"], "--input x.txt"),
    (["--input", "x.npy", "--output", "y", "--model", "m:f"], "--output y"),
    (["--input", "x.npy", "--model", "m:f"], "--output"),
    (["--output", "y.npy", "--model", "m:f"], "--input"),
    (["--input", "x.npy", "--output", "y.npy"], "--model"),
    (["--input", "x.npy", "--output", "y.npy", "--model", "m:f", "--model", "m:g"], "--model")])
def test_a_file_is_predicted_with_exactly_one_model_and_both_files_named(arguments, named, capsys):
    with pytest.raises(SystemExit) as raised:
        command_line(*arguments, kind=COMMAND)
    error = capsys.readouterr().err
    assert raised.value.code == 2 and named in error and error.count("\n") == 1


# -- the scripts themselves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_option_with_its_default(script):
    done = run_script(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    text, front_end = " ".join(done.stdout.split()), script != "ray_tensorflow.py"
    for name in DEFAULTS:
        its_own = {"host": front_end, "port": front_end, "input": not front_end, "output": not front_end}.get(name, True)
        assert (f" --{name.replace('_', '-')} " in text) == its_own
    for default in (4, 1, 64, 0, 1024, 30, "shared", 8080) if front_end else (4, 1, 64, 0, 1024, 30, "shared"):
        assert re.search(rf"(default: |else ){default}(\.0)?( |\)|$)", text), default


@pytest.mark.parametrize("script, arguments, environment, named", [
    (SCRIPTS[0], ["--workers", "0"], {}, "--workers 0"),
    (SCRIPTS[1], [], {"RAY_TENSORFLOW_TIMEOUT_S": "soon"}, "--timeout-s soon"),
    (SCRIPTS[2], ["--model", "m=/no/such/folder"], {}, "--model m=/no/such/folder"),
    (SCRIPTS[1], [], {"PORT": "eighty"}, "PORT eighty"),
    (SCRIPTS[2], [], {"PORT": "65536"}, "PORT 65536")])
def test_each_script_ends_at_once_with_status_2_and_one_sentence(script, arguments, environment, named):
    done = run_script(script, *arguments, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and f"{script}: error: {named}: must be " in done.stderr, done.stderr


# -- where a front end listens -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform, arguments, expected", [
    (None, [], ("127.0.0.1", 8080)),
    ("", [], ("127.0.0.1", 8080)),
    ("5000", [], ("0.0.0.0", 5000)),
    ("5000", ["--port", "6000"], ("0.0.0.0", 6000)),
    ("5000", ["--host", "127.0.0.1"], ("127.0.0.1", 5000)),
    (None, ["--host", "::"], ("::", 8080)),
    (None, ["--port", "0"], ("127.0.0.1", 0)),
    ("eighty", ["--port", "81"], ("0.0.0.0", 81))])
def test_port_of_the_platform_decides_host_and_port_unless_they_are_given(platform, arguments, expected, monkeypatch):
    if platform is not None:
        monkeypatch.setenv("PORT", platform)
    assert command_line(*arguments).listen == expected


def test_our_own_variables_beat_port(monkeypatch):
    monkeypatch.setenv("PORT", "5000")
    monkeypatch.setenv("RAY_TENSORFLOW_PORT", "7000")
    monkeypatch.setenv("RAY_TENSORFLOW_HOST", "127.0.0.2")
    assert command_line().listen == ("127.0.0.2", 7000)


def test_port_does_not_matter_to_the_command(monkeypatch):
    monkeypatch.setenv("PORT", "eighty")
    assert command_line(kind=COMMAND).workers == 4


# -- where models come from --------------------------------------------------------------------------------------------


def test_a_saved_model_has_the_name_of_its_folder(saved_model):
    folder = saved_model("half")
    assert model_source(folder) == ModelSource("half", 1, folder)
    assert model_source(folder + "/") == ModelSource("half", 1, folder)


def test_a_saved_model_in_text_form_counts_too(saved_model):
    folder = saved_model("half", "saved_model.pbtxt")
    assert model_source(folder) == ModelSource("half", 1, folder)


def test_a_name_before_the_folder_is_the_models(saved_model):
    folder = saved_model("half")
    assert model_source(f"my-model_2.0={folder}") == ModelSource("my-model_2.0", 1, folder)


def test_a_folder_of_numbered_versions_means_the_highest_number(saved_model, tmp_path):
    for version in ("9", "10", "2", "not-a-version"):
        saved_model(f"half/{version}")
    (tmp_path / "half" / "11").mkdir()  # just being copied
    (tmp_path / "half" / "12").touch()
    assert model_source(str(tmp_path / "half")) == ModelSource("half", 10, str(tmp_path / "half" / "10"))


def test_one_version_of_several_can_be_named_outright(saved_model):
    saved_model("half/3")
    folder = saved_model("half/2")
    assert model_source(folder) == ModelSource("half", 2, folder)
    assert model_source(f"h={folder}") == ModelSource("h", 2, folder)


def test_a_relative_folder_is_found_from_the_working_directory(saved_model, tmp_path, monkeypatch):
    folder = saved_model("half/1")
    monkeypatch.chdir(tmp_path)
    assert model_source("half") == model_source("./half") == ModelSource("half", 1, folder)
    monkeypatch.chdir(tmp_path / "half")
    assert model_source(".") == ModelSource("half", 1, folder)


def test_a_path_object_is_taken_like_its_text(saved_model, tmp_path):
    folder = saved_model("half")
    assert Options(model=[tmp_path / "half"]).model == Options(model=tmp_path / "half").model == (ModelSource("half", 1, folder),)


def test_a_folder_with_an_equals_sign_in_its_path_is_found(saved_model):
    folder = saved_model("a=b/half")
    assert model_source(folder) == ModelSource("half", 1, folder)
    assert model_source(f"m={folder}") == ModelSource("m", 1, folder)


def test_a_folder_without_a_model_is_refused_with_what_is_missing(tmp_path):
    with pytest.raises(OptionError, match="saved_model.pb"):
        Options(model=[str(tmp_path)])


def test_an_empty_source_does_not_mean_the_working_directory(saved_model, monkeypatch):
    monkeypatch.chdir(saved_model("half"))
    for text in ("", "m="):
        with pytest.raises(OptionError, match=f"^--model {text}: must be "):
            Options(model=[text])


def test_a_version_folder_whose_name_is_no_plain_number_is_not_a_version(saved_model, tmp_path):
    saved_model("half/²")
    with pytest.raises(OptionError, match="saved_model.pb"):
        Options(model=[str(tmp_path / "half")])


@pytest.mark.parametrize("text, name, function", [
    ("module:build", "build", "module:build"), ("a.b.c:build_2", "build_2", "a.b.c:build_2"),
    ("net=module:build", "net", "module:build")])
def test_a_function_is_named_by_its_module(text, name, function):
    assert model_source(text) == ModelSource(name, 1, function=function)


def test_a_source_that_is_parsed_already_stays_as_it_is():
    options = Options(model=["module:build"])
    assert dataclasses.replace(options, workers=2).model == Options(model=options.model).model == options.model


@pytest.mark.parametrize("models", [["m:f", "n:f"], ["x=m:f", "x=m:g"], ["m:f", "m:f"]])
def test_two_models_of_one_name_are_refused_by_that_name(models):
    with pytest.raises(OptionError, match=f"'{models[0][0] if '=' in models[0] else 'f'}'.*NAME="):
        Options(model=models)


@pytest.mark.parametrize("model", [f"{ADDER}=m:f", f"m:{ADDER}"])
def test_the_adders_name_is_taken(model):
    with pytest.raises(OptionError, match=f"'{ADDER}'"):
        Options(model=[model])
