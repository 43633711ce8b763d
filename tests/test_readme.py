"""The README's blocks, each run as pasted into a fresh shell in a fresh clone, print what the README shows.

Times, pids and ports are not compared, ``...`` stands for anything. Set-up and test commands are left out: these
run this. What is at 8080 or in /tmp in the README is at a free port and in a folder of its own here.
"""

import contextlib
import glob
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from typing import NamedTuple

import pytest
from conftest import REPOSITORY, START_S, Server, free_port, long, plain_environment, processes, wait_until

import shared_graph

LEFT_OUT = ("python3.11 -m venv", ".venv/bin/pip", ".venv/bin/ray stop")  # the last one ends other people's Ray, too


class Block(NamedTuple):
    """A fenced block: under which heading, and its number there."""

    section: str
    number: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.section}-{self.number}"

    def commands(self) -> list[tuple[str, str]]:
        """What stands behind each ``$``, on as many lines as its quotes are open, and the output below it."""
        found, lines = [], self.text.splitlines()
        while lines:
            assert lines[0].startswith("$ "), f"{self}: {lines[0]!r} is neither a command nor the output of one"
            command, shown = lines.pop(0)[2:], []
            while is_open(command):
                command += f"\n{lines.pop(0)}"
            while lines and not lines[0].startswith("$ "):
                shown.append(lines.pop(0))
            found.append((command, "\n".join(shown)))
        return [(command, shown) for command, shown in found if not command.startswith(LEFT_OUT)]


def is_open(command: str) -> bool:
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return True
    return False


def read_blocks() -> list[Block]:
    blocks, section = [], "top"
    with open(os.path.join(REPOSITORY, "README.md")) as file:
        text = file.read()
    for heading, language, content in re.findall(r"^## ([^\n]*)\n|^```(\w*)\n(.*?)^```\n", text, re.M | re.S):
        if heading:
            section = heading
        else:
            number = 1 + sum(block.section == section for block in blocks)
            blocks.append(Block(section, number, language, content))
    return blocks


BLOCKS = read_blocks()
PREPARATION, *CONSOLES = [block for block in BLOCKS if block.language == "console" and block.commands()]


class Clone:
    """A fresh clone, without what git and the tests have in it, with the README's files in it."""

    def __init__(self, folder):
        self.folder, self.temporary, self.home = (str(folder / name) for name in ("clone", "temporary", "home"))
        ignored = shutil.ignore_patterns(".*", "__pycache__", "tests")
        shutil.copytree(REPOSITORY, self.folder, ignore=ignored)
        os.makedirs(self.temporary)
        os.makedirs(self.home)
        self.port = str(free_port())
        for block in BLOCKS:
            if block.language == "python":
                name = re.match(r"# (\w+\.py)\b", block.text)[1]
                with open(os.path.join(self.folder, name), "w") as file:
                    file.write(self.here(block.text))

    def here(self, text: str) -> str:
        text = text.replace("/tmp/", f"{self.temporary}/").replace("8080", self.port)
        text = text.replace("ray start --head", f"ray start --head --port {free_port()}")
        text = text.replace("sleep 1; done", "sleep 1; kill -0 $! || exit 1; done")  # nobody waits for what has ended
        return text.replace(".venv/bin/", f"{os.path.dirname(sys.executable)}/")

    def there(self, text: str) -> str:
        return text.replace(self.temporary, "/tmp").replace(self.port, "8080").strip()

    def run(self, block: Block) -> None:
        """In a shell of its own; then compare what each command printed."""
        commands, script = block.commands(), os.path.join(self.home, "script")
        with open(script, "w") as file:
            for number, (command, _) in enumerate(commands):
                output = os.path.join(self.home, str(number))
                file.write(f'{{ {self.here(command)}\n}} > {output} 2>&1 || echo "status $?" >> {output}\n')
        environment = {name: value for name, value in plain_environment().items() if name != "PYTHONPATH"}
        environment |= {"HOME": self.home, "RAY_TENSORFLOW_PORT": self.port}
        with open(os.path.join(self.home, ".curlrc"), "w") as file:
            file.write("silent\n")  # as it is when it writes to a terminal
        printed = ""
        for path in glob.glob(os.path.join(self.home, "[0-9]*")):  # of the block before
            os.remove(path)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(["bash", script], cwd=self.folder, env=environment, timeout=2 * START_S)
            for number, (command, shown) in enumerate(commands):
                path = os.path.join(self.home, str(number))
                assert os.path.exists(path), f"{command!r} was not reached:\n{printed}"
                with open(path, errors="replace") as file:
                    output = self.there(file.read())
                printed += f"$ {command}\n{output}\n"
                if not command.endswith("&") and not command.startswith("kill"):  # servers say more than is shown
                    assert re.fullmatch(pattern(shown), output), f"{command} does not print\n{shown}\nbut\n{printed}"
        except BaseException:
            end_processes()
            raise
        if "ray start" in block.text:
            actors = lambda: [command for command in processes("test").values() if command.startswith("ray::Param")]
            wait_until(lambda: not actors(), 60, "the actors to end after the last front end")
            end_processes()


