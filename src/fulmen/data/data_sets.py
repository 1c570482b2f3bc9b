"""Data sets of rows, which are read one after the other and never held whole: JSONL, Parquet, the hub's."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

from fulmen.data.documents import Document
from fulmen.data.rows import described, row_document, text_field
from fulmen.errors import CorpusError, FulmenError

HUB_PREFIX = "hf:"
TABLE_SUFFIXES = (".jsonl", ".parquet")
# What stands beside the shards of a data set and is no part of it.
ABOUT_IT = ("readme", "license")
# Rows looked at to find the field with the text.
SAMPLE_ROWS = 100
# A data set with fewer texts is read at once and split as files are: parts of so few would be noise.
FEW_TEXTS = 100


class DataSet:
    """The rows of one file, or of one data set on the hub.

    Attributes:
        name: what its documents are called after.
        place: a path, or "hf:name:config:split".
    """

    def __init__(self, name: str, place: str) -> None:
        self.name, self.place = name, place

    @property
    def size(self) -> int:
        """Bytes of the file; 0 on the hub."""
        return 0 if self.place.startswith(HUB_PREFIX) else Path(self.place).stat().st_size

    def open(self) -> Any:
        """A `datasets.IterableDataset` at its first row. Raises CorpusError."""
        from datasets import IterableDataset, load_dataset

        try:
            if self.place.startswith(HUB_PREFIX):
                name, config, split = _hub_name(self.place)
                return load_dataset(name, config, split=split, streaming=True)
            if self.place.lower().endswith(".jsonl"):
                # Its own reader: lines may have other fields and types than the lines before.
                return IterableDataset.from_generator(_jsonl_rows, gen_kwargs={"path": self.place})
            return load_dataset("parquet", data_files=self.place, split="train", streaming=True)
        except Exception as error:
            raise self._unreadable(error) from error

    def rows(self, opened: Any) -> Iterator[dict[str, Any]]:
        """What `open` gave, row by row. Raises CorpusError."""
        try:
            yield from opened
        except Exception as error:
            raise self._unreadable(error) from error

    def field(self, opened: Any) -> str:
        """Where the rows have their text; "" if there are none. Raises CorpusError."""
        sample = list(islice(self.rows(opened), SAMPLE_ROWS))
        return text_field(sample, self.name) if sample else ""

    def documents(self, skipped: Counter[str]) -> Iterator[Document]:
        """One document per row with text, "name:1" the first. Raises CorpusError."""
        opened = self.open()
        field = self.field(opened)
        for number, row in enumerate(self.rows(opened), start=1):
            document = row_document(f"{self.name}:{number}", row.get(field), skipped)
            if document is not None:
                yield document

    def _unreadable(self, error: Exception) -> FulmenError:
        # The loaders raise whatever their formats and the network raise.
        if isinstance(error, FulmenError):
            return error
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return CorpusError(
            f"{self.place} cannot be read as a data set ({reason}); check its name, file or network"
        )


@dataclass(frozen=True)
class DataSets:
    """Data sets that are read one after the other."""

    members: tuple[DataSet, ...]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of names, sizes of files, and the first texts; all of it is too long to be read."""
        digest = hashlib.sha256()
        for member in self.members:
            digest.update(f"{member.name} {member.size}\n".encode())
        for document in islice(self.documents(Counter()), FEW_TEXTS):
            digest.update(document.text.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def documents(self, skipped: Counter[str]) -> Iterator[Document]:
        """Those of all members. Raises CorpusError, too if nothing is left."""
        first = None
        for document in chain.from_iterable(member.documents(skipped) for member in self.members):
            first = first or document
            yield document
        if first is None:
            raise self.nothing_left(skipped)

    def nothing_left(self, skipped: Counter[str]) -> CorpusError:
        """The error of data sets in which no row has text."""
        names = ", ".join(member.name for member in self.members[:3])
        more = f" and {len(self.members) - 3} more" if len(self.members) > 3 else ""
        have = f"rows {described(skipped)}" if skipped else "no rows"
        return CorpusError(f"{names}{more} has no text to use ({have}); name another data set")

    def are_few(self) -> bool:
        """Whether there are fewer than 100 texts in all. Raises CorpusError."""
        return len(list(islice(self.documents(Counter()), FEW_TEXTS))) < FEW_TEXTS


def find_data_sets(source: str | Path) -> tuple[DataSet, ...]:
    """A source as data sets: `hf:name`, a `.jsonl` or `.parquet` file, or a directory of nothing else.

    A README or LICENSE beside the files does not count. Empty if the source is something else.
    """
    if str(source).startswith(HUB_PREFIX):
        return (DataSet(_hub_name(str(source))[0], str(source)),)
    path = Path(source).expanduser()
    if not path.is_dir():
        return (DataSet(path.name, str(path)),) if is_table(path) and path.is_file() else ()
    files = [file for file in visible_files(path) if file.stem.lower() not in ABOUT_IT]
    if not files or not all(map(is_table, files)):
        return ()
    return tuple(DataSet(file.relative_to(path).as_posix(), str(file)) for file in files)


def is_table(path: Path) -> bool:
    """Whether a file's name says that it holds rows."""
    return path.suffix.lower() in TABLE_SUFFIXES


def visible_files(root: Path) -> list[Path]:
    """Files below `root` at any depth, sorted; none that is hidden or in a hidden directory."""
    found = (path for path in root.rglob("*") if path.is_file())
    return sorted(
        path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts)
    )


def _hub_name(source: str) -> tuple[str, str | None, str]:
    """Name, config and split. Raises CorpusError."""
    name, *more = source.removeprefix(HUB_PREFIX).split(":")
    if not name or len(more) > 2:
        raise CorpusError(
            f"{source} is no data set; write {HUB_PREFIX}name, or {HUB_PREFIX}name:config:split"
        )
    config, split = (*more, "", "")[:2]
    return name, config or None, split or "train"


def _jsonl_rows(path: str) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise CorpusError(
                    f"{path}:{number} is not JSON ({error}); fix or remove that line"
                ) from error
            if not isinstance(row, dict):
                raise CorpusError(
                    f'{path}:{number} is no JSON object; each line must be one like {{"text": ...}}'
                )
            yield row
