"""Is the converted model as good as the dense one? Measured on the same texts, with the same budget k.

The converted model itself gives every variant (`fulmen.evaluation.variants`), so they differ in the
selected keys alone. Each text is read once per variant.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from fulmen.config import require_positive_int
from fulmen.data import TokenSequence
from fulmen.errors import CheckpointError, ConfigError
from fulmen.evaluation.controls import AttentionRecallSelector
from fulmen.evaluation.journal import Journal, Unit
from fulmen.evaluation.parity.coarse_level import coarse_table
from fulmen.evaluation.parity.lookup_tables import lookup_tables
from fulmen.evaluation.parity.lookups import LookupPlan, lookup_units
from fulmen.evaluation.parity.losses import (
    TextScores,
    scored_positions,
    second_half_loss,
    summarize_scores,
    text_scores,
)
from fulmen.evaluation.parity.needles import sample_groups, score_samples, tokens_to_read
from fulmen.evaluation.parity.report import ParityReport
from fulmen.evaluation.parity.results import RecallRow, SequenceRow, SweepRow, TextRow
from fulmen.evaluation.parity.tables import (
    error_split,
    needle_tables,
    source_table,
    sweep_point,
    variant_table,
)
from fulmen.evaluation.variants import (
    RECALL_VARIANTS,
    VARIANTS,
    ModelInput,
    VariantRunner,
    asks_coarse_level,
    current_topk,
    last_hidden_states,
    telling_topk,
)
from fulmen.modeling.families import accelerated, dsa_of
from fulmen.ops.dispatch import pin_backend

SWEEP_VARIANTS = ("oracle", "dsa", "window")
NEEDLE_VARIANTS = ("dense", "dsa", "window")
LEVEL_VARIANTS = ("dsa", "one_level")
# The reference computes query by query; this much text shows whether a kernel is wrong.
KERNEL_LENGTH = 384
KERNEL_KEYS_PER_TOPK = 4

Progress = Callable[[int, int, str], None]


def measure_parity(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    *,
    topk: int | None = None,
    inherited: Mapping[str, Tensor] | None = None,
    needles: Sequence[Any] = (),
    ks: Sequence[int] | None = None,
    dense_model: PreTrainedModel | None = None,
    lookups: LookupPlan | None = None,
    journal: Journal | None = None,
    progress: Progress = lambda done, total, what: None,
) -> ParityReport:
    """Compare DSA with dense attention, and with better and worse selections of the same k keys.

    Args:
        model: a converted model, GQA or stock MLA. It is as before when this returns or raises.
        sequences: held-out texts, all of one length.
        topk: keys that a query keeps; by default the model's own.
        inherited: the indexers before training (`indexer_state`), for a variant with them.
        lookups: questions to be answered by generation.
        needles: samples of `fulmen.evaluation.parity.needles`; each variant reads a text that several ask
        about once. ks: budgets of the sweep, which reads the first sequence of each kind; by default those of
            k/4, k/2, k and 2k that are below the length.
        dense_model: the model before conversion; checks the dense variant, and DSA against the source.
        journal: keeps losses and answers as they come, for a run that was interrupted; of this model, these
            texts and settings. None: they are not kept.
        progress: called at first, and after each forward pass, with (tokens read, tokens in all, what); what
            the journal has is not read again.

    Returns:
        A report without `about` and `cost`, which the caller may add (`dataclasses.replace`).

    Raises:
        ConfigError: no sequences, or of different or too small lengths; k or ks not positive; a model without
            DSA; inherited tensors that are not this model's.
        CheckpointError: a loss that is NaN or infinite.
    """
    topk = current_topk(model) if topk is None else require_positive_int("topk", topk)
    length = _common_length(sequences)
    if ks is None:
        ks = [k for k in (topk // 4, topk // 2, topk, 2 * topk) if 0 < k < length]
    plan = _Plan(sequences, topk, sorted({require_positive_int("ks", k) for k in ks}), needles, dense_model)
    runner, journal = VariantRunner(model, inherited), journal or Journal(None, {})
    asked = lookup_units(runner, lookups) if lookups else []
    read = [_loss_unit(runner, plan, place) for place in range(len(sequences))]
    swept = [_sweep_unit(runner, plan, k, name) for k in plan.ks if k != topk for name in SWEEP_VARIANTS]
    levels_k = telling_topk(model, topk, length)
    levels = _level_units(runner, plan, levels_k)
    waiting = sum(unit.tokens for unit in journal.waiting([*read, *swept, *levels, *asked]))
    runner.on_tokens = _token_counter(progress, waiting + plan.other_tokens())
    with accelerated(model):
        texts = journal.run(read)
        losses = {(row["variant"], row["k"]): row["losses"] for row in journal.run(swept)}
        by_level = journal.run(levels) or texts
        kernel = _kernel_gap(runner, plan)
        answers = {name: _needle_answers(runner, plan, name) for name in NEEDLE_VARIANTS}
        found = journal.run(asked)
    records: list[SequenceRow] = [text["record"] for text in texts]
    variants = variant_table(records)
    return ParityReport(
        length=length,
        topk=topk,
        windows=records,
        variants=variants,
        attention_recall=_recall_rows([text["recalls"] for text in texts]),
        sweep=[_sweep_point(plan, records, losses, k, name) for k in plan.ks for name in SWEEP_VARIANTS],
        error_split=error_split(variants, kernel),
        needles=needle_tables(needles, answers),
        source=source_table(records),
        lookups=lookup_tables(lookups, found) if lookups else None,
        coarse=coarse_table(dsa_of(model.config), levels_k, by_level) if levels_k else None,
    )


def _recall_rows(recalls: Sequence[Mapping[str, Any]]) -> dict[str, list[RecallRow]]:
    """Of every variant, over all texts."""
    rows: dict[str, list[RecallRow]] = {}
    measured = {name for recall in recalls for name in recall}
    for name in (name for name in RECALL_VARIANTS if name in measured):
        whole = AttentionRecallSelector(VARIANTS[name])
        for recall in recalls:
            whole.add_sums(recall[name])
        rows[name] = [
            {"layer": n, "captured": captured, "oracle": oracle} for n, captured, oracle in whole.result()
        ]
    return rows


def _common_length(sequences: Sequence[TokenSequence]) -> int:
    lengths = sorted({len(sequence.input_ids) for sequence in sequences})
    if len(lengths) != 1:
        raise ConfigError(f"sequences have the lengths {lengths}; use at least one, and all of one length")
    scored_positions(lengths[0])
    return lengths[0]


@dataclass(frozen=True)
class _Plan:
    """What is to be read."""

    sequences: Sequence[TokenSequence]
    topk: int
    ks: Sequence[int]
    needles: Sequence[Any]
    dense_model: PreTrainedModel | None

    def swept(self) -> list[int]:
        """Indices of the sequences that the sweep reads: the first of each kind."""
        kinds = [sequence.kind for sequence in self.sequences]
        return sorted({kinds.index(kind) for kind in kinds})

    @property
    def length(self) -> int:
        """Tokens of each sequence."""
        return len(self.sequences[0].input_ids)

    def other_tokens(self) -> int:
        """Tokens to read beside those of units, for the progress bar."""
        needle_tokens = sum(map(tokens_to_read, sample_groups(self.needles))) * len(NEEDLE_VARIANTS)
        return 2 * len(self.kernel_text().ids_T) + needle_tokens

    def kernel_text(self) -> ModelInput:
        """A short text for the reference backend."""
        return ModelInput.of(self.sequences[0], KERNEL_LENGTH)


def _token_counter(progress: Progress, total: int) -> Callable[[int, str], None]:
    done = 0
    progress(0, total, "")

    def count(tokens: int, what: str) -> None:
        nonlocal done
        done += tokens
        progress(done, total, what)

    return count


def _loss_unit(runner: VariantRunner, plan: _Plan, place: int) -> Unit:
    """Every variant on one text, and the attention that each recalls."""
    variants = _variants(runner, plan)

    def run() -> dict[str, Any]:
        runner.recalls = {}
        record = _score_sequence(runner, plan, plan.sequences[place], variants)
        return {"record": record, "recalls": {name: seen.sums() for name, seen in runner.recalls.items()}}

    readings = len(variants) + (plan.dense_model is not None)
    return Unit(("parity", "losses", plan.length, place), readings * plan.length, run)


def _variants(runner: VariantRunner, plan: _Plan) -> list[str]:
    """What reads every text; dense first."""
    if asks_coarse_level(runner.model, plan.topk, plan.length):
        return [*runner.variants, "one_level"]
    return runner.variants


def _level_units(runner: VariantRunner, plan: _Plan, k: int | None) -> list[Unit]:
    """Two levels and one on every text at a k that asks both, unless that is the plan's, or none does."""
    if k is None or k == plan.topk:
        return []
    return [_level_unit(runner, plan, place, k) for place in range(len(plan.sequences))]