def end_processes() -> None:
    for pid in processes("test"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


VARYING = {
    r"\d\d:\d\d:\d\d": r"[\d :.,-]+",
    r"(?<=pid )\d+": r"\d+",
    r"\d+(?:\.\d+)?(?= (?:s|rows/s)\b)": r"[\d.]+",
    r"^\.\.\.\n": r"(?:.*\n)*",
    r"\.\.\.": ".*",
}


def pattern(shown: str) -> str:
    """A regular expression of what is shown, up to what varies from run to run."""
    result, end = "", 0
    for match in re.finditer("|".join(f"({part})" for part in VARYING), shown, re.M):
        result += re.escape(shown[end : match.start()]) + [*VARYING.values()][match.lastindex - 1]
        end = match.end()
    return result + re.escape(shown[end:])


def test_what_varies_is_not_compared_and_all_else_is():
    shown = "12:00:01 worker 0 ready  pid 12  7.2 s\n...\nsum: 6.0"
    assert re.fullmatch(pattern(shown), "01:02:03 worker 0 ready  pid 345  11.0 s\na\nb\nsum: 6.0")
    assert re.fullmatch(pattern(shown), "01:02:03 worker 0 ready  pid 345  11.0 s\nsum: 6.0")
    assert not re.fullmatch(pattern(shown), "01:02:03 worker 1 ready  pid 345  11.0 s\nsum: 6.0")
    assert not re.fullmatch(pattern(shown), "01:02:03 worker 0 ready  pid 345  11.0 s\nsum: 7.0")


def test_each_block_is_of_a_kind_that_is_known_and_each_python_block_names_its_file():
    assert {block.language for block in BLOCKS} == {"console", "python", "nginx", "dockerfile"}
    for block in BLOCKS:
        if block.language == "python":
            compile(block.text, str(block), "exec")
            assert re.match(r"# \w+\.py\b", block.text), block


def test_no_block_leaves_a_variable_to_the_shell_in_which_the_next_one_is_pasted():
    for block in CONSOLES:
        words = [shlex.split(command, comments=True) for command, _ in block.commands()]
        exported = {word.partition("=")[0] for first, *rest in words if first == "export" for word in rest}
        assert exported <= {word for first, *rest in words if first == "unset" for word in rest}, block


def test_the_map_in_the_readme_is_the_package_s():
    with open(os.path.join(REPOSITORY, "README.md")) as file:
        assert shared_graph.__doc__.partition("above:\n\n")[2].partition("\n\n")[0] in file.read()


@pytest.mark.long
def test_what_the_dockerfile_copies_answers_on_the_port_that_it_sets(tmp_path):
    """Without an image: in a folder with its files and its environment, in this Python's."""
    [block] = [block for block in BLOCKS if block.language == "dockerfile"]
    steps = [line.split(maxsplit=1) for line in block.text.splitlines()]
    for *sources, target in [shlex.split(rest) for step, rest in steps if step == "COPY"]:
        for path in itertools.chain.from_iterable(glob.glob(os.path.join(REPOSITORY, source)) for source in sources):
            copy = shutil.copytree if os.path.isdir(path) else shutil.copy
            copy(path, tmp_path / target)
    settings = dict(pair.split("=") for step, rest in steps if step == "ENV" for pair in shlex.split(rest))
    [[_, *arguments]] = [json.loads(rest) for step, rest in steps if step == "CMD"]
    environment = {name: value for name, value in plain_environment().items() if name != "PYTHONPATH"} | settings
    port = free_port()  # where another one is in use, perhaps
    environment |= {"PORT": str(port), "RAY_TENSORFLOW_HOST": "127.0.0.1"}  # as PORT means it only in a container
    with Server("container", command=[sys.executable, *arguments], cwd=tmp_path, env=environment) as server:
        server.port = port
        server.wait_ready(int(settings["RAY_TENSORFLOW_WORKERS"]))
        assert server.add(3) == 3 and server.stop() == 0


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Clone:
    """With the model that all sections serve."""
    if not shutil.which("curl"):
        pytest.skip("there is no curl")
    clone = Clone(tmp_path_factory.mktemp("readme"))
    clone.run(PREPARATION)
    return clone


FIRST, *OTHERS = CONSOLES


@pytest.mark.parametrize("block", [FIRST, *map(long, OTHERS)], ids=str)
def test_a_block_prints_what_the_readme_shows(clone, block):
    if "bin/gunicorn" in block.text and not importlib.util.find_spec("gunicorn"):
        pytest.skip("there is no gunicorn")
    clone.run(block)
