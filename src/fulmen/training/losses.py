"""The warm-up's loss, taken where attention happens: a selector that selects nothing and measures the indexer."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fulmen.modeling.selectors import SelectionInputs, Selector
from fulmen.ops.indexer_loss import indexer_loss, indexer_loss_selected
from fulmen.ops.select_topk import index_topk, select_topk

# The second KL looks at this many times k candidates: the k that are kept and those that nearly are.
CANDIDATES_OVER_TOPK = 2


@dataclass(frozen=True)
class LayerLoss:
    """One layer's part of a step, all in nats but the last two, which are shares of the attention mass.

    loss: carries the gradient. kl: the dense KL (DeepSeek-V3.2, equation 3). entropy: of the target.
    captured, oracle: mass that the indexer's k keys and the best k keys hold, on a few of the rows.
    """

    loss: Tensor
    kl: float
    entropy: float
    captured: float
    oracle: float


@dataclass
class IndexerLossSelector(Selector):
    """Collects the loss of every layer while the model runs dense.

    The loss is the exact head-summed KL twice: over all visible keys (equation 3 of arXiv 2512.02556), which
    finds keys the indexer overlooks, and over the 2k keys it ranks first (equation 4), which orders those
    around the cut. The first alone spends its gradient on sinks and neighbours that are kept anyway.

    Attributes:
        n_rows: query rows drawn per text and layer; all that see more than k keys if there are fewer.
        n_measured: how many of the rows are also measured for captured mass.
    """

    n_rows: int
    n_measured: int
    layers: dict[int, LayerLoss] = field(default_factory=dict)

    def is_needed(self, n_keys: int, topk: int) -> bool:
        return True

    def select(self, inputs: SelectionInputs, topk: int) -> None:
        """Add this layer's loss to `layers`; the layer then attends densely."""
        rows = sampled_rows(inputs, topk, self.n_rows)
        own = (inputs.q_BTHD.detach()[:, rows], inputs.k_BSGD.detach())
        bias = None if inputs.index_b_BTJ is None else inputs.index_b_BTJ[:, rows]
        index = (inputs.index_q_BTJE[:, rows], inputs.index_k_BSIE, inputs.index_w_BTJ[:, rows], bias)
        intervals = (inputs.start_BT[:, rows], inputs.stop_BT[:, rows])
        over_all = indexer_loss(*index, *own, *intervals, inputs.scale)
        with torch.no_grad():
            candidates_BTK = index_topk(*index, *intervals, CANDIDATES_OVER_TOPK * topk)
        over_best = indexer_loss_selected(*index, *own, candidates_BTK, inputs.scale)
        captured, oracle = self._mass(inputs, rows, topk)
        self.layers[inputs.layer_idx] = LayerLoss(
            over_all.kl_BT.mean() + over_best.kl_BT.mean(),
            float(over_all.kl_BT.detach().mean()),
            float(over_all.target_entropy_BT.detach().mean()),
            captured,
            oracle,
        )

    @torch.no_grad()
    def _mass(self, inputs: SelectionInputs, rows: Tensor, topk: int) -> tuple[float, float]:
        some = rows[:: max(1, len(rows) // self.n_measured)]
        p_BTS = mean_attention(inputs, some)
        intervals = (inputs.start_BT[:, some], inputs.stop_BT[:, some])
        bias = None if inputs.index_b_BTJ is None else inputs.index_b_BTJ[:, some]
        chosen_BTK = index_topk(
            inputs.index_q_BTJE[:, some],
            inputs.index_k_BSIE,
            inputs.index_w_BTJ[:, some],
            bias,
            *intervals,
            topk,
        )
        return _held(p_BTS, chosen_BTK), _held(p_BTS, select_topk(p_BTS, *intervals, topk))


def sampled_rows(inputs: SelectionInputs, topk: int, n_rows: int) -> Tensor:
    """Ascending positions of at most `n_rows` queries, drawn without replacement from those that see more than
    `topk` keys in every text; from all if there are none. Uses torch's global generator, which Trainer's
    checkpoints restore."""
    seen_T = (inputs.stop_BT - inputs.start_BT).amin(0)
    rows = (seen_T > topk).nonzero()[:, 0]
    if len(rows) == 0:
        rows = torch.arange(len(seen_T), device=seen_T.device)
    drawn = torch.randperm(len(rows))[:n_rows].sort().values
    return rows[drawn.to(rows.device)]


def mean_attention(inputs: SelectionInputs, rows: Tensor) -> Tensor:
    """p_BTS: mean over heads of the dense attention of a few query rows; 0 outside their intervals."""
    groups = inputs.k_BSGD.shape[2]
    q_BGMTD = inputs.q_BTHD[:, rows].float().unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
    scores_BGMTS = q_BGMTD @ inputs.k_BSGD.float().permute(0, 2, 3, 1)[:, :, None] * inputs.scale
    keys_S = torch.arange(inputs.k_BSGD.shape[1], device=rows.device)
    start_BT1, stop_BT1 = inputs.start_BT[:, rows, None], inputs.stop_BT[:, rows, None]
    hidden_BTS = (keys_S < start_BT1) | (keys_S >= stop_BT1)
    scores_BGMTS.masked_fill_(hidden_BTS[:, None, None], -torch.inf)
    return scores_BGMTS.softmax(-1).mean((1, 2)).masked_fill_(hidden_BTS, 0)


def _held(p_BTS: Tensor, topk_BTK: Tensor) -> float:
    mass_BTK = p_BTS.gather(-1, topk_BTK.clamp_min(0).long()).masked_fill(topk_BTK < 0, 0)
    return float(mass_BTK.sum(-1).mean())
