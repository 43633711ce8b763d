"""Where a served model comes from: a SavedModel, a folder of numbered versions, or a function that builds a graph."""

from __future__ import annotations

import ast
import collections
import contextlib
import errno
import importlib.machinery
import os
import re
import stat
from collections.abc import Iterator
from typing import NamedTuple

ADDER = "adder"
SAVED_MODEL_FILES = ("saved_model.pb", "saved_model.pbtxt")


class Found(NamedTuple):
    """What lies in a model's folder."""

    versions: dict[int, ModelSource]
    labels: dict[str, int]
    files_seen: dict[int, list]  # of each version
    oddity: str | None = None  # tells of a version that is there twice, as 7 and 007


class ModelSource(NamedTuple):
    """A SavedModel's folder, or a function that builds a graph."""

    name: str
    version: int | None  # None: the folder has numbered versions, which come and go
    folder: str | None = None
    function: str | None = None  # "module:function"

    def __str__(self) -> str:
        return f"{self.name} ({self.folder or self.function})"

    def look(self) -> Found:
        """Raises OSError without a folder."""
        versions = self.versions()
        files_seen = {number: version.files_seen() for number, version in versions.items()}
        return Found(versions, self.labels(), files_seen, self.oddity())

    def versions(self) -> dict[int, ModelSource]:
        """What can be loaded at the moment. The shorter of 7 and 007 counts. Raises OSError without a folder."""
        if self.version is not None:
            if self.folder:
                os.stat(self.folder)
            return {self.version: self}
        return {n: ModelSource(self.name, n, os.path.join(self.folder, names[0])) for n, names in self._names().items()}

    def oddity(self) -> str | None:
        """Tells of a version that is there twice, as 7 and 007, if one is."""
        doubles = [] if self.version is not None else [item for item in self._names().items() if len(item[1]) > 1]
        if not doubles:
            return None
        number, names = min(doubles)
        return f"Version {number} of model {self.name} is there as {' and as '.join(names)}: {names[0]} is taken."

    def _names(self) -> dict[int, list[str]]:
        """What the folders of each version are called, the shorter first."""
        found = collections.defaultdict(list)
        for name in sorted(os.listdir(self.folder), key=len):
            is_number = name.isdecimal() and name.isascii() and int(name) < 2**63
            if is_number and _has_saved_model(os.path.join(self.folder, name)):
                found[int(name)].append(name)
        return found

    def labels(self) -> dict[str, int]:
        """The symbolic links ``stable -> 123`` beside the versions; those that lead elsewhere are none."""
        if self.version is not None:
            return {}
        here, labels = (os.path.normpath(self.folder), os.path.realpath(self.folder)), {}
        for name in os.listdir(self.folder):
            with contextlib.suppress(OSError):  # it is no link, or has been moved just now
                target = os.path.join(self.folder, os.readlink(os.path.join(self.folder, name)))
                folder, version = os.path.split(os.path.normpath(target))
                if folder in here and version.isdecimal() and not name.isdecimal():
                    labels[name] = int(version)
        return labels

    def files_seen(self) -> list[tuple[str, int, float]]:
        """The files of a version, with their sizes and times. Raises nothing."""
        return sorted(_files(self.folder)) if self.folder else []


def _has_saved_model(folder: str) -> bool:
    return any(may_be_file(os.path.join(folder, name)) for name in SAVED_MODEL_FILES)


