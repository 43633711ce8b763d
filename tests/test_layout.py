"""The architecture: which module may import which, and what an import brings along."""

import ast
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

import shared_graph

FOLDER = os.path.join(REPOSITORY, "shared_graph")
MODULES = sorted(name[:-3] for name in os.listdir(FOLDER) if name.endswith(".py") and name != "__init__.py")
with open(os.path.join(FOLDER, "__init__.py")) as file:
    MAP = [  # the modules in the order in which the package's docstring has them, from the bottom up
        word
        for line in file.read().split('"""')[1].splitlines()
        if line.startswith("    ") and "  " in line.strip()
        for word in line.split("  ")[2].replace(",", " ").split()
        if word in MODULES
    ]


def tree(module: str) -> ast.Module:
    with open(os.path.join(FOLDER, f"{module}.py")) as file:
        return ast.parse(file.read())


def imports(node: ast.AST) -> list[str]:
    found = [n.module for n in ast.walk(node) if isinstance(n, ast.ImportFrom)]
    return found + [alias.name for n in ast.walk(node) if isinstance(n, ast.Import) for alias in n.names]


def test_the_map_names_every_module_once():
    assert sorted(MAP) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_opens_with_its_job_and_imports_only_modules_above_it_at_its_top(module):
    parsed = tree(module)
    assert ast.get_docstring(parsed)
    ours = [name.removeprefix("shared_graph.") for name in imports(parsed) if name.startswith("shared_graph")]
    assert set(ours) <= set(MAP[: MAP.index(module)])
    functions = [node for node in ast.walk(parsed) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert not any(name.startswith("shared_graph") for function in functions for name in imports(function))
    lines = [node.end_lineno - node.lineno + 1 for node in ast.walk(parsed) if isinstance(node, ast.FunctionDef)]
    assert max(lines, default=0) <= 50
    classes = [n.end_lineno - n.lineno + 1 for n in ast.walk(parsed) if isinstance(n, ast.ClassDef)]
    with open(os.path.join(FOLDER, f"{module}.py")) as file:
        assert max(classes, default=0) <= 260 and len(file.readlines()) <= 320


@pytest.mark.parametrize("module", [module for module in MODULES if module != "tensorflow_runtime"])
def test_only_one_module_imports_tensorflow_itself(module):
    assert not {"tensorflow", "tensorflow.compat.v1"} & set(imports(tree(module)))


@pytest.mark.parametrize(
    ["module", "absent"],
    [
        *[(module, ["ray", "tensorflow"]) for module in ("batcher", "batch_runner", "version_manager", "supervisor")],
        ("cluster", ["tensorflow"]),
        ("worker", ["tensorflow", "flask", "starlette", "shared_graph.cluster"]),
        ("parameter_server", ["tensorflow", "flask", "starlette", "shared_graph.cluster"]),
    ],
)
def test_an_import_brings_no_more_along_than_it_needs(module, absent):
    program = f"import sys, shared_graph.{module}; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done


def test_what_users_import_is_what_the_package_says():
    assert set(shared_graph.__all__) == {
        "Cluster", "Options", "TensorFlowVariables", "remote_predict", "Error", "OptionError", "InvalidRequest",
        "Unavailable", "WorkerLost", "DeadlineExceeded", "ModelError"}  # fmt: skip
    for name in shared_graph.__all__:
        assert getattr(shared_graph, name).__name__ == name
    with pytest.raises(AttributeError):
        _ = shared_graph.nothing
