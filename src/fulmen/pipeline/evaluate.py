"""Parity of a converted model with dense attention: load, draw held-out texts and needles, measure."""

import json
from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from fulmen.data import Corpus, Document, TokenSequence, draw_sequences
from fulmen.errors import ConfigError, CorpusError
from fulmen.evaluation.parity.measure import measure_parity
from fulmen.evaluation.parity.needles import NeedleSample, needle_samples
from fulmen.evaluation.parity.report import ParityReport
from fulmen.evaluation.provenance import about_run
from fulmen.modeling.checkpoint import load_dense
from fulmen.modeling.cost import cost_rows
from fulmen.modeling.families import dsa_of
from fulmen.modeling.lengths import context_of
from fulmen.pipeline.devices import device_of, move
from fulmen.pipeline.load import load_converted_model, load_converted_tokenizer
from fulmen.pipeline.model_config import read_config
from fulmen.pipeline.reporter import Reporter
from fulmen.pipeline.settings import EvalSettings
from fulmen.pipeline.texts import draw_longest, kinds_of, lengths_to_try, read_corpus
from fulmen.pipeline.train import RECORD_FILE, STAGES_DIR

# As many texts as in `EvalSize` are read of this length.
UP_TO_LENGTH = 4096
COST_POSITIONS = tuple(2**power for power in range(8, 21))


class EvalSize(NamedTuple):
    """How much is read: sequences per kind of text, and texts with needles per number of keys and length.

    Every needle of a text is asked for: in all, FULL asks 16 questions with one key and 128 with eight.
    """

    sequences: int
    needle_texts: int
    keys: tuple[int, ...] = (1, 8)

    def of_length(self, length: int) -> "EvalSize":
        """Fewer texts where they are longer than 4,096 tokens, half of them at least."""
        share = max(0.5, min(1.0, UP_TO_LENGTH / length))
        return EvalSize(ceil(share * self.sequences), ceil(share * self.needle_texts), self.keys)


FULL, QUICK = EvalSize(sequences=8, needle_texts=8), EvalSize(sequences=2, needle_texts=2)


def measure(settings: EvalSettings, reporter: Reporter) -> ParityReport:
    """Compare a converted model with dense attention; writes nothing. Raises what its parts raise."""
    device = device_of(settings.device)
    with reporter.stage("Read data"):
        lengths = plan_evaluation(settings, reporter)
        tokenizer = load_converted_tokenizer(settings.model_dir)
        corpus = read_corpus(settings.data, settings.texts)
        texts, needles = draw_longest(
            lengths, lambda length: _texts(length, settings, corpus, tokenizer, reporter), reporter
        )
    reporter.note(f"Loading {settings.model_dir}")
    with reporter.stage("Load"):
        model = load_converted_model(settings.model_dir, device)
        dense = None if settings.dense is None else load_dense(settings.dense, model.dtype)[0]
        dense = dense if dense is None else move(dense, model.device)
    with reporter.stage("Evaluate", counted=False):
        report = measure_parity(
            model,
            texts,
            topk=settings.topk,
            inherited=_inherited(settings.model_dir),
            needles=needles,
            ks=_budgets(settings.topk or dsa_of(model.config).topk, quick=settings.quick),
            dense_model=dense,
            progress=reporter.advance,
        )
    about = {**about_run(str(settings.model_dir)), **_provenance(settings.model_dir)}
    return replace(report, about=about, cost=_cost_curve(model))


def plan_evaluation(settings: EvalSettings, reporter: Reporter) -> list[int]:
    """Lengths to be tried in turn. Raises what the configs have against these settings."""
    _, config = read_config(settings.model_dir)
    topk, context = settings.topk or dsa_of(config).topk, context_of(config)
    if context and settings.length and settings.length > context:
        raise ConfigError(
            f"length={settings.length} exceeds the model's context of {context} tokens; use a lower length",
            arguments=["length"],
        )
    if settings.dense is not None:
        read_config(settings.dense)
    if settings.length is None:
        return lengths_to_try(None, config, topk)
    if topk >= settings.length:
        reporter.note(
            f"k = {topk:,} leaves nothing out of {settings.length:,} tokens: there DSA is dense attention"
        )
    return [settings.length]


def _texts(
    length: int, settings: EvalSettings, corpus: Corpus, tokenizer: Any, reporter: Reporter
) -> tuple[list[TokenSequence], list[NeedleSample]]:
    """Held-out sequences of each kind, or of the kinds asked for, and needles. Raises CorpusError."""
    size = (QUICK if settings.quick else FULL).of_length(length)
    count = settings.sequences or size.sequences
    kinds = settings.kinds or kinds_of(corpus.heldout)
    drawn = [
        one for kind in kinds for one in draw_sequences(corpus.heldout, tokenizer, length, count, kind=kind)
    ]
    if not settings.needles:
        return drawn, []
    return drawn, _needles(corpus.heldout, tokenizer, length, size, reporter)


def _needles(
    heldout: Sequence[Document], tokenizer: Any, length: int, size: EvalSize, reporter: Reporter
) -> list[NeedleSample]:
    """Single and multi-key needles, at half the length and the whole; none where the text is scarce."""
    samples: list[NeedleSample] = []
    for n_tokens in (length // 2, length):
        for n_keys in size.keys:
            try:
                samples += needle_samples(heldout, tokenizer, n_tokens, size.needle_texts, n_keys=n_keys)
            except (ConfigError, CorpusError) as error:
                reporter.note(f"No needles of {n_tokens} tokens: {error}")
    return samples


def _budgets(topk: int, *, quick: bool) -> list[int]:
    return (
        [max(topk // 2, 1), topk, 2 * topk]
        if quick
        else [max(topk // 4, 1), max(topk // 2, 1), topk, 2 * topk]
    )


def _inherited(model_dir: Path) -> dict[str, Tensor] | None:
    """The indexers before training, which a conversion leaves beside the model."""
    file = model_dir / STAGES_DIR / "inherit.safetensors"
    return load_file(file) if file.is_file() else None


def _provenance(model_dir: Path) -> dict[str, str]:
    """How the model was made, from the record of its conversion."""
    file = model_dir / RECORD_FILE
    if not file.is_file():
        return {}
    record = json.loads(file.read_text(encoding="utf-8"))
    length = f"{record['steps']} steps" if record.get("steps") else f"{record.get('budget_s') or 0:.0f} s"
    data = ", ".join(record["data"]) or "the library and manual of Python"
    return {"converted": f"from {record['source']} by {', '.join(record['stages'])} ({length}), on {data}"}


def _cost_curve(model: PreTrainedModel) -> list[dict[str, float]]:
    rows = cost_rows(model.config, dsa_of(model.config), COST_POSITIONS, model.dtype.itemsize)
    return [{"position": row.position, **row.decode._asdict()} for row in rows]
