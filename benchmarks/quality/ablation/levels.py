"""The coarse level of an index: what its dims, heads, candidates and bits cost beside one level.

A point's coarse level is fitted in closed form to the loaded model, whose other weights stay. Candidates are
chosen from half of the text's length on, whatever there are of them: so that all points are asked of the same
queries, those of the half whose loss counts.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.quality.ablation.lab import Lab
from benchmarks.quality.ablation.measuring import RECALL_STRIDE, mean, ratio
from fulmen.config import DsaConfig, candidates_left
from fulmen.data import iter_sequences
from fulmen.evaluation.controls import AttentionRecallSelector
from fulmen.evaluation.variants import use_topk
from fulmen.modeling.families import dsa_family_for, dsa_of
from fulmen.modeling.selectors import OneLevelSelector, SelectionInputs, Selector, use_selector
from fulmen.ops.common.index_keys import INT8_MOST, codes_and_scales
from fulmen.ops.two_level import two_level_topk

ONE_LEVEL = {"levels": 1}
CALIBRATION_TEXTS = 2


@dataclass(frozen=True)
class Point:
    """A coarse level: numbers of its key, heads with a threshold, candidates over k, bits of a number."""

    dims: int
    heads: int
    factor: int
    bits: int

    @property
    def key_bytes(self) -> int:
        """Of a token and layer, with the scale."""
        return self.dims * self.bits // 8 + torch.bfloat16.itemsize


def points_around(
    usual: Point, dims: Sequence[int], heads: Sequence[int], factors: Sequence[int], bits: Sequence[int]
) -> list[Point]:
    """The usual point, and those that differ from it in one thing; of one dims and heads in a row."""
    lists = {"dims": dims, "heads": heads, "factor": factors, "bits": bits}
    found = [usual, *(replace(usual, **{name: one}) for name, many in lists.items() for one in many)]
    return sorted(set(found), key=lambda point: (point.dims, point.heads, point.factor, point.bits))


class PointSelector(Selector):
    """Selects in two levels of which candidates are chosen where more than `asked_from` keys are seen.

    `recalls` adds up the attention that candidates hold there.
    """

    def __init__(self, point: Point, topk: int, asked_from: int) -> None:
        self.point, self.topk, self.asked_from = point, topk, asked_from
        self.recalls = AttentionRecallSelector(_Candidates(), RECALL_STRIDE)

    def select(self, inputs: SelectionInputs, topk: int) -> Tensor:
        if inputs.coarse is None:
            return OneLevelSelector().select(inputs, topk)
        k_BSX = with_bits(inputs.coarse.k_BSX, self.point.bits)
        count = candidates_left(self.point.factor, topk, self.topk)
        inputs = replace(inputs, coarse=inputs.coarse._replace(k_BSX=k_BSX, n_candidates=count))
        self.recalls.select(inputs, self.asked_from)
        return _selected(inputs, topk, self.asked_from)


class _Candidates(Selector):
    """All candidates that are chosen of more than `topk` keys."""

    def select(self, inputs: SelectionInputs, topk: int) -> Tensor:
        assert inputs.coarse is not None
        return _selected(inputs, inputs.coarse.n_candidates, topk)


def _selected(inputs: SelectionInputs, topk: int, asked_from: int) -> Tensor:
    coarse, ends = inputs.coarse, (inputs.start_BT, inputs.stop_BT)
    assert coarse is not None
    index = (inputs.index_q_BTJE, inputs.index_k_BSIE, inputs.index_w_BTJ, inputs.index_b_BTJ)
    return two_level_topk(*coarse[:3], *index, *ends, topk, coarse.n_candidates, asked_from)


def with_bits(packed_BSX: Tensor, bits: int) -> Tensor:
    """Packed keys rounded to fewer bits, which stay where they lie."""
    if bits == 8:
        return packed_BSX
    most = 2 ** (bits - 1) - 1
    codes_BSN, scale_BS1 = codes_and_scales(packed_BSX)
    codes_BSN = (codes_BSN * (most / INT8_MOST)).round().to(torch.int8)
    scale_BS1 = (scale_BS1.float() * (INT8_MOST / most)).bfloat16()
    return torch.cat((codes_BSN, scale_BS1.view(torch.int8)), -1)


def measure_levels(lab: Lab, model: PreTrainedModel, topk: int, points: Sequence[Point], length: int) -> None:
    """One level first, then every point that is not measured yet.

    length: tokens of each calibration text.
    """
    lab.cells.add(ONE_LEVEL, partial(_measure, lab, model, topk, OneLevelSelector()))
    one = next(row["losses"] for row in lab.cells.rows if row["cell"] == ONE_LEVEL)
    texts = iter_sequences(lab.corpus.calibration, lab.tokenizer, length, seed=lab.seed)
    ids_BT = torch.stack([text.input_ids for text in islice(texts, CALIBRATION_TEXTS)])
    fitted = None
    for point in points:
        if lab.cells.has(asdict(point)):
            continue
        if fitted != (point.dims, point.heads):
            fit_point(model, point, ids_BT, topk)
            fitted = (point.dims, point.heads)
        lab.cells.add(asdict(point), partial(_measure_point, lab, model, topk, point, one))


def fit_point(model: PreTrainedModel, point: Point, ids_BT: Tensor, topk: int) -> None:
    """The point's coarse level in closed form, at this k. Raises ConfigError if it cannot be."""
    family, dsa = dsa_family_for(model.config), dsa_of(model.config)
    # The fewest candidates: layers then make coarse queries wherever any point asks for them.
    changed = {"coarse_head_dim": point.dims, "coarse_n_heads": point.heads, "candidate_factor": 1}
    dsa = DsaConfig.from_dict({**dsa.to_dict(), **changed})
    family.require_inheritable(model.config, dsa)
    family.set_coarse(model, dsa)
    with torch.no_grad(), use_topk(model, topk):
        family.inherit_coarse(model, ids_BT)


def _measure(lab: Lab, model: PreTrainedModel, topk: int, selector: Selector) -> dict[str, Any]:
    with use_topk(model, topk), use_selector(model, selector):
        return {"losses": lab.heldout.losses(model)}


def _measure_point(
    lab: Lab, model: PreTrainedModel, topk: int, point: Point, one: dict[str, list[float]]
) -> dict[str, Any]:
    """losses, and over one level's; what candidates hold of the attention, mean and least of the layers."""
    selector = PointSelector(point, topk, lab.length // 2)
    found = _measure(lab, model, topk, selector)
    held = [layer.captured for layer in selector.recalls.result()]
    return {
        **found,
        "one_level": one,
        "over_one_level": {kind: ratio(losses, one[kind]) for kind, losses in found["losses"].items()},
        "candidates": mean(held) if held else None,
        "least": min(held, default=None),
        "key_bytes": point.key_bytes,
    }
