"""What a conversion or a training run leaves: where the model is, and how it was made."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Conversion:
    """A converted model's directory. It goes wherever a path does: `fulmen.evaluate(conversion)`.

    Attributes:
        path: the directory, absolute.
        record: how it was made, as in its conversion.json: plain JSON types.
    """

    path: Path
    record: dict[str, Any] = field(repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "record", json.loads(json.dumps(self.record)))

    def __fspath__(self) -> str:
        return str(self.path)

    def load(
        self, *, dtype: "str | torch.dtype" = "auto", device: "str | torch.device | None" = None
    ) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """The model and its tokenizer, ready to use. Arguments and errors as `fulmen.load`."""
        from fulmen.pipeline.load import load_accelerated

        return load_accelerated(self.path, dtype, device)
