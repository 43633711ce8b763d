"""One dataclass for all options: the source of every name, type, default, limit and help text."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import glob
import hashlib
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from shared_graph.errors import OptionError
from shared_graph.model_source import ModelSource, model_sources, what_is_wrong
from shared_graph.threads import check_threads

log = logging.getLogger(__name__)

FRONT_END, COMMAND = "front end", "command"


def option(default, help: str, parse: Callable[[Any], Any], only: str | None = None):
    """A field of ``Options``; ``parse`` checks a value (given as text or not), or raises ValueError(what is allowed).
    ``only`` says whose command line has it: a FRONT_END's, the COMMAND's, or everybody's."""
    return dataclasses.field(default=default, metadata={"help": help, "parse": parse, "only": only})


def number(kind: type, least: float, most: float = math.inf, above: bool = False) -> Callable[[Any], Any]:
    def parse(value):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            result = kind(value)
            is_exact = result == float(value) and math.isfinite(result) and not isinstance(value, bool)
            if is_exact and least <= result <= most and not (above and result == least):
                return result
        limits = f"{'above' if above else 'of at least'} {least}{f' and at most {most}' if most < math.inf else ''}"
        raise ValueError(f"a {'whole ' if kind is int else ''}number {limits}")

    return parse


def matching(pattern: str, allowed: str, convert: Callable[[str], Any] = str) -> Callable[[Any], Any]:
    def parse(value):
        if not isinstance(value, (str, bool, os.PathLike)) or not re.fullmatch(pattern, str(value), re.S):
            raise ValueError(allowed)
        return convert(str(value))

    return parse


text = matching(".+", "a non-empty text")
folder = matching(".+", "a non-empty text", os.path.abspath)  # other processes have other working directories
array_file = matching(r".*\.np[yz]", "a file whose name ends in .npy or .npz")


def origins(values: Any) -> tuple[str, ...]:
    """A list of them, or one string with commas in it."""
    allowed = "* or scheme://host[:port], as browsers send it"
    parse = matching(r"\*|[a-zA-Z][\w+.-]*://[^\s/?#@,]+", allowed, str.lower)
    values = values.split(",") if isinstance(values, str) else values
    if not isinstance(values, (list, tuple)):
        raise ValueError(allowed)
    return tuple(dict.fromkeys(parse(part) for value in values for part in str(value).split(",")))


switch = matching("(?i:1|true|0|false)", "1 or 0", lambda value: value.lower() in ("1", "true"))


