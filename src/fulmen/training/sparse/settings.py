"""How the sparse stage trains."""

from dataclasses import dataclass

from fulmen.errors import ConfigError
from fulmen.training.sparse.losses import INDEXER_LOSSES
from fulmen.training.sparse.schedule import K_SCHEDULES

TEACHER_PLACES = ("auto", "disk", "live")
REPORTS = ("none", "tensorboard", "wandb")
RATE, LORA_RATE = 3e-5, 1e-4


@dataclass(frozen=True)
class SparseSettings:
    """How long and how hard to train.

    steps: optimizer steps; None lets `budget_s` (wall-clock seconds for all of the stage) decide.
    learning_rate: of the backbone, peak of a cosine schedule (AdamW); None: RATE, with LoRA LORA_RATE.
    indexer_learning_rate: of the indexers.
    alpha: share of the distillation in the backbone's loss; 0 needs no teacher.
    top_n: tokens of the teacher's distribution that are kept apart. teacher_place: one of TEACHER_PLACES;
    "auto" writes the answers to disk if sequences come more than once.
    indexer_loss: one of INDEXER_LOSSES. n_rows: query rows per sequence and layer for it.
    n_targets: tokens per sequence, beside answers, whose next-token loss is taken; None: all. Of a large
    vocabulary they cost as much as the layers.
    k_schedule: one of K_SCHEDULES. accumulate: sequences per step and process.
    checkpointing: recompute layers in the backward pass. bf16: autocast to bfloat16; 16-bit weights are
    trained so anyway, and kept in float32 meanwhile. lora: rank; None trains all weights.
    evaluations: of the held-out loss, after the first.
    save_every: steps between checkpoints; None saves at evaluations alone. report_to: one of REPORTS.
    seed: of the data order and the drawn rows.
    """

    steps: int | None = None
    budget_s: float | None = 1800.0
    learning_rate: float | None = None
    indexer_learning_rate: float = 3e-5
    alpha: float = 1.0
    top_n: int = 64
    teacher_place: str = "auto"
    indexer_loss: str = "both"
    n_rows: int = 192
    n_targets: int | None = 512
    k_schedule: str = "none"
    accumulate: int = 1
    checkpointing: bool = False
    bf16: bool = False
    lora: int | None = None
    evaluations: int = 3
    save_every: int | None = None
    report_to: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (
            ("teacher_place", TEACHER_PLACES),
            ("indexer_loss", INDEXER_LOSSES),
            ("k_schedule", K_SCHEDULES),
            ("report_to", REPORTS),
        ):
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"{name}={value!r} is not known; choose from {', '.join(known)}")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha={self.alpha} cannot be; use a share from 0 (no teacher) to 1")

    @property
    def backbone_rate(self) -> float:
        """`learning_rate`, or its default."""
        if self.learning_rate is not None:
            return self.learning_rate
        return RATE if self.lora is None else LORA_RATE