def _level_unit(runner: VariantRunner, plan: _Plan, place: int, k: int) -> Unit:
    sequence = plan.sequences[place]

    def run() -> dict[str, Any]:
        runner.recalls = {}
        means = _means(_scores(runner, sequence, LEVEL_VARIANTS, k), sequence)
        sums = {"one_level": runner.recalls["one_level"].sums()}
        return {"record": {"scores": means}, "recalls": sums}

    return Unit(("parity", f"levels {k}", plan.length, place), len(LEVEL_VARIANTS) * plan.length, run)


def _sweep_unit(runner: VariantRunner, plan: _Plan, k: int, variant: str) -> Unit:
    """One variant at another k, on the first text of each kind."""

    def loss(place: int) -> float:
        text = ModelInput.of(plan.sequences[place])
        hidden_TC = runner.hidden(variant, text, k, f"{plan.sequences[place].name}, k = {k}")
        return second_half_loss(hidden_TC, runner.model.get_output_embeddings(), text.ids_T)

    def run() -> dict[str, Any]:
        return {"variant": variant, "k": k, "losses": [loss(place) for place in plan.swept()]}

    key = ("parity", f"sweep {variant} {k}", plan.length, 0)
    return Unit(key, len(plan.swept()) * plan.length, run)


def _score_sequence(
    runner: VariantRunner, plan: _Plan, sequence: TokenSequence, variants: Sequence[str]
) -> SequenceRow:
    """Scores of these variants on one text, and of the model before conversion."""
    text, length = ModelInput.of(sequence), plan.length
    scores = _scores(runner, sequence, variants, plan.topk)
    record: SequenceRow = {
        "name": sequence.name,
        "kind": sequence.kind,
        "scores": _means(scores, sequence),
    }
    if plan.dense_model is not None:
        own = {"source": last_hidden_states(plan.dense_model, text)}
        source = text_scores(own, plan.dense_model.get_output_embeddings(), text.ids_T)["source"]
        runner.on_tokens(length, sequence.name)
        record["source"] = {
            **summarize_scores(source, length),
            "max_token_difference": (source.loss_P - scores["dense"].loss_P).abs().max().item(),
        }
    return record