def may_be_file(path: str) -> bool:
    """Is it one, or cannot that be seen, such as in a folder that is closed to us? Then who opens it says why."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def _files(top: str) -> Iterator[tuple[str, int, float]]:
    """All below, through links as well, each folder once: links may lead in circles."""
    seen = set()
    for folder, folders, names in os.walk(top, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        for path in (os.path.join(folder, name) for name in names):
            try:
                status = os.stat(path)
                yield path, status.st_size, status.st_mtime
            except OSError:  # a link that leads nowhere, or a file that is gone: what needs it will say so
                yield path, -1, 0.0


ADDER_SOURCE = ModelSource(ADDER, 1, function="shared_graph.adder:build_adder")
OTHER_FILES = {  # what people have instead of a SavedModel, and what to do with it
    r".*\.(keras|h5|hdf5)": "a Keras model: call keras.models.load_model(FILE).export(DIR) and give the DIR",
    r".*\.pb": "a frozen graph: write a function that calls tf.import_graph_def, and give it as module:function",
    r".*\.(ckpt.*|index|meta|data-\d+-of-\d+)": "a checkpoint: write a function that builds the graph and calls"
    " tf.train.init_from_checkpoint, and give it as module:function",
}


def model_source(value: object) -> ModelSource:
    """Parse ``[NAME=]DIR`` or ``[NAME=]module:function``. Raises ValueError(what is allowed)."""
    if isinstance(value, ModelSource):
        return value
    name, where = re.fullmatch(r"(?:([\w.-]+)=)?(.*)", str(value), re.DOTALL).groups()
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", where) and not os.path.isdir(where):
        return ModelSource(name or where.partition(":")[2], 1, function=where)
    if not where or not os.path.isdir(where):
        for pattern, what in OTHER_FILES.items():
            if re.fullmatch(pattern, where, re.S) and (os.path.isfile(where) or os.path.isfile(f"{where}.index")):
                raise ValueError(f"a folder or a function, but that is {what}")
        what = "a folder that exists, or module:function, with NAME= (of letters, digits, _ . -) before it or not"
        raise ValueError(f"{what}: {where[:200]!r} is neither")
    parent, base = os.path.split(os.path.abspath(where))
    is_saved_model = _has_saved_model(where)  # perhaps one version of several, named outright
    is_version = is_saved_model and base.isdecimal() and base.isascii()
    name = name or (os.path.basename(parent) if is_version else base)
    if not name or not name.isprintable():
        raise ValueError(f"a folder with NAME= before it, since {name!r} cannot stand in an address")
    source = ModelSource(name, int(base) if is_version else 1 if is_saved_model else None, os.path.abspath(where))
    try:
        versions = source.versions()
    except OSError as error:
        raise ValueError(f"a folder that can be read: {error.strerror}") from None
    if not versions:
        raise ValueError("a folder with a saved_model.pb in it, or in one of its folders that are named by a number")
    return source


def model_sources(values: object) -> tuple[ModelSource, ...]:
    values = values.split(",") if isinstance(values, str) else values if isinstance(values, (list, tuple)) else [values]
    sources = tuple(map(model_source, values))
    [(name, count)] = collections.Counter([ADDER, *(source.name for source in sources)]).most_common(1)
    if count > 1:
        raise ValueError(f"one model for each name, but {name!r} stands for two (NAME=... gives another name)")
    return sources


def what_is_wrong(source: ModelSource) -> str | None:
    """What can be seen of a source that can never be loaded, without executing anything of the user's."""
    if source.function:
        return _function_fault(*source.function.split(":"))
    try:
        faults = [_saved_model_fault(version.folder) for version in source.versions().values()]
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    return next(iter(faults), "there is no version in it any more") if all(faults) else None


def _saved_model_fault(folder: str) -> str | None:
    paths = (os.path.join(folder, name) for name in SAVED_MODEL_FILES)
    if (path := next(filter(may_be_file, paths), None)) is None:
        return f"there is no {SAVED_MODEL_FILES[0]} in {folder} any more"
    try:
        with open(path, "rb") as file:
            head = file.read(1)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if not head or (path.endswith(".pb") and head not in b"\x08\x12"):  # the tags of a SavedModel's two fields
        return f"{path} is damaged: it is not a SavedModel"
    return None


def _function_fault(module: str, name: str) -> str | None:
    if module == "__main__":
        return "a function of the program itself, or of a notebook, cannot be found by others: put it into a module"
    path, spec = None, None
    for end in (part.end() for part in re.finditer(r"[^.]+", module)):
        spec = importlib.machinery.PathFinder.find_spec(module[:end], path)
        if spec is None:
            return f"there is no module {module[:end]!r} on the path"
        path = spec.submodule_search_locations
    if not spec.origin or not spec.origin.endswith(".py"):
        return None
    try:
        with open(spec.origin, "rb") as file:
            nodes = list(ast.walk(ast.parse(file.read())))
    except (OSError, SyntaxError, ValueError) as error:
        return f"the module {module!r} cannot be read: {error}"
    names = {getattr(n, "asname", None) or getattr(n, "name", None) or getattr(n, "id", None) for n in nodes}
    return None if names & {name, "*", "__getattr__"} else f"the module {module!r} has no {name!r}"
