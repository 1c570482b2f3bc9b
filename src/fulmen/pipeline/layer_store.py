"""What is done of a conversion by layers, kept layer by layer, so that a killed one goes on where it was."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fulmen.errors import unwritable
from fulmen.files import atomic_write, write_file
from fulmen.modeling.shards import save_tensors

STATES, LAST = "x_BTC", "last"


class LayerStore:
    """A folder with the indexer of each finished layer, what was measured there, and hidden states.

    The model is read more than once; each reading has a name, and its hidden states after the last layer that
    is done.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def save_states(self, reading: str, layer: int, x_BTC: Tensor) -> None:
        """Keep what comes out of a layer, in place of what came out of the one before. Raises OutputError."""
        self._write(self._states_file(reading), {STATES: x_BTC, LAST: torch.tensor(layer)})

    def states(self, reading: str) -> tuple[int, Tensor]:
        """The last layer that is done, and what comes out of it; -1 and nothing: there is none."""
        file = self._states_file(reading)
        if not file.exists():
            return -1, torch.empty(0)
        held = load_file(file)
        return int(held[LAST]), held[STATES]

    def save_indexer(self, layer: int, indexer: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a layer's indexer. Raises OutputError."""
        self._write(self._indexer_file(layer), indexer)

    def indexer(self, layer: int) -> dict[str, Tensor] | None:
        """A layer's indexer, read from the disk as it is used; None: it is not done."""
        file = self._indexer_file(layer)
        return load_file(file) if file.exists() else None

    def save_found(self, stage: str, layer: int, found: Any) -> None:
        """Keep what a stage measured in a layer, of plain JSON types. Raises OutputError."""
        write_file(self._found_file(stage, layer), json.dumps(found))

    def found(self, stage: str, layer: int) -> Any:
        """What `save_found` was told."""
        return json.loads(self._found_file(stage, layer).read_text(encoding="utf-8"))

    def join(self, file: Path) -> None:
        """Write all indexers into one file, whole or not at all. Raises OutputError."""
        parts = sorted(self.folder.glob("indexer-*.safetensors"))
        self._write(file, {name: x for part in parts for name, x in load_file(part).items()})

    def _write(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        try:
            atomic_write(file, lambda temporary: save_tensors(tensors, temporary))
        except (OSError, SafetensorError) as error:
            raise unwritable(file, error) from error

    def _states_file(self, reading: str) -> Path:
        return self.folder / f"states-{reading}.safetensors"

    def _indexer_file(self, layer: int) -> Path:
        return self.folder / f"indexer-{layer:05}.safetensors"

    def _found_file(self, stage: str, layer: int) -> Path:
        return self.folder / f"{stage}-{layer:05}.json"
