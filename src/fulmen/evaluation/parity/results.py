"""What a parity measurement finds, of plain JSON types: rows of its tables are typed dictionaries.

Losses are nats per token; `over_dense` is loss / dense loss - 1.
"""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, NotRequired, Self, TypedDict

from fulmen.errors import ConfigError
from fulmen.evaluation.statistics import IntervalRow

# What reports called a field before.
FORMER_NAMES = {"mass": "attention_recall"}


class TextRow(TypedDict):
    """Means over one text, or over all.

    second_half, whole: loss. by_position: loss of each eighth. kl, agreement: over the second half; nats per
    token, and the share of next tokens that are dense's.
    """

    second_half: float
    whole: float
    by_position: list[float]
    kl: float
    agreement: float


class SourceTextRow(TextRow):
    """The model before conversion on one text; the largest gap of a token's loss to the dense variant."""

    max_token_difference: float


class SequenceRow(TypedDict):
    """One text under every variant."""

    name: str
    kind: str
    scores: dict[str, TextRow]
    source: NotRequired[SourceTextRow]


class KindRow(TypedDict):
    """One variant on the `n` texts of one kind."""

    second_half: float
    over_dense: IntervalRow
    n: int


class VariantRow(TextRow):
    """One variant over all texts."""

    over_dense: IntervalRow
    by_kind: dict[str, KindRow]
    worse_kind: str
    over_dense_by_position: list[float]


class RecallRow(TypedDict):
    """Attention that a selection holds in one layer, and that the best k keys would; shares of 1."""

    layer: int
    captured: float
    oracle: float


class CandidateRow(TypedDict):
    """Attention on what is kept in one layer, on the same queries: `LayerCandidates`; shares of 1."""

    layer: int
    candidates: float
    two_levels: float
    one_level: float
    oracle: float


class CoarseTable(TypedDict):
    """What a coarse level costs at a k that asks it.

    asked_from: a query that sees more tokens has its candidates chosen, in layers that keep at most k.
    one_level, two_levels: loss. gap: their difference, nats per token. over_one_level: their ratio - 1.
    layers: those in which candidates were chosen.
    """

    k: int
    candidates: int
    asked_from: int
    one_level: float
    two_levels: float
    gap: IntervalRow
    over_one_level: IntervalRow
    layers: list[CandidateRow]


class SweepRow(TypedDict):
    """One variant at one budget k, on the first text of each kind."""

    variant: str
    k: int
    loss: float
    over_dense: float


class ErrorSplit(TypedDict):
    """Where DSA's loss over dense comes from: see `fulmen.evaluation.parity.tables.error_split`."""

    budget: float
    indexer: float
    split_of_k: NotRequired[float]
    coarse: NotRequired[float]
    kernel: float
    kernel_length: int
    kernel_topk: int


class AccuracyRow(TypedDict):
    """Right answers of `n`, with the interval of their share."""

    right: int
    n: int
    share: IntervalRow


class NeedleCell(AccuracyRow):
    """One task, length, variant, and depth: the lower end of a fifth of the text."""

    task: str
    length: int
    depth: float
    variant: str


class PairedAnswers(TypedDict):
    """DSA minus dense in points, on questions about `texts` texts; `pairs`: who was right how often."""

    dsa_minus_dense: IntervalRow
    pairs: dict[str, int]
    texts: int


class NeedleDifference(PairedAnswers):
    """`PairedAnswers` of the `n` questions of one task and length."""

    task: str
    length: int
    n: int


class NeedleTables(TypedDict):
    """Retrieval: by cell, by task and length, and over all questions; None without questions."""

    cells: list[NeedleCell]
    differences: list[NeedleDifference]
    overall: dict[str, AccuracyRow]
    dsa_minus_dense: IntervalRow | None
    pairs: dict[str, int] | None
    texts: int


class LookupRow(AccuracyRow):
    """One variant at one k, on the first `texts` texts; `dense_right`: dense's right answers on these.

    Of dense, k is the length.
    """

    variant: str
    k: int
    texts: int
    dense_right: int


class AnswerSplit(TypedDict):
    """What took the answers, points: see `ErrorSplit`."""

    budget: float
    index: float
    split_of_k: float
    coarse: NotRequired[float]


class LookupDifference(TypedDict):
    """DSA against dense at one k, on `n` questions about `texts` texts: answers lost and gained; points."""

    k: int
    n: int
    texts: int
    lost: int
    gained: int
    dsa_minus_dense: IntervalRow
    split: AnswerSplit


class LookupTables(TypedDict):
    """Answers that were written: `n_keys` questions on each of `texts` prompts of at most `length` tokens.

    is_chat: asked in the chat template; else in plain text, behind worked examples.
    """

    length: int
    n_keys: int
    texts: int
    is_chat: bool
    rows: list[LookupRow]
    differences: list[LookupDifference]


class SourceTable(TypedDict):
    """The dense variant and DSA against the model before conversion."""

    second_half: float
    max_window_difference: float
    max_token_difference: float
    dsa_over_source: IntervalRow


@dataclass(frozen=True)
class ParityResults:
    """A parity measurement.

    Attributes:
        length: tokens of a text.
        topk: keys that a query keeps.
        windows: every text's scores.
        variants: by name, "dense" first.
        attention_recall: by variant and layer; empty where k leaves nothing out.
        sweep: loss by budget k.
        error_split: where the loss comes from.
        needles: retrieval, of answers that are given and looked at in one forward pass.
        source: the model before conversion; None if it was not read.
        about: what a reader needs to repeat the run, by name.
        lookups: retrieval, of answers that the model writes; None if it was not asked.
        quick: whether this was but a quick look.
        coarse: what the coarse level costs; None where the index has one level, or no k asks two.
        cost: of one generated token in attention and indexer, by position, ascending: rows of position,
            dense_bytes, dsa_bytes, dense_flops, dsa_flops.
    """

    length: int
    topk: int
    windows: list[SequenceRow]
    variants: dict[str, VariantRow]
    attention_recall: dict[str, list[RecallRow]]
    sweep: list[SweepRow]
    error_split: ErrorSplit
    needles: NeedleTables
    source: SourceTable | None
    about: dict[str, str] = field(default_factory=dict)
    cost: list[dict[str, float]] = field(default_factory=list)
    lookups: LookupTables | None = None
    quick: bool = False
    coarse: CoarseTable | None = None

    def to_dict(self) -> dict[str, Any]:
        """Every number, of plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` wrote, of this version or an older one; further keys are passed over.

        Raises ConfigError if a part of a report is missing.
        """
        named = {FORMER_NAMES.get(name, name): value for name, value in values.items()}
        required = [field.name for field in fields(cls) if field.default is field.default_factory is MISSING]
        if missing := [name for name in required if name not in named]:
            raise ConfigError(
                f"values are no parity report: {', '.join(missing)} missing; read a parity.json"
            )
        return cls(**{field.name: named[field.name] for field in fields(cls) if field.name in named})
