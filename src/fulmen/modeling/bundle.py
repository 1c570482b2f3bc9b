"""One self-contained modeling file for a checkpoint, so that it loads where fulmen is not installed.

The file is fulmen's own source: the modules that a family's module imports, one after the other, with the
imports among them cut. That works because intra-package imports are plain (`from fulmen.x import name`) and
top-level names are unique; the asserts here keep it so. A checkpoint needs a family's classes alone:
FAMILY, for all else that fulmen asks of it, is left out, with what only that imports.
"""

import ast
import importlib.util
import sys
from functools import cache
from pathlib import Path

from transformers import PreTrainedConfig

from fulmen.modeling.families import dsa_family_for, has_dsa
from fulmen.modeling.gqa.family import GqaFamily
from fulmen.modeling.vision import vision_family_for
from fulmen.modeling.whole.family import WholeFamily

BundledFamily = GqaFamily | WholeFamily
PACKAGE = "fulmen"
ALLOWED_LIBRARIES = {"torch", "transformers"}
RECORD, RECORD_MODULE = "FAMILY", "family"


def bundled_family(config: PreTrainedConfig) -> BundledFamily | None:
    """The family whose classes a checkpoint with this config brings along; None: it needs none."""
    if not has_dsa(config):
        return None
    family = vision_family_for(config) or dsa_family_for(config)
    return family if isinstance(family, BundledFamily) else None


def bundle_name(family: BundledFamily) -> str:
    """Name of the modeling module in a checkpoint of this family, without `.py`."""
    return f"modeling_{family.config_class.model_type}"


def bundle_auto_map(family: BundledFamily) -> dict[str, str]:
    """The `auto_map` entry of config.json that makes Transformers load the bundled classes."""
    return {auto: f"{bundle_name(family)}.{own.__name__}" for auto, own in family.auto_classes.items()}


@cache
def bundle_source(family: BundledFamily) -> str:
    """The text of the modeling file."""
    modules = _in_order_of_need(family.config_class.__module__)
    _require_unique_names(modules)
    header = f"# Written by {PACKAGE}: the parts of its source (Apache-2.0) that this model needs.\n"
    parts = [f"# {name}\n{_without_own_imports(source)}" for name, source in modules.items()]
    return header + "".join(f"\n\n{part.strip()}\n" for part in parts)


def _in_order_of_need(module_name: str) -> dict[str, str]:
    """Sources of a module and all of fulmen that it imports, imported ones first."""
    sources: dict[str, str] = {}

    def visit(name: str) -> None:
        if name in sources:
            return
        spec = importlib.util.find_spec(name)
        assert spec is not None, name
        assert spec.origin is not None, name
        source = Path(spec.origin).read_text(encoding="utf-8")
        for node in _own_imports(source):
            if str(node.module).rpartition(".")[2] != RECORD_MODULE:
                visit(str(node.module))
        sources[name] = source

    visit(module_name)
    return sources


def _own_imports(source: str) -> list[ast.ImportFrom]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            assert not any(_is_own(alias.name) for alias in node.names), f"plain import of {PACKAGE}"
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            if _is_own(node.module):
                assert not any(alias.asname for alias in node.names), f"renamed import from {node.module}"
                found.append(node)
    return found


def _is_own(module_name: str | None) -> bool:
    return (module_name or "").partition(".")[0] == PACKAGE


def _without_own_imports(source: str) -> str:
    lines = source.splitlines(keepends=True)
    for node in (*_own_imports(source), *_records(source)):
        # A block may hold nothing but the import.
        lines[node.lineno - 1] = " " * node.col_offset + "pass\n" if node.col_offset else ""
        for line in range(node.lineno, node.end_lineno or node.lineno):
            lines[line] = ""
    return "".join(lines)


def _records(source: str) -> list[ast.Assign]:
    assigned = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return [node for node in assigned if any(getattr(to, "id", "") == RECORD for to in node.targets)]


def _require_unique_names(modules: dict[str, str]) -> None:
    """Assert that no name means two things in the one file, and that it imports nothing unexpected."""
    meaning: dict[str, str] = {}
    for module, source in modules.items():
        for node in ast.parse(source).body:
            for name, origin in _names_bound_by(node, module).items():
                # Cut, all of them.
                if name == RECORD:
                    continue
                assert meaning.setdefault(name, origin) == origin, f"{name}: {meaning[name]} and {origin}"
        for inner in ast.walk(ast.parse(source)):
            imported = [inner.module] if isinstance(inner, ast.ImportFrom) else []
            imported += [alias.name for alias in inner.names] if isinstance(inner, ast.Import) else []
            for library in {(name or "").partition(".")[0] for name in imported}:
                allowed = library in ALLOWED_LIBRARIES | {PACKAGE} or library in sys.stdlib_module_names
                assert allowed, f"{module} imports {library}"


def _names_bound_by(node: ast.stmt, module: str) -> dict[str, str]:
    """Names that a top-level statement binds, each with what it stands for."""
    if isinstance(node, ast.Import):
        return {alias.asname or alias.name.partition(".")[0]: alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for alias in node.names
            if not _is_own(node.module)
        }
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return {node.name: f"{module}.{node.name}"}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    bound = [name for target in targets if target is not None for name in ast.walk(target)]
    return {name.id: f"{module}.{name.id}" for name in bound if isinstance(name, ast.Name)}
