"""Where documents come from: the demo, a file, a directory, or a data set on the Hugging Face hub.

The network is touched only for a source that says so: `hf:name`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import chain
from pathlib import Path

from fulmen.data.data_sets import (
    FEW_TEXTS,
    HUB_PREFIX,
    DataSet,
    DataSets,
    find_data_sets,
    is_table,
    visible_files,
)
from fulmen.data.demo import DEMO, demo_documents
from fulmen.data.documents import Corpus, Document, split_documents
from fulmen.data.rows import part_of
from fulmen.errors import CorpusError

# A data set may have terabytes; this much is far more than a conversion reads (some 50 M tokens).
DATA_SET_CHARACTERS = 200_000_000
PROSE_SUFFIXES = {"", ".adoc", ".log", ".markdown", ".md", ".org", ".rst", ".tex", ".text", ".txt"}
NO_TEXT_FILE = "empty or binary files"


@dataclass(frozen=True)
class Reading:
    """What one source holds, and what was left out, by reason.

    documents: to be split together. rows: of a data set, each with its own part.
    """

    documents: tuple[Document, ...] = ()
    rows: tuple[Document, ...] = ()
    skipped: Counter[str] = field(default_factory=Counter)


def load_corpus(*sources: str | Path, texts: Sequence[str] = ()) -> Corpus:
    """Read the sources, the demo corpus if there are none and no texts, and split their documents.

    Args:
        sources: each one of
            "demo": the library and the manual of this Python, no download;
            a path: a file of UTF-8 text, a `.jsonl` or `.parquet` file (field "text", or "messages", or the
            only field of strings), or a directory of such files at any depth;
            "hf:name", "hf:name:config" or "hf:name:config:split": a data set on the hub; an empty config is
            the default one, the split is "train" unless given.
            Of a data set (from the hub, a `.jsonl` or `.parquet` file, a directory of these alone) the first
            200 M characters are read. From 100 texts on, `part_of` says where each row belongs, which is
            also where it belongs when the data set is streamed; fewer are split as files are.
        texts: prose in memory, split as the rows of a data set are.

    Raises:
        CorpusError: missing, empty, binary, damaged, without text, or too small to be split.
    """
    readings = [_read(source) for source in sources or (() if texts else (DEMO,))]
    if texts:
        readings.append(_read_texts(texts))
    documents = chain.from_iterable(reading.documents for reading in readings)
    rows = ((row, part_of(row.text)) for reading in readings for row in reading.rows)
    return split_documents(documents, rows, sum((reading.skipped for reading in readings), Counter()))


def stream_of(*sources: str | Path) -> DataSets | None:
    """The sources as data sets to stream; None if they are to be read whole, by `load_corpus`.

    Streamed are data sets of 100 texts or more: if every source is from the hub, a `.jsonl` or `.parquet`
    file, or a directory of these alone.

    Raises:
        CorpusError: a data set cannot be read, or none of its rows holds text.
    """
    found = [find_data_sets(source) for source in sources]
    if not found or not all(found) or any(DataSets(members).are_few() for members in found):
        return None
    return DataSets(tuple(chain.from_iterable(found)))


def _read_texts(texts: Sequence[str]) -> Reading:
    """Named by what they say, so that their order decides nothing."""
    documents = tuple(
        Document(f"text/{sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}", "prose", text)
        for text in texts
    )
    return Reading(documents) if len(texts) < FEW_TEXTS else Reading(rows=documents)


def _read(source: str | Path) -> Reading:
    if source == DEMO:
        return Reading(tuple(demo_documents()))
    if members := find_data_sets(source):
        return _read_data_sets(DataSets(members))
    return _read_path(Path(source).expanduser())


def _read_data_sets(data_sets: DataSets) -> Reading:
    skipped: Counter[str] = Counter()
    read: list[Document] = []
    characters, is_whole = 0, True
    for document in data_sets.documents(skipped):
        if characters >= DATA_SET_CHARACTERS:
            is_whole = False
            break
        read.append(document)
        characters += len(document.text)
    if is_whole and len(read) < FEW_TEXTS:
        return Reading(documents=tuple(read), skipped=skipped)
    return Reading(rows=tuple(read), skipped=skipped)


def _read_path(path: Path) -> Reading:
    if path.is_dir():
        return _read_directory(path)
    if not path.exists():
        raise CorpusError(f"{path} does not exist; name a file, a directory, {DEMO!r} or {HUB_PREFIX}name")
    return Reading((_read_document(path, path.name),))


def _read_directory(root: Path) -> Reading:
    """Files below `root` but hidden ones, named by their path from there; those with no text are skipped."""
    documents: list[Document] = []
    skipped: Counter[str] = Counter()
    for path in visible_files(root):
        name = path.relative_to(root).as_posix()
        if is_table(path):
            documents += DataSets((DataSet(name, str(path)),)).documents(skipped)
            continue
        try:
            documents.append(_read_document(path, name))
        except CorpusError:
            skipped[NO_TEXT_FILE] += 1
    if not documents:
        count = skipped[NO_TEXT_FILE]
        raise CorpusError(f"{root} holds no text ({count} files are empty or binary); name another directory")
    return Reading(tuple(documents), skipped=skipped)


def _read_document(path: Path, name: str) -> Document:
    return Document(name, "prose" if path.suffix.lower() in PROSE_SUFFIXES else "code", _read_text(path))


def _read_text(path: Path) -> str:
    """The file's UTF-8 text with plain line ends. Raises CorpusError if it is unreadable, binary or empty."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path} cannot be read ({error.strerror}); fix that or leave it out") from error
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
