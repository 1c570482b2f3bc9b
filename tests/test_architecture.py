"""The order of the house, read from the imports.

errors <- config, files, memory, endpoints <- ops, data, tasks, messages <- modeling <- four rooms <-
pipeline <- cli

A room imports what lies below it, never a room of its own floor.
"""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fulmen

ROOT = Path(fulmen.__file__).parent
FLOORS = [
    ("errors", "version"),
    ("config", "files", "memory", "endpoints"),
    ("ops", "data", "tasks", "messages"),
    ("modeling",),
    ("training", "evaluation", "serving", "agents"),
    ("pipeline",),
    ("cli",),
    ("__main__",),
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
OPS_LIBRARIES = {"torch", "triton", "fulmen"}
SOURCES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
MODULES = {
    ".".join(("fulmen", *path.with_suffix("").parts)).removesuffix(".__init__"): path for path in SOURCES
}


def room_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imports_of(path: Path):
    """(node, module) of every import anywhere in a file, inside functions too."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            yield node, node.module or ""


def own_rooms_imported_by(path: Path) -> set[str]:
    return {module.split(".")[1] for _, module in imports_of(path) if module.startswith("fulmen.")}


def modules_imported_by(path: Path) -> set[str]:
    """Own modules, by their full names; of `from package import module` the module."""
    found = set()
    for node, module in imports_of(path):
        if isinstance(node, ast.ImportFrom) and module.partition(".")[0] == "fulmen":
            names = {f"{module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= names or {module}
    return found


def libraries_imported_by(path: Path) -> set[str]:
    return {module.partition(".")[0] for _, module in imports_of(path)} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_arrows_point_downward(path):
    room = room_of(path)
    if room == "__init__":
        return
    assert room in FLOOR_OF, f"{room} has no floor; give it one in FLOORS"
    for imported in own_rooms_imported_by(path) - {room}:
        assert imported in FLOOR_OF, f"{path} imports the unknown room {imported}"
        assert FLOOR_OF[imported] < FLOOR_OF[room], f"{path} imports {imported}, which is not below {room}"


def folder_of(name: str) -> str:
    """Of a module in a folder of a room that folder; of any other the module itself."""
    parts = MODULES[name].parts
    return "/".join(parts[:2]) if len(parts) > 2 else name


def test_no_circles():
    """Neither of modules nor of folders. Imports inside functions count too."""
    needs = {name: modules_imported_by(path) - {name} for name, path in MODULES.items()}
    assert list(TopologicalSorter(needs).static_order())
    folders: dict[str, set[str]] = {}
    for name, imported in needs.items():
        folders.setdefault(folder_of(name), set()).update(map(folder_of, imported))
    assert list(TopologicalSorter({name: own - {name} for name, own in folders.items()}).static_order())


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_own_imports_are_absolute_and_plain(path):
    for node, module in imports_of(path):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is relative"
        if module.partition(".")[0] == "fulmen":
            assert isinstance(node, ast.ImportFrom), f"{path}:{node.lineno}: write `from {module} import ...`"
            assert not any(alias.asname for alias in node.names), f"{path}:{node.lineno} renames"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_libraries_stay_in_their_rooms(path):
    libraries = libraries_imported_by(path)
    if room_of(path) in ("errors", "version", "config", "files", "endpoints"):
        assert libraries <= {"fulmen"}
    if room_of(path) == "ops":
        assert libraries <= OPS_LIBRARIES
    if "triton" in libraries:
        assert path.name.startswith("triton")
    if libraries & {"rich", "typer"}:
        assert room_of(path) == "cli"
    if "sqlalchemy" in libraries:
        assert path.parts[0] == "serving"
        assert path.name.startswith("ledger")
    if "vllm" in libraries:
        assert path.parts[:2] == ("serving", "vllm_plugin")


def test_the_tests_mirror_the_house():
    for folder in Path(__file__).parent.iterdir():
        # Conformance asks the same of several rooms.
        if folder.is_dir() and folder.name != "conformance" and not folder.name.startswith(("_", ".")):
            assert (ROOT / folder.name).is_dir(), f"tests/{folder.name} mirrors no room"
