"""Parity of a converted model with dense attention: load, draw held-out texts and needles, measure."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from fulmen.data import Corpus, TokenSequence, draw_sequences
from fulmen.errors import ConfigError
from fulmen.evaluation.journal import Journal
from fulmen.evaluation.parity.lookups import LookupPlan
from fulmen.evaluation.parity.measure import measure_parity
from fulmen.evaluation.parity.report import ParityReport
from fulmen.evaluation.provenance import about_run
from fulmen.modeling.checkpoint import load_dense
from fulmen.modeling.cost import cost_rows
from fulmen.modeling.families import dsa_of
from fulmen.modeling.lengths import context_of
from fulmen.pipeline.devices import device_of, move
from fulmen.pipeline.evaluate_lookups import plan_lookups
from fulmen.pipeline.fingerprint import weights_fingerprint
from fulmen.pipeline.load import load_converted_model, load_converted_tokenizer
from fulmen.pipeline.model_config import read_config
from fulmen.pipeline.reporter import Reporter, roughly
from fulmen.pipeline.settings import EvalSettings
from fulmen.pipeline.texts import draw_longest, kinds_of, lengths_to_try, read_corpus
from fulmen.pipeline.train import RECORD_FILE, STAGES_DIR
from fulmen.version import __version__

# As many texts as in `EvalSize` are read of this length.
UP_TO_LENGTH = 4096
# Of a run, so that it is worth saying beforehand.
LONG_S = 60
COST_POSITIONS = tuple(2**power for power in range(8, 21))


class EvalSize(NamedTuple):
    """How much is read: sequences per kind of text."""

    sequences: int

    def of_length(self, length: int) -> int:
        """Fewer sequences where they are longer than 4,096 tokens, half of them at least."""
        return ceil(max(0.5, min(1.0, UP_TO_LENGTH / length)) * self.sequences)


FULL, QUICK = EvalSize(sequences=8), EvalSize(sequences=2)


def measure(settings: EvalSettings, reporter: Reporter) -> ParityReport:
    """Compare a converted model with dense attention; writes nothing but, until its end, to `out`.

    Raises what its parts raise.
    """
    device = device_of(settings.device)
    with reporter.stage("Read data"):
        lengths = plan_evaluation(settings, reporter)
        tokenizer = load_converted_tokenizer(settings.model_dir)
        corpus = read_corpus(settings.data, settings.texts)
        texts = draw_longest(lengths, lambda length: _texts(length, settings, corpus, tokenizer), reporter)
        _, config = read_config(settings.model_dir)
        lookups = plan_lookups(settings, config, corpus.heldout, tokenizer, reporter)
    reporter.note(f"Loading {settings.model_dir}")
    with reporter.stage("Load"):
        model = load_converted_model(settings.model_dir, device)
        dense = None if settings.dense is None else load_dense(settings.dense, model.dtype)[0]
        dense = dense if dense is None else move(dense, model.device)
    journal = _journal(settings, corpus, model, texts, lookups)
    with reporter.stage("Evaluate", counted=False):
        report = measure_parity(
            model,
            texts,
            topk=settings.topk,
            inherited=_inherited(settings.model_dir),
            lookups=lookups,
            ks=_budgets(settings.topk or dsa_of(model.config).topk, quick=settings.quick),
            dense_model=dense,
            journal=journal,
            progress=_progress(reporter),
        )
    if journal.path is not None:
        journal.path.unlink(missing_ok=True)
    about = {**about_run(str(settings.model_dir)), **_provenance(settings.model_dir)}
    return replace(report, about=about, cost=_cost_curve(model), quick=settings.quick)


def _journal(
    settings: EvalSettings,
    corpus: Corpus,
    model: PreTrainedModel,
    texts: Sequence[TokenSequence],
    lookups: LookupPlan | None,
) -> Journal:
    """Where losses and answers are kept: a file of its own for all that makes them what they are."""
    if settings.out is None:
        return Journal(None, {})
    identity = {
        "weights": weights_fingerprint(model.state_dict()),
        "config": model.config.to_dict().get("dsa"),
        "dense": settings.dense,
        "corpus": corpus.fingerprint,
        "texts": [len(texts), len(texts[0].input_ids)],
        "look-ups": [len(lookups.texts), len(lookups.texts[0].lookups), lookups.length] if lookups else None,
        "topk": settings.topk,
        "kinds": settings.kinds,
        "fulmen": __version__,
    }
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    return Journal(settings.out.expanduser() / f"parity-{digest}.jsonl", identity)


def _progress(reporter: Reporter) -> Callable[[int, int, str], None]:
    """`Reporter.advance`, which first says how long it will take, by what was read first."""
    began, said = time.monotonic(), False

    def advance(done: int, total: int, what: str) -> None:
        nonlocal said
        if done and not said:
            said = True
            seconds = (time.monotonic() - began) * total / done
            if seconds > LONG_S:
                reporter.note(f"{total:,} tokens are to be read, in about {roughly(seconds)}")
        reporter.advance(done, total, what)

    return advance


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
        lengths = lengths_to_try(None, config, topk)
        _note_split(topk, lengths[0], dsa_of(config).topk_shares, reporter)
        return lengths
    if topk >= settings.length:
        reporter.note(
            f"k = {topk:,} leaves nothing out of {settings.length:,} tokens: there DSA is dense attention"
        )
    _note_split(topk, settings.length, dsa_of(config).topk_shares, reporter)
    return [settings.length]


def _note_split(topk: int, length: int, ratios: Sequence[float], reporter: Reporter) -> None:
    """Say if a layer's part of k is more than there is."""
    ratio = max(ratios, default=1)
    if topk < length < ratio * topk:
        reporter.note(
            f"k = {topk:,} is more than the layers can share in {length:,} tokens: one of ratio {ratio:g} "
            "keeps all of them, and the layers together fewer than k each; use a lower k or a longer length"
        )


def _texts(length: int, settings: EvalSettings, corpus: Corpus, tokenizer: Any) -> list[TokenSequence]:
    """Held-out sequences of each kind, or of the kinds asked for. Raises CorpusError."""
    count = settings.sequences or (QUICK if settings.quick else FULL).of_length(length)
    kinds = settings.kinds or kinds_of(corpus.heldout)
    return [
        one for kind in kinds for one in draw_sequences(corpus.heldout, tokenizer, length, count, kind=kind)
    ]


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