@dataclasses.dataclass(frozen=True)
class Options:
    """What can be set. Command line beats environment (``RAY_TENSORFLOW_<NAME>``) beats default.

    A wrong value raises OptionError, one sentence with the option, the value and what is allowed.
    """

    workers: int = option(4, "worker actors", number(int, 1))
    threads: int = option(
        1,
        "CPUs of the Ray that is started, and threads of one operation of a TensorFlow server, which runs several"
        " at once",
        number(int, 1, 2**12),
    )
    model: tuple[ModelSource, ...] = option(
        (),
        "a model to serve beside the adder: [NAME=]DIR (a SavedModel, or a folder of numbered versions) or"
        " [NAME=]module:function (a graph of your own); repeatable, in the environment with commas",
        model_sources,
    )
    parameter_servers: int = option(1, "TensorFlow ps tasks, over which variables are spread", number(int, 1))
    placement: str = option(
        "shared",
        "shared: models live and run on the parameter server, one copy in all; mirrored: each worker keeps a"
        " copy of the weights on its own device and runs there",
        matching("shared|mirrored", "shared or mirrored"),
    )
    max_batch: int = option(64, "most requests that one session.run takes together", number(int, 1))
    batch_wait_ms: float = option(0.0, "how long a batch may wait for company, in milliseconds", number(float, 0, 1e9))
    max_queue: int = option(1024, "waiting requests of one process past which new ones are refused", number(int, 1))
    timeout_s: float = option(30.0, "deadline of one request, in seconds", number(float, 0, 1e8, above=True))
    exact: bool = option(
        False, "merge rows of several requests only where every answer stays the same to the last bit", switch
    )
    checkpoint_dir: str | None = option(
        None,
        "folder in which the sum and changed variables are kept, through power cuts and for the next start;"
        " without it they are kept as long as the program runs",
        folder,
    )
    address: str | None = option(
        None, "Ray cluster to join ('auto': the one that runs here), else one is started", text
    )
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 where the platform sets PORT", text, FRONT_END)
    port: int = option(8080, "port to listen on; PORT where the platform sets it", number(int, 0, 65535), FRONT_END)
    allow_origin: tuple[str, ...] = option(
        (),
        "origin whose pages may read answers in a browser, and open a WebSocket, such as https://example.org; *: any;"
        " repeatable",
        origins,
        FRONT_END,
    )
    input: str | None = option(
        None, "rows to predict with the one --model: .npy, or .npz by input name", array_file, COMMAND
    )
    output: str | None = option(None, "where predictions go: .npy, or .npz by output name", array_file, COMMAND)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            try:
                object.__setattr__(self, field.name, field.metadata["parse"](value))
            except ValueError as error:
                shown = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value
                message = f"--{field.name.replace('_', '-')} {shown!s:.200}: must be {error}"
                raise OptionError(message) from None
        if (self.input is None) != (self.output is None):
            raise OptionError("--input and --output: one needs the other")
        if self.input is not None and len(self.model) != 1:
            raise OptionError(f"--input {self.input}: needs exactly one --model to predict with, not {len(self.model)}")

    @classmethod
    def from_environment(cls, kind: str = FRONT_END, **changes) -> Options:
        """Options from ``RAY_TENSORFLOW_<NAME>`` variables, and PORT for a front end; ``changes`` beat them."""
        variables = {f"RAY_TENSORFLOW_{field.name.upper()}": field.name for field in dataclasses.fields(cls)}
        found = {name: value for variable, name in variables.items() if (value := os.environ.get(variable))}
        if found.get("port", "").startswith("tcp://"):  # Kubernetes', for a Service of the name ray-tensorflow
            del found["port"]
        for wrong, right in mistyped(os.environ, list(variables)).items():
            log.warning("the environment variable %s is not an option: is %s meant?", wrong, right)
        port = os.environ.get("PORT") if kind == FRONT_END else None
        platform = {"port": port, "host": "0.0.0.0"} if port else {}
        return cls(**platform | found | changes)

    @classmethod
    def from_command_line(cls, description: str, kind: str, arguments: list[str] | None = None) -> Options:
        """Options from the command line of a FRONT_END or the COMMAND; a wrong one ends the program with status 2."""
        parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
        for field in dataclasses.fields(cls):
            if field.metadata["only"] in (None, kind):
                default = "off" if field.default is False else "none" if field.default in (None, ()) else field.default
                how = {"action": "append" if field.default == () else "store", "metavar": field.name.upper()}
                how = {"action": "store_true"} if field.default is False else how
                about = f"{field.metadata['help']} (default: {default})"
                parser.add_argument(f"--{field.name.replace('_', '-')}", help=about, default=argparse.SUPPRESS, **how)
        try:
            return cls.from_environment(kind, **vars(parser.parse_args(arguments)))
        except OptionError as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n")

    @property
    def compute_threads(self) -> int:
        """How many threads run a TensorFlow server's operations. Fewer than runs may come at once: on two processors
        seven took half as long again as three. So the batcher lets slow runs take all of them but one."""
        return max(self.threads + 1, 3)

    @property
    def shared(self) -> dict[str, str]:
        """What all front ends of one shared cluster must have in common, as text: the code, too."""
        texts = {"the code of shared_graph": code_of_package()}
        for name in SHARED:
            value = getattr(self, name)
            texts[f"--{name.replace('_', '-')}"] = ",".join(map(str, value)) if name == "model" else str(value)
        return texts


@functools.cache
def code_of_package() -> str:
    """A hash of the modules, as they are when it is first asked for: those on the disk may become others."""
    code = hashlib.sha256()
    for path in sorted(glob.glob(os.path.join(os.path.dirname(os.path.abspath(__file__)), "*.py"))):
        with open(path, "rb") as file:
            code.update(f"{os.path.basename(path)} {hashlib.sha256(file.read()).hexdigest()}\n".encode())
    return code.hexdigest()


def mistyped(environment: Mapping[str, str], names: list[str]) -> dict[str, str]:
    """Variables that look like one of these names and are none of them: which one each looks like."""
    found = {}
    for variable in sorted(environment):
        if variable.upper().startswith("RAY_TENSORFLOW") and variable not in names:
            near = difflib.get_close_matches(variable.upper().replace("-", "_"), names, 1, 0.93)
            found |= {variable: near[0]} if near else {}
    return found


def check_start(options: Options) -> None:
    """Raises OptionError for a model that can never be loaded, Error where threads are none."""
    check_threads()
    for source in options.model:
        if why := what_is_wrong(source):
            raise OptionError(f"--model {source}: {why}")


# that a front end sends a worker at once, and that run there: one runs while the next one is decoded
MAX_BATCHES_IN_FLIGHT = 2
SHARED = ("workers", "threads", "model", "parameter_servers", "placement", "max_batch", "exact", "checkpoint_dir")
REMOTE_CALLS_AT_ONCE = 16  # in a worker, of models that call out, perhaps to each other
# versions in each process: more at once take more memory and are no sooner done; one that takes longer than so many
# seconds keeps no other waiting
LOADED_AT_ONCE, LOAD_PATIENCE_S = 4, 30.0
