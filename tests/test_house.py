"""The house keeps its own rules: modules and rooms import one way, no room outgrows the others, files stay readable."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import jaxtyping
import pytest
import torch

import qvl_hydra
from qvl_hydra.estimators.metrics import next_token_labels

ROOT = Path(qvl_hydra.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LINES = {file: len(file.read_text().splitlines()) for file in FILES}
_LIMIT = 300
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def module_of(file: Path) -> str:
    """Dotted name of a source file."""
    parts = ("qvl_hydra", *file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def imported(file: Path) -> set[str]:
    """Modules of the package that a file imports anywhere: at its head, in a function, behind TYPE_CHECKING."""
    own, found = module_of(file), set()
    package = own if file.name == "__init__.py" else own.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            submodules = {f"{base}.{alias.name}" for alias in node.names}
            found |= (submodules & MODULES.keys()) or {base}
            if any(name not in MODULES for name in submodules):
                found.add(base)
    return (found & MODULES.keys()) - {own}


def room_of(module: str) -> str:
    """The room (subpackage, or module at the top) that a module belongs to."""
    return module.split(".")[1] if "." in module else module


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of a graph, empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_module_imports_in_a_circle() -> None:
    assert not circle({module: imported(file) for module, file in MODULES.items()})


def test_no_room_imports_in_a_circle() -> None:
    """Rooms above one another; the tables, which are light and which settings ask, stand below them all."""
    rooms: dict[str, set[str]] = {}
    for module, file in MODULES.items():
        rooms.setdefault(room_of(module), set()).update(
            room_of(other) for other in imported(file) if room_of(other) not in {room_of(module), "settings"}
        )
    assert not circle(rooms)


def test_a_circle_is_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})


def test_no_room_is_over_fifteen_percent() -> None:
    whole = sum(LINES.values())
    rooms: dict[str, int] = {}
    for file, lines in LINES.items():
        if file.parent != ROOT:
            room = file.relative_to(ROOT).parts[0]
            rooms[room] = rooms.get(room, 0) + lines
    assert {room for room, lines in rooms.items() if lines > 0.15 * whole} == set()


@pytest.mark.parametrize("file", [file for file in FILES if LINES[file] > _LIMIT], ids=lambda file: file.name)
def test_a_long_file_says_why(file: Path) -> None:
    said = ast.get_docstring(ast.parse(file.read_text())) or ""
    assert "one file because" in " ".join(said.split()).lower(), f"{file} has {LINES[file]} lines"


def names_of(file: Path) -> set[str]:
    """What a file defines or imports at its top."""
    found: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            found |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    return found


@pytest.mark.parametrize("file", sorted(BENCHMARKS.glob("*.py")), ids=lambda file: file.stem)
def test_benchmarks_find_what_they_import(file: Path) -> None:
    """Nobody runs all of them, and some need packages of their own."""
    own = {module: path for module, path in MODULES.items() if path.name != "__init__.py"}
    own |= {f"benchmarks.{path.stem}": path for path in BENCHMARKS.glob("*.py")}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("qvl_hydra", "benchmarks"):
            for alias in node.names:
                module = str(node.module)
                assert f"{module}.{alias.name}" in MODULES or alias.name in names_of(own[module]), alias.name


def test_shapes_and_types_are_checked_while_tests_run() -> None:
    def call() -> None:
        for _ in range(20):  # of a function that was called often each twentieth call is checked
            next_token_labels(torch.zeros(2))  # labels are integers

    with pytest.raises(jaxtyping.TypeCheckError):
        call()
