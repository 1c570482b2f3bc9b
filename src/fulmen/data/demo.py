"""The demo corpus: what every Python installation carries. Code is the standard library, prose its manual.

Prose is the reference manual in `pydoc_data.topics`, the texts beside the modules (news, licence), and the
docstrings of modules that are to a good part documentation; these are then no code, so that no sentence is in
two documents.
"""

import ast
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path

from fulmen.data.documents import Document

DEMO = "demo"
# Tests and tables are neither code nor prose as people write it; the topics are read as text.
LEFT_OUT = {
    *("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"),
    *("lib2to3", "ensurepip", "__pycache__"),
}
MIN_FILE = 4_000
TOPICS_DOCUMENT = 16_000
# A module counts as prose from this share and this many characters of long docstrings on.
PROSE_SHARE = 0.15
LONG_DOCSTRING = 300
TRIPLE_QUOTED = re.compile(r"(\"{3}|'{3}).*?\1", re.DOTALL)


def demo_documents() -> list[Document]:
    """The documents of this Python; none if its library is not there as files."""
    return list(_documents())


@cache
def _documents() -> tuple[Document, ...]:
    """Read once in a process: telling documentation from code takes seconds."""
    topics = getattr(_topics_module(), "topics", {})
    return (*_topic_documents(topics), *_library_documents(Path(sysconfig.get_paths()["stdlib"])))


def _topics_module() -> object:
    try:
        return import_module("pydoc_data.topics")
    except ImportError:
        return None


def _topic_documents(topics: Mapping[str, str]) -> list[Document]:
    """Topics in the order of their names, joined into documents of at least 16,000 characters."""
    documents: list[Document] = []
    first, joined = "", ""
    for name, text in sorted(_without_repeats(topics).items()):
        first = first or name
        joined += text + "\n\n"
        if len(joined) >= TOPICS_DOCUMENT:
            documents.append(Document(f"manual/{first}", "prose", joined))
            first, joined = "", ""
    if joined:
        documents.append(Document(f"manual/{first}", "prose", joined))
    return documents


def _without_repeats(topics: Mapping[str, str]) -> dict[str, str]:
    """Drop the paragraphs that a longer topic has too: many topics are sections of others."""
    seen: set[str] = set()
    kept = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        new = [part for part in topics[name].split("\n\n") if " ".join(part.split()) not in seen]
        seen.update(" ".join(part.split()) for part in new)
        kept[name] = "\n\n".join(new)
    return kept


def _library_documents(root: Path) -> Iterator[Document]:
    for path in sorted(_library_files(root)):
        name = f"library/{path.relative_to(root).as_posix()}"
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if len(text) < MIN_FILE:
            continue
        least = max(MIN_FILE, PROSE_SHARE * len(text))
        docstrings = _docstrings(text, least) if path.suffix == ".py" else text
        if len(docstrings) >= least:
            yield Document(name, "prose", docstrings)
        else:
            yield Document(name, "code", text)


def _library_files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT and not name.startswith("config-")]
        for name in names:
            # The build's settings hold paths of the machine that Python was built on.
            if name.endswith((".py", ".rst", ".txt")) and not name.startswith("_sysconfigdata"):
                yield Path(folder, name)


def _docstrings(source: str, least: float) -> str:
    """The long docstrings of a module, one after the other; empty if it does not parse.

    Not parsed, which takes most of the time, if its long strings have fewer characters than `least` in all.
    """
    strings = (found.group() for found in TRIPLE_QUOTED.finditer(source))
    if sum(len(text) for text in strings if len(text) > LONG_DOCSTRING) < least:
        return ""
    with warnings.catch_warnings(action="ignore"):
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return ""
    scopes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, scopes)]
    return "\n\n".join(text for text in found if text and len(text) > LONG_DOCSTRING)
