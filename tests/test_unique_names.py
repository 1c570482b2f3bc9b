"""A name at the top of a module means one thing in errors, config, ops and modeling.

A checkpoint carries their source as one file (`fulmen.modeling.bundle`), and each is found in one place.
"""

import ast
from collections import defaultdict
from pathlib import Path

import fulmen

ROOT = Path(fulmen.__file__).parent
ROOMS = {"errors", "config", "files", "ops", "modeling"}
# The public operations have the names of what they call; a loader searches for the others.
DOOR, SAME_EVERYWHERE = Path("ops/functional.py"), {"FAMILY", "log"}


def is_bundled(path: Path) -> bool:
    """Whether a module may get into a checkpoint: kernels for GPUs and the public door do not."""
    return path.parts[0].removesuffix(".py") in ROOMS and path != DOOR and not path.name.startswith("triton")


def names_bound_by(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    bound = [name for target in targets if target is not None for name in ast.walk(target)]
    return [name.id for name in bound if isinstance(name, ast.Name)]


def names_of(source: str) -> set[str]:
    return {name for node in ast.parse(source).body for name in names_bound_by(node)}


def test_public_names_are_unique():
    homes = defaultdict(list)
    for path in sorted(ROOT.rglob("*.py")):
        if is_bundled(path.relative_to(ROOT)):
            for name in names_of(path.read_text(encoding="utf-8")):
                homes[name].append(str(path.relative_to(ROOT)))
    assert len(homes) > 300
    twice = {name: files for name, files in homes.items() if len(files) > 1 and not name.startswith("_")}
    assert twice.keys() - SAME_EVERYWHERE == set(), twice


def test_names_are_read_as_python_binds_them():
    source = "A, B = 1, 2\nc: int = 3\ndef d(e):\n    f = 1\nclass G:\n    h = 2\nfrom i import j\n"
    assert names_of(source) >= {"A", "B", "c", "d", "G"}
    assert not names_of(source) & {"e", "f", "h", "i", "j"}
