"""What the functions are asked to do, checked: every mistake is a ConfigError before anything is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulmen.config import require_positive_int
from fulmen.errors import ConfigError
from fulmen.pipeline.arguments import parse_duration, refused, require_existing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

STAGES = ("inherit", "warmup", "sparse")
INDEXES = ("two-level", "one-level")
INDEXER_STAGES = STAGES[:2]
DTYPES = ("auto", "float32", "bfloat16", "float16")
# An accelerator if torch sees one, else the CPU.
AUTO_DEVICE = "auto"
DEFAULT_BUDGET = "8m"
DEFAULT_SPARSE_BUDGET = "30m"
# Of a sequence in an evaluation, which looks at its second half in parts.
SHORTEST_LENGTH = 64


@dataclass(frozen=True)
class ModelInMemory:
    """A dense model that is loaded already, and its tokenizer. Neither is changed."""

    model: "PreTrainedModel"
    tokenizer: Any


@dataclass(frozen=True)
class ConvertSettings:
    """One conversion.

    Attributes:
        source: model directory, hub name, GGUF file or "smollm2-135m"; or a model in memory.
        out: directory to write.
        topk, index_heads, index_head_dim: None lets the model's shape decide.
        stages: STAGES, or the first of them; None: INDEXER_STAGES, or "inherit" alone by layers.
        budget_s: seconds for the warm-up; None where `steps` says how long.
        steps: optimizer steps of the warm-up; None where `budget_s` says how long.
        sparse_budget_s, sparse_steps: the same of the sparse stage.
        data: files, directories, or hub data sets as hf:name; texts: in memory. Without either: the text that
            comes with Python.
        overwrite: replace a model directory at `out`.
        dtype: of the weights, one of DTYPES.
        device: where to compute, as torch names it, or AUTO_DEVICE.
        seed: of every random choice.
        length: tokens per training sequence; None: `default_length`, less where the text is scarce.
        index: one of INDEXES; None: two levels where they pay. Named, a converted source is given that index
            and stays otherwise as it is.
        by_layers: whether one layer at a time is in memory; None: where all of them have no room.
    """

    source: str | ModelInMemory
    out: Path
    topk: int | None = None
    stages: tuple[str, ...] | None = None
    budget_s: float | None = None
    steps: int | None = None
    sparse_budget_s: float | None = None
    sparse_steps: int | None = None
    data: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    overwrite: bool = False
    dtype: str = "auto"
    seed: int = 0
    index_heads: int | None = None
    index_head_dim: int | None = None
    length: int | None = None
    device: "str | torch.device" = AUTO_DEVICE
    index: str | None = None
    by_layers: bool | None = None

    def __post_init__(self) -> None:
        if self.index is not None:
            require_choice("index", self.index, INDEXES)
        require_positive(self, "topk", "steps", "sparse_steps", "index_heads", "index_head_dim", "length")
        require_choice("dtype", self.dtype, DTYPES)
        require_seed(self.seed)
        object.__setattr__(self, "data", require_existing(self.data))
        exclude_each_other(budget=self.budget_s, steps=self.steps)
        given = (self.budget_s, self.steps, self.sparse_budget_s, self.sparse_steps)
        if self.stages is None and any(value is not None for value in given):
            object.__setattr__(self, "stages", INDEXER_STAGES)
        if self.by_layers:
            self._check_layers()
        if not self.trains and (self.budget_s is not None or self.steps is not None):
            raise ConfigError(
                "stages=inherit trains nothing, so budget and steps do not apply; leave them out",
                arguments=["budget", "steps"],
            )
        if self.trains and self.steps is None and self.budget_s is None:
            object.__setattr__(self, "budget_s", parse_duration(DEFAULT_BUDGET))
        self._check_sparse()

    def plain(self) -> dict[str, Any]:
        """What a run is, of plain JSON types: all but what is in memory, where it runs, where it goes."""
        left_out = ("source", "out", "texts", "overwrite", "device")
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in left_out}
        return {**values, "stages": list(self.asked_stages), "data": list(self.data)}

    @property
    def asked_stages(self) -> tuple[str, ...]:
        """The stages, those of a model that has room where nothing is said."""
        return INDEXER_STAGES if self.stages is None else self.stages

    @property
    def trains(self) -> bool:
        """Whether a stage trains."""
        return self.asked_stages != ("inherit",)

    def _check_layers(self) -> None:
        if self.stages is not None and self.trains:
            raise ConfigError(
                f"stages={','.join(self.stages)} train a model that is in memory as a whole; with by_layers "
                "use stages=inherit",
                arguments=["stages", "by_layers"],
            )
        if self.dtype != DTYPES[0]:
            raise ConfigError(
                f"dtype={self.dtype} does not apply by layers, where the source's files stay as they are; "
                "leave one of them out",
                arguments=["dtype", "by_layers"],
            )

    def _check_sparse(self) -> None:
        asked = self.sparse_budget_s is not None or self.sparse_steps is not None
        exclude_each_other(sparse_budget=self.sparse_budget_s, sparse_steps=self.sparse_steps)
        if asked and "sparse" not in self.asked_stages:
            raise ConfigError(
                "stages have no sparse, so sparse_budget and sparse_steps do not apply; "
                f"add it as in stages={','.join(STAGES)}",
                arguments=["sparse_budget", "sparse_steps"],
            )
        if "sparse" in self.asked_stages and not asked:
            object.__setattr__(self, "sparse_budget_s", parse_duration(DEFAULT_SPARSE_BUDGET))


@dataclass(frozen=True)
class EvalSettings:
    """One measurement of parity.

    Attributes:
        model_dir: a converted model's directory.
        dense: a dense model to compare with too; None: only the model itself under dense attention.
        data, texts: as for a conversion, whose held-out part is read.
        sequences: per kind of text; None lets the evaluation decide.
        length: tokens per sequence; None: `default_length`, less where the text is scarce.
        topk: None: the model's own.
        kinds: kinds of text to take; empty: all.
        needles: whether to ask questions, too, that the text answers.
        needle_length: tokens of their prompts; None: 8 k, 2048 to 8192, within the context, less where
            the text is scarce.
        quick: fewer texts and questions, for a first look.
        out: folder where losses and answers are kept until the end, for a run that is interrupted; None: they
            are not.
        device: where to compute, as torch names it, or AUTO_DEVICE.
    """

    model_dir: Path
    dense: str | None = None
    data: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    sequences: int | None = None
    length: int | None = None
    topk: int | None = None
    kinds: tuple[str, ...] = ()
    needles: bool = True
    needle_length: int | None = None
    quick: bool = False
    device: "str | torch.device" = AUTO_DEVICE
    out: Path | None = None

    def __post_init__(self) -> None:
        require_positive(self, "sequences", "length", "topk", "needle_length")
        object.__setattr__(self, "data", require_existing(self.data))
        if self.length is not None and self.length < SHORTEST_LENGTH:
            raise ConfigError(f"length={self.length} is too short for a text; use {SHORTEST_LENGTH} or more")
        if self.out is not None and self.out.expanduser().is_file():
            raise ConfigError(f"out={str(self.out)!r} is a file; name a folder")
        if self.needle_length is not None and not self.needles:
            raise ConfigError(
                "needle_length does not apply without needles; leave one of them out",
                arguments=["needle_length", "needles"],
            )


def parse_stages(stages: Sequence[str] | str) -> tuple[str, ...]:
    """The stages of "inherit,warmup", or of these names: STAGES from the first on. Raises ConfigError."""
    found = stage_names(stages, f"use some of {', '.join(STAGES)}, from the first on")
    if not found or found != STAGES[: len(found)]:
        raise ConfigError(
            f"stages={','.join(found)!r} are repeated, incomplete or out of order; each needs the ones "
            f"before it: {','.join(STAGES)}"
        )
    return found


def stage_names(stages: Sequence[str] | str, remedy: str) -> tuple[str, ...]:
    """The names in "inherit,warmup", or these names. Raises ConfigError unless all are STAGES."""
    names = stages.split(",") if isinstance(stages, str) else stages
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise refused("stages", stages, remedy)
    found = tuple(name.strip() for name in names)
    for name in found:
        require_choice("stage", name, STAGES)
    return found


def require_positive(settings: object, *names: str) -> None:
    """Raise ConfigError for one of these fields that is no positive integer, nor None."""
    for name in names:
        if (value := getattr(settings, name)) is not None:
            require_positive_int(name, value)


def require_choice(name: str, value: object, known: Sequence[str]) -> None:
    """Raise ConfigError for a value that is not among the known ones."""
    if value not in known:
        raise ConfigError(f"{name}={value!r} is not known; choose from {', '.join(known)}")


def require_seed(seed: object) -> None:
    """Raise ConfigError for what torch takes no seed from."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise refused("seed", seed, f"use an integer of 0 to {2**32 - 1}")


def exclude_each_other(**values: object) -> None:
    """Raise ConfigError if more than one of two settings is given."""
    if all(value is not None for value in values.values()):
        raise ConfigError(f"{' and '.join(values)} exclude each other; give one of them", arguments=values)
