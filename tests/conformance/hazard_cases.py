"""What the tests of this folder share: inputs well above k, selections by hand, and models that are watched.

Inputs whose scores are nearly all 0 hide everything, so both kinds here are checked by `check_scores`.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fulmen.modeling.families import accelerated, empty_cache
from fulmen.modeling.selectors import IndexerSelector, use_selector
from fulmen.ops.scores import index_scores
from tests.modeling.gqa.tiny_gqa import make_dense, make_dsa
from tests.modeling.mla.tiny_mla import make_mla
from tests.ops.ops_cases import normal

TOPK = 12
# Tokens of left padding: no two rows of a batch are of one length.
PADS = (3, 11, 40)
MODELS = ("llama", "qwen3", "llama-tied", "v32", "glm-shared")


def index_case(dtype: torch.dtype, tied: bool, T: int, S: int) -> tuple[Tensor, ...]:
    """q, k, w, b, start, stop of the last T queries but 2; rows of unequal length, 4 index heads on 2.

    `tied`: small integers, exact in every dtype; some 10 of the scores lie above a plateau of zeros.
    """
    B, E = len(PADS), 16  # E ** -0.5 is exact
    q, k = normal(B, T, 4, E), normal(B, S, 2, E, seed=1)
    w, b = normal(B, T, 4, seed=2), normal(B, T, 4, seed=3)
    w[..., ::2] = w[..., ::2].abs()  # else some queries have no score above 0
    if tied:
        q, k, w, b = q.round(), k.round(), w.sign(), torch.full_like(b, -2.0)
    stop = torch.arange(S - T - 1, S - 1).repeat(B, 1)
    start = torch.tensor(PADS)[:, None].repeat(1, T)
    return *(x.to(dtype) for x in (q, k, w, b)), start, stop


def best_by_hand(scores_BTS: Tensor, start_BT: Tensor, stop_BT: Tensor, topk: int) -> Tensor:
    """The rule, by Python's sort: the largest scores, the more recent of equals, then -1."""
    rows = []
    for scores, start, stop in zip(
        scores_BTS.flatten(0, 1).tolist(),
        start_BT.flatten().tolist(),
        stop_BT.flatten().tolist(),
        strict=True,
    ):
        best = sorted(range(start, stop), key=lambda s: (scores[s], s), reverse=True)[:topk]
        rows.append(sorted(best) + [-1] * (topk - len(best)))
    return torch.tensor(rows, dtype=torch.int32).reshape(*start_BT.shape, topk)


def check_scores(scores_BTS: Tensor, start_BT: Tensor, stop_BT: Tensor, topk: int, tied: bool) -> None:
    """Scores vary around the cut; in tied ones a plateau lies across it, in others never."""
    distinct, cut = [], []
    for scores_S, start, stop in zip(
        scores_BTS.flatten(0, 1), start_BT.flatten().tolist(), stop_BT.flatten().tolist(), strict=True
    ):
        if stop - start > 3 * topk:
            ranked = scores_S[start:stop].sort(descending=True).values
            distinct.append(len(ranked[: 2 * topk].unique()))
            cut.append(bool(ranked[topk - 1] == ranked[topk]))
    mean_distinct, share_cut = sum(distinct) / len(distinct), sum(cut) / len(cut)
    if tied:
        assert mean_distinct > 3
        assert share_cut > 0.6
    else:
        assert mean_distinct > 1.5 * topk
        assert share_cut < 0.2


@cache
def make_model(name: str):
    """A converted model in float64, in which rounding never decides what is selected; made once."""
    if name in ("v32", "glm-shared"):
        # Transformers' fused experts take no float64: no layer has any.
        kinds = {"indexer_types": ["full", "shared", "full", "shared"]} if name == "glm-shared" else {}
        shape = {"num_hidden_layers": 4, "first_k_dense_replace": 4, "index_topk": TOPK}
        return make_mla("glm" if kinds else "v32", **shape, **kinds).double()
    model = make_dsa(make_dense(name.removesuffix("-tied"), torch.float64), TOPK)
    if name.endswith("-tied"):
        for layer in model.model.layers:
            torch.nn.init.constant_(layer.self_attn.indexer.shift_proj.bias, -9.0)
    return model


class Watch(IndexerSelector):
    """The product's selection, written down: `chosen[layer][row][query]`, in positions of the row itself.

    Positions count from the row's first visible token, so that padding and chunks do not show. Queries that
    keep everything are left out.
    """

    def __init__(self) -> None:
        self.chosen: dict[int, dict[int, dict[int, tuple[int, ...]]]] = defaultdict(lambda: defaultdict(dict))
        self.scores: list[tuple[Tensor, Tensor, Tensor]] = []

    def select(self, inputs, topk):
        topk_BTK = super().select(inputs, topk)
        self.write(inputs, topk_BTK, topk)
        return topk_BTK

    def write(self, inputs, topk_BTK, topk):
        index = (inputs.index_q_BTJE, inputs.index_k_BSIE, inputs.index_w_BTJ, inputs.index_b_BTJ)
        ends = (inputs.start_BT, inputs.stop_BT)
        self.scores.append((index_scores(*index, *ends), *ends))
        for row, (starts, stops) in enumerate(zip(*(x.tolist() for x in ends), strict=True)):
            for t, (start, stop) in enumerate(zip(starts, stops, strict=True)):
                if stop - start > topk:
                    keys = tuple(s - start for s in topk_BTK[row, t].tolist() if s >= 0)
                    self.chosen[inputs.layer_idx][row][stop - start - 1] = keys

    def of_row(self, row: int) -> dict[int, dict[int, tuple[int, ...]]]:
        return {layer: rows[row] for layer, rows in self.chosen.items()}


def watched(model: Any, feed: Callable[[], Any], watch: Watch | None = None) -> tuple[Watch, Any]:
    """What the model's layers select while `feed` runs, and what it returns."""
    watch = Watch() if watch is None else watch
    with torch.no_grad(), accelerated(model), use_selector(model, watch):
        return watch, feed()


def logits_in_steps(
    model: Any, inputs: Tensor, sizes: list[int], cache: Any, start: int = 0, **kwargs: Any
) -> Tensor:
    """Logits of `inputs`, [B, T] or embeddings [B, T, C], from token `start` on, in pieces of `sizes`."""
    name, parts = "input_ids" if inputs.ndim == 2 else "inputs_embeds", []
    for size in sizes:
        piece = {name: inputs[:, start : start + size]}
        if "attention_mask" in kwargs:
            piece["attention_mask"] = kwargs["attention_mask"][:, : start + size]
            piece["position_ids"] = kwargs["position_ids"][:, start : start + size]
        parts.append(model(**piece, past_key_values=cache, use_cache=True).logits)
        start += size
    return torch.cat(parts, 1)


def new_cache(model: Any) -> Any:
    return empty_cache(model.config)
