"""What an ablation measured: a JSON line per cell, written at once, so that a run can stop and go on."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fulmen.files import atomic_write


class Cells:
    """The measured cells of one ablation under one setting, in `folder`/`name`.jsonl.

    A line has "setting" (model, texts, k: what all cells of a table have in common), "cell" (what differs)
    and the measurement. A cell that the file has under the same setting is not measured again.
    """

    def __init__(self, folder: Path, name: str, setting: Mapping[str, Any]) -> None:
        self.file, self.setting = folder / f"{name}.jsonl", dict(setting)
        self.rows = [row for row in read_rows(self.file) if row["setting"] == self.setting]

    def has(self, cell: Mapping[str, Any]) -> bool:
        """Whether this cell is measured."""
        return any(row["cell"] == cell for row in self.rows)

    def add(self, cell: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> None:
        """Measure a cell, unless it is, and write it down."""
        if self.has(cell):
            return
        row = {"setting": self.setting, "cell": dict(cell), **measure()}
        self.rows.append(row)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(one) + "\n" for one in [*read_rows(self.file), row])
        atomic_write(self.file, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        print(self.file.stem, json.dumps({**row["cell"], "over_dense": row.get("over_dense")}), flush=True)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """All lines of a file; none if it does not exist."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
