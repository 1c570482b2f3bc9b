"""What `fulmen train` is asked to do, checked before anything is loaded."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fulmen.config import require_positive_int
from fulmen.errors import ConfigError
from fulmen.pipeline.settings import DEFAULT_SPARSE_BUDGET, HUB_PREFIX, parse_duration


@dataclass(frozen=True)
class TrainSettings:
    """One run of the sparse stage on a converted model.

    Attributes:
        model_dir: what `fulmen convert` wrote. out: directory to write.
        topk: keys that each query keeps; None: the model's own.
        data: as for a conversion. teacher: a dense model to learn from; None: the one inside `model_dir`.
        length: tokens per text; None: `default_length`, less where the text is scarce.
        windows: texts to train on at most, held in memory; None: as many as the steps use, data sets being
            streamed.
        overwrite: replace a model directory at `out`.
        options: further fields of `fulmen.training.sparse.settings.SparseSettings`.
    """

    model_dir: Path
    out: Path
    topk: int | None = None
    data: tuple[str, ...] = ()
    teacher: str | None = None
    length: int | None = None
    windows: int | None = None
    overwrite: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("topk", "length", "windows"):
            if (value := getattr(self, name)) is not None:
                require_positive_int(name, value)
        for name in ("steps", "accumulate", "lora", "n_rows", "top_n", "save_every", "evaluations"):
            if (value := self.options.get(name)) is not None:
                require_positive_int(name, value)
        for name in ("learning_rate", "indexer_learning_rate"):
            if not self.options.get(name, 1.0) > 0:
                raise ConfigError(f"{name}={self.options[name]} cannot be; use a rate above 0, as 3e-5")
        for source in self.data:
            if not source.startswith(HUB_PREFIX) and not Path(source).exists():
                raise ConfigError(f"data={source!r} does not exist; name a file, a directory or hf:name")
        self._check_length_of_run()
        self._check_packages()

    def _check_length_of_run(self) -> None:
        steps, budget_s = self.options.get("steps"), self.options.get("budget_s")
        if steps is not None and budget_s is not None:
            raise ConfigError("--budget and --steps exclude each other; give one of them")
        if steps is None and budget_s is None:
            self.options["budget_s"] = parse_duration(DEFAULT_SPARSE_BUDGET)

    def _check_packages(self) -> None:
        report = self.options.get("report_to", "none")
        # Both are packages of that name.
        if report in ("tensorboard", "wandb") and importlib.util.find_spec(report) is None:
            raise ConfigError(f"report_to={report!r} needs a package: pip install {report}, or use none")
        if self.options.get("lora") is not None and importlib.util.find_spec("peft") is None:
            raise ConfigError("lora needs the package peft; install fulmen[lora], or leave --lora out")
        if self.teacher is not None and self.options.get("alpha") == 0:
            raise ConfigError("alpha=0 learns from no teacher, so --teacher does not apply; leave it out")
