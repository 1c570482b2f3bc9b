"""How the warm-up trains."""

from dataclasses import dataclass


@dataclass(frozen=True)
class WarmupSettings:
    """How long and how hard to train.

    steps: optimizer steps; None lets `budget_s` decide.
    budget_s: wall-clock seconds for all of the warm-up, evaluations included.
    learning_rate: peak of a cosine schedule (Adam). n_rows: query rows per sequence and layer in a step.
    patience: evaluations without improvement before it stops. seed: of the data order and the drawn rows.
    bf16: autocast to bfloat16; 16-bit indexers are trained so anyway, and kept in float32 meanwhile.
    """

    steps: int | None = None
    budget_s: float | None = 480.0
    learning_rate: float = 3e-5
    n_rows: int = 192
    patience: int = 2
    seed: int = 0
    bf16: bool = False
