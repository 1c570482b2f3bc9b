"""What the losses take for the change of a layer's output, against what its selection changes in it."""

import pytest
import torch

from fulmen.modeling.selectors import DenseSelector, use_selector
from fulmen.training.sparse.losses import SparseLossSelector
from fulmen.training.warmup.losses import IndexerLossSelector
from tests.modeling.gqa.tiny_gqa import FAMILIES, make_dense, make_dsa, random_ids

# The cut of two keys lies between the second and the third score: a hard one keeps the two best.
TOPK, LENGTH = 2, 24


@pytest.fixture(autouse=True)
def _hard_cut(monkeypatch):
    for stage in ("warmup", "sparse"):
        monkeypatch.setattr(f"fulmen.training.{stage}.losses.TEMPERATURE", 1e-6)


def losses_of(attentions, stage):
    if stage == "warmup":
        return IndexerLossSelector({i: x.output_weight() for i, x in attentions.items()}, LENGTH, 8)
    return SparseLossSelector(attentions, lambda layer: TOPK, "output", LENGTH)


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_loss_is_what_the_selection_changes_in_the_output(name, stage):
    """In the first converted layer, whose input is the same: sinks, caps and gates included."""
    model = make_dsa(make_dense(name), topk=TOPK)
    first, attentions = model.config.dsa["layers"][0], {}
    for layer in model.config.dsa["layers"]:
        attentions[layer] = model.model.layers[layer].self_attn
        # No score of 0, of which there may be many: at a tie a cut is not hard.
        attentions[layer].indexer.shift_proj.bias.fill_(10)
    own, seen = attentions[first], []
    own.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0] @ own.output_weight().T))
    losses = losses_of(attentions, stage)
    ids = random_ids(2, LENGTH)
    with use_selector(model, losses):
        model(ids, use_cache=False)
    with use_selector(model, DenseSelector()):
        model(ids, use_cache=False)
    model(ids, use_cache=False)
    _, dense_BTC, sparse_BTC = (x[:, TOPK:] for x in seen)
    change_BT = (sparse_BTC - dense_BTC).square().sum(-1) / dense_BTC.square().sum(-1)
    assert losses.layers[first].changed == pytest.approx(float(change_BT.mean()), rel=1e-3)
