"""The house: which room may know which, and how large a thing may be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Top floor first. Rooms of one line may know each other's, as long as no circle comes of it.
FLOORS = [
    {"cli"},
    {"job", "serving"},
    {"callbacks"},
    {"recipe"},
    {"shrinking"},
    {"exporting"},
    {"decoder"},
    {"pruning", "quantization", "distillation"},
    {"evaluation"},
    {"monitoring"},
    {"training"},
    {"calibration"},
    {"data"},
    {"families"},
    {"model"},
    {"generation"},
    {"file"},
    {"terminal"},
    {"backend"},
]
FLOOR_OF = {room: i for i, floor in enumerate(FLOORS) for room in floor}
LAZY = "tfgptopt"  # `tfgptopt.export` and the like are resolved when they are first used.


def modules() -> dict[str, Path]:
    """Returns every module of the package by its dotted name."""
    found = {}
    for folder, package in (
        (ROOT / "tfgptopt", "tfgptopt"),
        (ROOT / "callbacks", "tfgptopt.callbacks"),
    ):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = path
    return found


MODULES = modules()


def imports_of(name: str) -> set[str]:
    """Returns the modules of the package that a module imports, anywhere, but for types only."""
    tree = ast.parse(MODULES[name].read_text("utf-8"))
    for node in list(ast.walk(tree)):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {one if one in MODULES else node.module for one in inside}
    return {one for one in found if one.split(".")[0] == "tfgptopt"} - {name, LAZY}


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_every_room_has_a_floor_and_the_top_level_holds_rooms_only():
    rooms = {room_of(name) for name in MODULES if name != LAZY}
    assert rooms == set(FLOOR_OF)
    files = {path.name for path in (ROOT / "tfgptopt").glob("*.py")}
    assert files == {"__init__.py", "backend.py"}


def test_arrows_point_down():
    wrong = [
        f"{name} imports {other}"
        for name in MODULES
        if name != LAZY
        for other in imports_of(name)
        if FLOOR_OF[room_of(other)] < FLOOR_OF[room_of(name)]
    ]
    assert not wrong, "\n".join(sorted(wrong))


def circle_in(edges: dict[str, set[str]]) -> list[str]:
    """Returns names that import each other in a circle, or nothing."""
    state: dict[str, int] = {}

    def visit(name: str, way: list[str]) -> list[str]:
        state[name] = 1
        for other in sorted(edges[name]):
            if state.get(other) == 1:
                return [*way[way.index(other) :], other]
            if other not in state and (found := visit(other, [*way, other])):
                return found
        state[name] = 2
        return []

    for name in sorted(edges):
        if name not in state and (found := visit(name, [name])):
            return found
    return []


def test_no_circle_runs_through_modules_or_rooms():
    edges = {name: imports_of(name) & set(MODULES) for name in MODULES}
    # A package that gathers its modules' names is not what they depend on.
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    within = {n: {o for o in os if o not in packages} for n, os in edges.items()}
    assert not circle_in(within)
    rooms: dict[str, set[str]] = {room: set() for room in FLOOR_OF}
    for name, others in edges.items():
        if name != LAZY:
            rooms[room_of(name)] |= {room_of(other) for other in others if other != LAZY}
    assert not circle_in({room: others - {room} for room, others in rooms.items()})


def test_the_check_sees_a_circle():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("name", sorted(MODULES))
def test_files_and_functions_are_small(name):
    text = MODULES[name].read_text("utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert body_lines(node) <= 60, node.name
