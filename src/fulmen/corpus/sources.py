"""Where documents come from: the demo, a file, a directory, or a data set on the Hugging Face hub.

The network is touched only for a source that says so: `hf:name`.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from fulmen.corpus.demo import DEMO, demo_documents
from fulmen.corpus.documents import Corpus, Document, split_documents
from fulmen.errors import CorpusError

HUB_PREFIX = "hf:"
# A hub data set may have terabytes; this much is far more than a conversion reads (some 50 M tokens).
HUB_CHARACTERS = 200_000_000
# Rows looked at to find the field with the text.
SAMPLE_ROWS = 100
PROSE_SUFFIXES = {"", ".adoc", ".log", ".markdown", ".md", ".org", ".rst", ".tex", ".text", ".txt"}


class Reading(NamedTuple):
    """Documents, and how many files or rows held no text."""

    documents: list[Document]
    skipped: int = 0


def load_corpus(*sources: str | Path) -> Corpus:
    """Read the sources, the demo corpus if there are none, and split all their documents together.

    Args:
        sources: each one of
            "demo": the library and the manual of this Python, no download;
            a path: a file of UTF-8 text, a `.jsonl` or `.parquet` file (field "text", or "messages", or the
            only field of strings), or a directory of such files at any depth;
            "hf:name", "hf:name:config" or "hf:name:config:split": a data set on the hub, its first 200 M
            characters; an empty config is the default one, the split is "train" unless given.

    Raises:
        CorpusError: missing, empty, binary, damaged, without text, or too small to be split.
    """
    readings = [_read(source) for source in sources or (DEMO,)]
    documents = chain.from_iterable(reading.documents for reading in readings)
    return split_documents(documents, sum(reading.skipped for reading in readings))


def _read(source: str | Path) -> Reading:
    if source == DEMO:
        return Reading(demo_documents())
    if isinstance(source, str) and source.startswith(HUB_PREFIX):
        return _read_hub(source)
    return _read_path(Path(source).expanduser())


def _read_path(path: Path) -> Reading:
    if path.is_dir():
        return _read_directory(path)
    if not path.exists():
        raise CorpusError(f"{path} does not exist; name a file, a directory, {DEMO!r} or {HUB_PREFIX}name")
    if path.suffix.lower() in TABLE_READERS:
        return _read_table(path, path.name)
    return Reading([_read_document(path, path.name)])


def _read_directory(root: Path) -> Reading:
    """Files below `root` but hidden ones, named by their path from there; those with no text are skipped."""
    documents: list[Document] = []
    skipped = 0
    for path in sorted(_visible_files(root)):
        name = path.relative_to(root).as_posix()
        if path.suffix.lower() in TABLE_READERS:
            reading = _read_table(path, name)
            documents += reading.documents
            skipped += reading.skipped
            continue
        try:
            documents.append(_read_document(path, name))
        except CorpusError:
            skipped += 1
    if not documents:
        raise CorpusError(
            f"{root} holds no text ({skipped} files are empty or binary); name another directory"
        )
    return Reading(documents, skipped)


def _visible_files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _read_table(path: Path, name: str) -> Reading:
    return _read_rows(TABLE_READERS[path.suffix.lower()](path), name)


def _read_document(path: Path, name: str) -> Document:
    return Document(name, "prose" if path.suffix.lower() in PROSE_SUFFIXES else "code", _read_text(path))


def _read_text(path: Path) -> str:
    """The file's UTF-8 text with plain line ends. Raises CorpusError if it is unreadable, binary or empty."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path} cannot be read ({error.strerror}); mend that or leave it out") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it or leave it out"
        ) from error
    if "\0" in text:
        raise CorpusError(f"{path} is binary (NUL at character {text.index(chr(0))}); name a text file")
    if not text.strip():
        raise CorpusError(f"{path} is empty; name a file with text")
    return text.replace("\r\n", "\n")


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorpusError(f"{path}:{number} is not JSON ({error}); mend or remove that line") from error
        if not isinstance(row, dict):
            raise CorpusError(
                f'{path}:{number} is no JSON object; each line must be one like {{"text": ...}}'
            )
        yield row


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    return _data_set_rows(str(path), "parquet", data_files=str(path), split="train")


TABLE_READERS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".jsonl": _jsonl_rows,
    ".parquet": _parquet_rows,
}


def _read_hub(source: str) -> Reading:
    name, *more = source.removeprefix(HUB_PREFIX).split(":")
    if not name or len(more) > 2:
        raise CorpusError(
            f"{source} is no data set; write {HUB_PREFIX}name, or {HUB_PREFIX}name:config:split"
        )
    config, split = (*more, "", "")[:2]
    rows = _data_set_rows(source, name, config or None, split=split or "train")
    return _read_rows(_first_rows(rows, HUB_CHARACTERS), name)


def _first_rows(rows: Iterable[dict[str, Any]], characters: int) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield row
        characters -= len(str(row))
        if characters <= 0:
            return


def _data_set_rows(source: str, *names: str | None, **options: str) -> Iterator[dict[str, Any]]:
    """Stream a data set: nothing is kept on the disk, and no more is fetched than is read."""
    from datasets import load_dataset

    try:
        yield from load_dataset(*names, **options, streaming=True)
    except Exception as error:  # the loaders raise whatever their formats and the network raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CorpusError(
            f"{source} cannot be read as a data set ({reason}); check its name, file or network"
        ) from error


def _read_rows(rows: Iterable[dict[str, Any]], name: str) -> Reading:
    """One document per row, "name:1" the first; rows without text are counted as skipped."""
    rows = iter(rows)
    sample = list(islice(rows, SAMPLE_ROWS))
    field = _text_field(sample, name)
    documents: list[Document] = []
    skipped = 0
    for number, row in enumerate(chain(sample, rows), start=1):
        text = _conversation(row.get(field)) if field == "messages" else row.get(field)
        if not isinstance(text, str) or not text.strip():
            skipped += 1
        else:
            documents.append(Document(f"{name}:{number}", "chat" if field == "messages" else "prose", text))
    if not documents:
        raise CorpusError(
            f"{name} has no text: field {field!r} is empty in all {skipped} rows; name another file"
        )
    return Reading(documents, skipped)


def _text_field(rows: list[dict[str, Any]], name: str) -> str:
    """Where the text is: "text", else "messages", else the only field that holds strings."""
    for known in ("text", "messages"):
        if any(known in row for row in rows):
            return known
    strings = sorted({field for row in rows for field, value in row.items() if isinstance(value, str)})
    if len(strings) != 1:
        have = f"several fields of strings ({', '.join(strings)})" if strings else "no field of strings"
        raise CorpusError(f"{name} has {have} and no field 'text'; rename the one with the text to 'text'")
    return strings[0]


def _conversation(messages: Any) -> str | None:
    """Chat messages as plain text, `role: content`; the parts of a content that are no text are left out."""
    if not isinstance(messages, list):
        return None
    turns = [
        (message.get("role", ""), message.get("content")) for message in messages if isinstance(message, dict)
    ]
    lines = []
    for role, content in turns:
        if isinstance(content, list):
            content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
        if isinstance(content, str) and content:
            lines.append(f"{role}: {content}")
    return "\n\n".join(lines) + "\n" if lines else None
