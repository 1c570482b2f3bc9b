"""How supervised fine-tuning trains."""

import math
from dataclasses import dataclass

from fulmen.config import require_positive_int
from fulmen.errors import ConfigError

RATE, LORA_RATE = 2e-5, 2e-4
# Of a run, listed before it begins.
MOST_REPLIES = 10_000_000


@dataclass(frozen=True)
class SftSettings:
    """How long, on how much and how hard to train.

    steps: optimizer steps. batch: replies a step. learning_rate: None: RATE, with LoRA LORA_RATE.
    lora: rank; None trains all weights but the indexers'.
    bf16: autocast to bfloat16, as is done anyway where weights are. save_every: steps between checkpoints.
    seed: of every random choice.
    """

    steps: int
    batch: int = 8
    learning_rate: float | None = None
    lora: int | None = 16
    bf16: bool = False
    save_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "save_every"):
            require_positive_int(name, getattr(self, name))
        if self.steps * self.batch > MOST_REPLIES:
            raise ConfigError(
                f"steps={self.steps} of batch={self.batch} cannot be listed; use {MOST_REPLIES:,} replies at "
                "most, and train what came of it again"
            )
        if self.lora is not None:
            require_positive_int("lora", self.lora)
        rate = self.learning_rate
        is_number = isinstance(rate, int | float) and not isinstance(rate, bool)
        if rate is not None and not (is_number and 0 < rate < math.inf):
            raise ConfigError(f"learning_rate={rate!r} cannot be; use a number above 0, as 1e-4")
        if not isinstance(self.bf16, bool):
            raise ConfigError(f"bf16={self.bf16!r} cannot be; use true or false")

    @property
    def rate(self) -> float:
        """`learning_rate`, or its default."""
        if self.learning_rate is not None:
            return self.learning_rate
        return RATE if self.lora is None else LORA_RATE
