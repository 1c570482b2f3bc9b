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

STATES_FILE, STATES, LAST = "states.safetensors", "x_BTC", "last"


class LayerStore:
    """A folder with the indexer of each finished layer, its fit, and the hidden states after the last one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def save_layer(self, layer: int, indexer: Mapping[str, Tensor], fit: Mapping[str, Any]) -> None:
        """Keep a layer's indexer and how well it fits. Raises OutputError."""
        self._write(self._indexer_file(layer), indexer)
        write_file(self._fit_file(layer), json.dumps(fit))

    def save_states(self, layer: int, x_BTC: Tensor) -> None:
        """Keep what comes out of a layer, in place of what came out of the one before. Raises OutputError."""
        self._write(self.folder / STATES_FILE, {STATES: x_BTC, LAST: torch.tensor(layer)})

    def states(self) -> tuple[int, Tensor] | None:
        """The last layer that is done, and what comes out of it; None: there is none."""
        file = self.folder / STATES_FILE
        if not file.exists():
            return None
        held = load_file(file)
        return int(held[LAST]), held[STATES]

    def indexer(self, layer: int) -> dict[str, Tensor] | None:
        """A layer's indexer, read from the disk as it is used; None: it is not done."""
        file = self._indexer_file(layer)
        return load_file(file) if file.exists() else None

    def fit(self, layer: int) -> dict[str, Any]:
        """What `save_layer` was told of a layer that is done."""
        found: dict[str, Any] = json.loads(self._fit_file(layer).read_text(encoding="utf-8"))
        return found

    def join(self, file: Path) -> None:
        """Write all indexers into one file, whole or not at all. Raises OutputError."""
        parts = sorted(self.folder.glob("indexer-*.safetensors"))
        self._write(file, {name: x for part in parts for name, x in load_file(part).items()})

    def _write(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        try:
            atomic_write(file, lambda temporary: save_tensors(tensors, temporary))
        except (OSError, SafetensorError) as error:
            raise unwritable(file, error) from error

    def _indexer_file(self, layer: int) -> Path:
        return self.folder / f"indexer-{layer:05}.safetensors"

    def _fit_file(self, layer: int) -> Path:
        return self.folder / f"fit-{layer:05}.json"
