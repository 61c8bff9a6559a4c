"""The house rules about imports, read from the source: who may import whom, and no circles, not even lazy ones."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# scripts, tests -> cluster -> decode -> prefill -> {transport, codec} -> kernels
MAY_IMPORT: dict[str, set[str]] = {
    "kernels": set(),
    "transport": set(),
    "codec": {"kernels"},
    "prefill": {"transport", "codec", "kernels"},
    "decode": {"prefill", "transport", "codec", "kernels"},
    "cluster": {"decode", "prefill", "transport", "codec", "kernels"},
    "scripts": {"cluster", "decode", "prefill", "transport", "codec", "kernels"},
}

# Where a library may be used at all (tests may use any).
ONLY_IN: dict[str, set[str]] = {
    "zmq": {"transport"},
    "ray": {"cluster", "scripts"},
    "fastapi": {"cluster", "scripts"},
    "starlette": {"cluster", "scripts"},
    "uvicorn": {"cluster", "scripts"},
    "yaml": {"cluster", "scripts"},
    "pydantic": {"cluster", "scripts"},
    "prometheus_client": {"cluster"},
    "typer": {"scripts"},
    "transformers": {"prefill", "cluster", "scripts"},
    "torch": {"kernels", "codec", "prefill", "decode", "cluster", "scripts"},
}


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the house by its dotted name."""
    found: dict[str, ast.Module] = {}
    for package in MAY_IMPORT:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text(), filename=str(path))
    return found


def imports_of(name: str) -> Iterator[tuple[str, int]]:
    """(imported module, line), wherever in the file the import stands."""
    for node in ast.walk(modules()[name]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                is_package = (ROOT / name.replace(".", "/") / "__init__.py").is_file()
                parts = name.split(".")
                above = parts[: len(parts) - node.level + is_package]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield (inner if inner in modules() else base), node.lineno


def each_import() -> Iterator[tuple[str, str, str]]:
    """(module, imported, where) for the whole house."""
    for name in modules():
        for imported, line in imports_of(name):
            yield name, imported, f"{name}:{line} imports {imported}"


def test_there_is_a_house() -> None:
    assert {name.split(".")[0] for name in modules()} == set(MAY_IMPORT)


def test_packages_import_only_downwards() -> None:
    wrong = []
    for name, imported, where in each_import():
        ours, theirs = name.split(".")[0], imported.split(".")[0]
        if theirs in MAY_IMPORT and theirs != ours and theirs not in MAY_IMPORT[ours]:
            wrong.append(where)
        if theirs == "tests":
            wrong.append(where)
    assert wrong == []


def test_libraries_stay_in_their_folders() -> None:
    wrong = [
        where
        for name, imported, where in each_import()
        if name.split(".")[0] not in ONLY_IN.get(imported.split(".")[0], set(MAY_IMPORT))
    ]
    assert wrong == []


def test_there_are_no_circles() -> None:
    """Lazy imports count: a circle that is hidden in a function is a circle."""
    graph = {name: {i for i, _ in imports_of(name) if i in modules() and i != name} for name in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_init_files_are_empty_and_tests_have_none() -> None:
    for package in MAY_IMPORT:
        assert (ROOT / package / "__init__.py").read_text() == ""
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_every_module_says_what_it_is() -> None:
    silent = [name for name, tree in modules().items() if "." in name and not ast.get_docstring(tree)]
    assert silent == []


def test_our_kernels_folder_does_not_pass_for_the_package_of_that_name() -> None:
    """transformers looks for a package `kernels`, and finds ours."""
    code = "import kernels; from transformers import LlamaForCausalLM; print(kernels.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "kernels" / "__init__.py"
