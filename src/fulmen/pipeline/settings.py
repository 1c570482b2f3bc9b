"""What the commands are asked to do, checked: every mistake is a ConfigError before anything is loaded."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fulmen.config import require_positive_int
from fulmen.errors import ConfigError

# A data set on the hub, as `fulmen.data` reads it.
HUB_PREFIX = "hf:"
STAGES = ("inherit", "warmup", "sparse")
WITHOUT_TRUNK = STAGES[:2]
DEFAULT_STAGES = "inherit,warmup"
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULT_BUDGET = "8m"
DEFAULT_SPARSE_BUDGET = "30m"
# Of a text in an evaluation, which looks at its second half in parts.
SHORTEST_LENGTH = 64

_SECONDS = {"h": 3600, "m": 60, "s": 1}
_DURATION = re.compile(r"(?=.)" + "".join(rf"(?:(?P<{unit}>\d+(?:\.\d+)?){unit})?" for unit in _SECONDS))


@dataclass(frozen=True)
class ConvertSettings:
    """One conversion.

    Attributes:
        source: model directory, hub name, GGUF file or "smollm2-135m".
        out: directory to write.
        topk, index_heads, index_head_dim: None lets the model's shape decide.
        stages: STAGES, or the first of them.
        budget_s: seconds for the warm-up; None where `steps` says how long.
        steps: optimizer steps of the warm-up; None where `budget_s` says how long.
        sparse_budget_s, sparse_steps: the same of the sparse stage.
        data: files, directories, or hub data sets as hf:name; empty: the text that comes with Python.
        overwrite: replace a model directory at `out`.
        dtype: of the weights, one of DTYPES.
        seed: of every random choice.
        window: tokens per training text; None: `default_length`, less where the text is scarce.
    """

    source: str
    out: Path
    topk: int | None = None
    stages: tuple[str, ...] = WITHOUT_TRUNK
    budget_s: float | None = None
    steps: int | None = None
    sparse_budget_s: float | None = None
    sparse_steps: int | None = None
    data: tuple[str, ...] = ()
    overwrite: bool = False
    dtype: str = "auto"
    seed: int = 0
    index_heads: int | None = None
    index_head_dim: int | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        _require_positive(self, "topk", "steps", "sparse_steps", "index_heads", "index_head_dim", "window")
        _require_choice("dtype", self.dtype, DTYPES)
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed} cannot be; use an integer of 0 to {2**32 - 1}")
        _require_existing(self.data)
        if self.budget_s is not None and self.steps is not None:
            raise ConfigError("--budget and --steps exclude each other; give one of them")
        trains = set(self.stages) != {"inherit"}
        if not trains and (self.budget_s is not None or self.steps is not None):
            raise ConfigError(
                "stages=inherit trains nothing, so --budget and --steps do not apply; leave them out"
            )
        if trains and self.steps is None and self.budget_s is None:
            object.__setattr__(self, "budget_s", parse_duration(DEFAULT_BUDGET))
        self._check_sparse()

    def _check_sparse(self) -> None:
        asked = self.sparse_budget_s is not None or self.sparse_steps is not None
        if self.sparse_budget_s is not None and self.sparse_steps is not None:
            raise ConfigError("--sparse-budget and --sparse-steps exclude each other; give one of them")
        if asked and "sparse" not in self.stages:
            raise ConfigError(
                "stages have no sparse, so --sparse-budget and --sparse-steps do not apply; "
                f"add it as in --stages {','.join(STAGES)}"
            )
        if "sparse" in self.stages and not asked:
            object.__setattr__(self, "sparse_budget_s", parse_duration(DEFAULT_SPARSE_BUDGET))


@dataclass(frozen=True)
class EvalSettings:
    """One evaluation.

    Attributes:
        model_dir: a converted model's directory.
        dense: a dense model to compare with too; None: only the model itself under dense attention.
        data: as for a conversion, whose held-out part is read; empty: the text that comes with Python.
        json, html, markdown: files to write reports to; None: into `model_dir`.
        windows: texts per kind; None lets the evaluation decide.
        length: tokens per text; None: `default_length`, less where the text is scarce.
        topk: None: the model's own.
        kinds: kinds of text to take; empty: all.
        needles: whether to run the retrieval tasks too.
        quick: fewer texts and needles, for a first look.
    """

    model_dir: Path
    dense: str | None = None
    data: tuple[str, ...] = ()
    json: Path | None = None
    html: Path | None = None
    markdown: Path | None = None
    windows: int | None = None
    length: int | None = None
    topk: int | None = None
    kinds: tuple[str, ...] = ()
    needles: bool = True
    quick: bool = False

    def __post_init__(self) -> None:
        _require_positive(self, "windows", "length", "topk")
        _require_existing(self.data)
        if self.length is not None and self.length < SHORTEST_LENGTH:
            raise ConfigError(f"length={self.length} is too short for a text; use {SHORTEST_LENGTH} or more")
        for path in (self.json, self.html, self.markdown):
            if path is not None:
                _require_place_for_file(path)


def parse_duration(text: str) -> float:
    """Seconds of "90s", "8m", "1h30m" or "1.5h". Raises ConfigError for anything else, and for zero."""
    found = _DURATION.fullmatch(text.strip().lower())
    amounts = found.groupdict(default="0") if found else {}
    seconds = sum(float(amount) * _SECONDS[unit] for unit, amount in amounts.items())
    if seconds <= 0:
        raise ConfigError(
            f"duration {text!r} cannot be read; write hours, minutes, seconds as in 90s, 8m, 1h30m"
        )
    return seconds


def parse_stages(text: str) -> tuple[str, ...]:
    """The stages of "inherit,warmup": STAGES from the first on. Raises ConfigError for anything else."""
    stages = tuple(name.strip() for name in text.split(","))
    for name in stages:
        _require_choice("stage", name, STAGES)
    if stages != STAGES[: len(stages)]:
        raise ConfigError(
            f"stages={text!r} are repeated, incomplete or out of order; each needs the ones before it: "
            f"{','.join(STAGES)}"
        )
    return stages


def _require_positive(settings: object, *names: str) -> None:
    for name in names:
        if (value := getattr(settings, name)) is not None:
            require_positive_int(name, value)


def _require_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value!r} is not known; choose from {', '.join(known)}")


def _require_place_for_file(path: Path) -> None:
    """Said now, not after the work whose result goes there."""
    folder = path.expanduser().absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"{path} cannot be written: {path.parent} is no directory; make it first")
    if path.expanduser().is_dir():
        raise ConfigError(f"{path} is a directory; name a file")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{path} cannot be written: {folder} is not writable; name another place")


def _require_existing(sources: Sequence[str]) -> None:
    for source in sources:
        if not str(source).startswith(HUB_PREFIX) and not Path(source).exists():
            raise ConfigError(f"data={str(source)!r} does not exist; name a file, a directory or hf:name")
