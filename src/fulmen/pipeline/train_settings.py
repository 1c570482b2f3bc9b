"""What `fulmen train` is asked to do, checked before anything is loaded."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulmen.config import require_positive_int
from fulmen.errors import ConfigError
from fulmen.pipeline.arguments import (
    flag_argument,
    number_argument,
    parse_duration,
    refused,
    require_existing,
)
from fulmen.pipeline.settings import (
    AUTO_DEVICE,
    DEFAULT_BUDGET,
    DEFAULT_SPARSE_BUDGET,
    exclude_each_other,
    require_positive,
    require_seed,
)

if TYPE_CHECKING:
    import torch

TRAIN_STAGES = ("warmup", "sparse")


def require_train_stages(stages: tuple[str, ...]) -> None:
    """Raise ConfigError unless these are TRAIN_STAGES or one of them."""
    if stages not in (TRAIN_STAGES, TRAIN_STAGES[:1], TRAIN_STAGES[1:]):
        raise ConfigError(
            f"stages={','.join(stages)!r} cannot be trained; use warmup, sparse or warmup,sparse"
        )


@dataclass(frozen=True)
class TrainSettings:
    """One run of the sparse stage on a converted model.

    Attributes:
        model_dir: what `fulmen convert` wrote. out: directory to write.
        topk: keys that each query keeps; None: the model's own.
        data, texts: as for a conversion.
        stages: TRAIN_STAGES, or one of them. Steps and budget are those of the last; a warm-up before another
            stage takes its own budget.
        teacher: a dense model to learn from; None: the one inside `model_dir`.
        length: tokens per sequence; None: `default_length`, less where the text is scarce.
        sequences: to train on at most, held in memory; None: as many as the steps use, data sets being
            streamed.
        overwrite: replace a model directory at `out`.
        device: where to compute, as torch names it, or AUTO_DEVICE.
        options: further fields of `fulmen.training.sparse.settings.SparseSettings`.
    """

    model_dir: Path
    out: Path
    topk: int | None = None
    stages: tuple[str, ...] = ("sparse",)
    data: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    teacher: str | None = None
    length: int | None = None
    sequences: int | None = None
    overwrite: bool = False
    device: "str | torch.device" = AUTO_DEVICE
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_positive(self, "topk", "length", "sequences")
        require_train_stages(self.stages)
        object.__setattr__(self, "data", require_existing(self.data))
        self._check_numbers()
        exclude_each_other(budget=self.options.get("budget_s"), steps=self.options.get("steps"))
        if self.options.get("steps") is None and self.options.get("budget_s") is None:
            default = DEFAULT_SPARSE_BUDGET if "sparse" in self.stages else DEFAULT_BUDGET
            self.options["budget_s"] = parse_duration(default)
        self._check_packages()

    def _check_numbers(self) -> None:
        for name in ("steps", "accumulate", "lora", "n_rows", "top_n", "save_every", "evaluations"):
            if (value := self.options.get(name)) is not None:
                require_positive_int(name, value)
        for name in ("learning_rate", "indexer_learning_rate"):
            rate = self.options.get(name, 1.0)
            if name == "learning_rate" and rate is None:
                continue  # the default, which goes with LoRA
            if not number_argument(name, rate, "a rate above 0, as 3e-5") > 0:
                raise refused(name, rate, "use a rate above 0, as 3e-5")
        number_argument("alpha", self.options.get("alpha", 1.0), "a share from 0 (no teacher) to 1")
        for name in ("checkpointing", "bf16"):
            flag_argument(name, self.options.get(name, False))
        require_seed(self.options.get("seed", 0))

    def _check_packages(self) -> None:
        report = self.options.get("report_to", "none")
        # Both are packages of that name.
        if report in ("tensorboard", "wandb") and importlib.util.find_spec(report) is None:
            raise ConfigError(f"report_to={report!r} needs a package: pip install {report}, or use none")
        if self.options.get("lora") is not None and importlib.util.find_spec("peft") is None:
            raise ConfigError("lora needs the package peft; install fulmen[lora], or leave it out")
        if self.teacher is not None and self.options.get("alpha") == 0:
            raise ConfigError("alpha=0 learns from no teacher, so teacher does not apply; leave it out")
