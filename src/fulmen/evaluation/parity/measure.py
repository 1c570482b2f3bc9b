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
from fulmen.evaluation.parity.losses import (
    scored_positions,
    second_half_loss,
    summarize_scores,
    text_scores,
)
from fulmen.evaluation.parity.needles import sample_groups, score_samples, tokens_to_read
from fulmen.evaluation.parity.report import ParityReport
from fulmen.evaluation.parity.results import RecallRow, SequenceRow, SweepRow
from fulmen.evaluation.parity.tables import (
    error_split,
    needle_tables,
    source_table,
    sweep_point,
    variant_table,
)
from fulmen.evaluation.variants import ModelInput, VariantRunner, current_topk, last_hidden_states
from fulmen.modeling.families import accelerated
from fulmen.ops.dispatch import pin_backend

SWEEP_VARIANTS = ("oracle", "dsa", "window")
NEEDLE_VARIANTS = ("dense", "dsa", "window")
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
    progress: Progress = lambda done, total, what: None,
) -> ParityReport:
    """Compare DSA with dense attention, and with better and worse selections of the same k keys.

    Args:
        model: a converted model, GQA or stock MLA. It is as before when this returns or raises.
        sequences: held-out texts, all of one length.
        topk: keys that a query keeps; by default the model's own.
        inherited: the indexers before training (`indexer_state`), for a variant with them.
        needles: samples of `fulmen.evaluation.parity.needles`; each variant reads a text that several ask
        about once. ks: budgets of the sweep, which reads the first sequence of each kind; by default those of
            k/4, k/2, k and 2k that are below the length.
        dense_model: the model before conversion; checks the dense variant, and DSA against the source.
        progress: called at first, and after each forward pass, with (tokens read, tokens in all, what).

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
    runner = VariantRunner(model, inherited)
    runner.on_tokens = _token_counter(progress, plan.tokens(runner))
    with accelerated(model):
        records = [_score_sequence(runner, plan, sequence) for sequence in sequences]
        sweep = [_sweep_point(runner, plan, records, k, name) for k in plan.ks for name in SWEEP_VARIANTS]
        kernel = _kernel_gap(runner, plan)
        answers = {name: _needle_answers(runner, plan, name) for name in NEEDLE_VARIANTS}
    variants = variant_table(records)
    return ParityReport(
        length=length,
        topk=topk,
        windows=records,
        variants=variants,
        attention_recall={name: _recall_rows(seen) for name, seen in runner.recalls.items()},
        sweep=sweep,
        error_split=error_split(variants, kernel),
        needles=needle_tables(needles, answers),
        source=source_table(records),
    )


def _recall_rows(recall: AttentionRecallSelector) -> list[RecallRow]:
    return [{"layer": n, "captured": captured, "oracle": oracle} for n, captured, oracle in recall.result()]


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

    def tokens(self, runner: VariantRunner) -> int:
        """Tokens in all, for the progress bar."""
        readings = len(self.sequences) * (len(runner.variants) + (self.dense_model is not None))
        readings += len(self.swept()) * len(SWEEP_VARIANTS) * sum(k != self.topk for k in self.ks)
        needle_tokens = sum(map(tokens_to_read, sample_groups(self.needles))) * len(NEEDLE_VARIANTS)
        return readings * len(self.sequences[0].input_ids) + 2 * len(self.kernel_text().ids_T) + needle_tokens

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


def _score_sequence(runner: VariantRunner, plan: _Plan, sequence: TokenSequence) -> SequenceRow:
    """Every variant's scores on one text."""
    text = ModelInput.of(sequence)
    ids_T, length = text.ids_T, len(text.ids_T)
    hidden = {
        name: runner.hidden(name, text, plan.topk, sequence.name, recall=True) for name in runner.variants
    }
    scores = text_scores(hidden, runner.model.get_output_embeddings(), ids_T)
    means = {name: summarize_scores(found, length) for name, found in scores.items()}
    for name, found in means.items():
        if not math.isfinite(found["whole"]):
            raise CheckpointError(
                f"loss of {name} on {sequence.name} is {found['whole']}; the weights are damaged, "
                "get them anew"
            )
    record: SequenceRow = {"name": sequence.name, "kind": sequence.kind, "scores": means}
    if plan.dense_model is not None:
        own = {"source": last_hidden_states(plan.dense_model, text)}
        source = text_scores(own, plan.dense_model.get_output_embeddings(), ids_T)["source"]
        runner.on_tokens(length, sequence.name)
        record["source"] = {
            **summarize_scores(source, length),
            "max_token_difference": (source.loss_P - scores["dense"].loss_P).abs().max().item(),
        }
    return record


def _sweep_point(
    runner: VariantRunner, plan: _Plan, records: Sequence[SequenceRow], k: int, variant: str
) -> SweepRow:
    """One variant at one k; the main k is measured already."""

    def loss(place: int) -> float:
        if k == plan.topk:
            return records[place]["scores"][variant]["second_half"]
        text = ModelInput.of(plan.sequences[place])
        hidden_TC = runner.hidden(variant, text, k, f"{plan.sequences[place].name}, k = {k}")
        return second_half_loss(hidden_TC, runner.model.get_output_embeddings(), text.ids_T)

    dense = [records[place]["scores"]["dense"]["second_half"] for place in plan.swept()]
    return sweep_point(variant, k, [loss(place) for place in plan.swept()], dense)


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