def _scores(
    runner: VariantRunner, sequence: TokenSequence, variants: Sequence[str], k: int
) -> dict[str, TextScores]:
    """Of these variants on one text, against the first; their attention recall is added up in the runner."""
    text = ModelInput.of(sequence)
    hidden = {name: runner.hidden(name, text, k, sequence.name, recall=True) for name in variants}
    return text_scores(hidden, runner.model.get_output_embeddings(), text.ids_T)


def _means(scores: Mapping[str, TextScores], sequence: TokenSequence) -> dict[str, TextRow]:
    """Raises CheckpointError where a loss is not finite."""
    means = {name: summarize_scores(found, len(sequence.input_ids)) for name, found in scores.items()}
    for name, found in means.items():
        if not math.isfinite(found["whole"]):
            raise CheckpointError(
                f"loss of {name} on {sequence.name} is {found['whole']}; the weights are damaged, "
                "get them anew"
            )
    return means


def _sweep_point(
    plan: _Plan,
    records: Sequence[SequenceRow],
    losses: Mapping[tuple[str, int], list[float]],
    k: int,
    variant: str,
) -> SweepRow:
    """One variant at one k; the main k is measured with all texts."""

    def at_topk(name: str) -> list[float]:
        return [records[place]["scores"][name]["second_half"] for place in plan.swept()]

    found = at_topk(variant) if k == plan.topk else losses[variant, k]
    return sweep_point(variant, k, found, at_topk("dense"))


def _kernel_gap(runner: VariantRunner, plan: _Plan) -> dict[str, Any]:
    """DSA by the fast backend and by the reference on a short text, with a k that leaves most keys out."""
    text = plan.kernel_text()
    topk = min(plan.topk, max(len(text.ids_T) // KERNEL_KEYS_PER_TOPK, 1))
    lm_head = runner.model.get_output_embeddings()
    fast = second_half_loss(runner.hidden("dsa", text, topk, "kernel check"), lm_head, text.ids_T)
    with pin_backend("reference"):
        exact = second_half_loss(runner.hidden("dsa", text, topk, "kernel check"), lm_head, text.ids_T)
    return {"fast": fast, "reference": exact, "length": len(text.ids_T), "topk": topk}


def _needle_answers(runner: VariantRunner, plan: _Plan, variant: str) -> list[bool]:
    """Which samples one variant answers rightly."""
    answers: list[bool] = []
    for group in sample_groups(plan.needles):
        with runner.running(variant, plan.topk, tokens_to_read(group), f"needle, {variant}"):
            answers += score_samples(runner.model, group)
    return answers
