"""Inherit: k shared among the layers, an indexer from each layer's own heads, the split of k tried out."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from fulmen.data import TokenSequence
from fulmen.modeling.families import dsa_family_for, dsa_of
from fulmen.modeling.family import AnsweredText, TriedSplit
from fulmen.pipeline.reporter import Reporter
from fulmen.training.rows import before_answers

# That k is shared by.
BUDGET_SEQUENCES = 2


def share_k(model: PreTrainedModel, ids_BT: torch.Tensor, reporter: Reporter) -> None:
    """Set each layer's k, where layers may differ."""
    if not dsa_family_for(model.config).varies_topk:
        return
    n_layers, some_BT = len(dsa_of(model.config).layers), ids_BT[:BUDGET_SEQUENCES]
    with reporter.stage("Share k"):
        reporter.advance(0, n_layers)
        dsa_family_for(model.config).fit_topk(model, some_BT, lambda done: reporter.advance(done, n_layers))


def fit_layers(
    model: PreTrainedModel,
    ids_BT: torch.Tensor,
    reporter: Reporter,
    on_fit: Callable[[Any], None] = lambda _: None,
    n_done: int = 0,
) -> list[dict[str, Any]]:
    """Build the indexers, but for `n_done` that are there; how well each fits, which `on_fit` is told too."""
    n_layers = len(dsa_of(model.config).layers)
    with reporter.stage("Inherit"):
        reporter.advance(n_done, n_layers, f"{len(ids_BT)} sequences of {ids_BT.shape[1]} tokens")
        fits: list[Any] = []

        def on_layer(fit: Any) -> None:
            fits.append(fit)
            on_fit(fit)
            reporter.advance(n_done + len(fits), n_layers, f"KL {fit.kl:.2f}")

        return [fit._asdict() for fit in dsa_family_for(model.config).inherit(model, ids_BT, on_layer)]


def try_splits(
    model: PreTrainedModel, answered: Sequence[TokenSequence], device: torch.device, reporter: Reporter
) -> list[TriedSplit]:
    """Keep the split of k with which the model answers best, the first of those returned.

    device: that it runs on.
    """
    texts = [AnsweredText(one.input_ids.to(device), before_answers(one.answers)) for one in answered]
    if not (texts and dsa_family_for(model.config).varies_topk):
        return []
    with reporter.stage("Try splits of k"):
        return dsa_family_for(model.config).try_topk(
            model, texts, lambda done, total: reporter.advance(done, total, "texts")
        )


def with_shares(record: Sequence[dict[str, Any]], tried: Sequence[TriedSplit]) -> list[dict[str, Any]]:
    """The fits with the shares of k that were kept."""
    if not tried:
        return list(record)
    return [{**fit, "topk_share": share} for fit, share in zip(record, tried[0].ratios, strict=True)]
