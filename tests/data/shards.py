"""Small data sets in several files, of which every row can be told apart."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet

N_ROWS = 60


def text_of_row(number: int) -> str:
    """From 30 to 1,200 characters of numbers that no other row has."""
    return " ".join(f"{number:03d}{word:03d}" for word in range(4 + number * 37 % 170))


def write_jsonl(file: Path, rows: list) -> Path:
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def write_parquet(file: Path, rows: list[dict]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=25)
    return file


def write_shards(folder: Path) -> list[str]:
    """Three files, the middle one Parquet, of 60 rows each, with a README; returns the texts in order."""
    folder.mkdir(exist_ok=True)
    texts = [text_of_row(number) for number in range(3 * N_ROWS)]
    for shard, write in enumerate((write_jsonl, write_parquet, write_jsonl)):
        rows = [
            {"id": number, "text": texts[number]} for number in range(shard * N_ROWS, (shard + 1) * N_ROWS)
        ]
        write(folder / f"{shard}.{'parquet' if write is write_parquet else 'jsonl'}", rows)
    (folder / "README.md").write_text("What this is.")
    return texts
