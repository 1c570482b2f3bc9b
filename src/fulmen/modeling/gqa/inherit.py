"""Build the indexer of a GQA model from the model's own heads, in closed form, from some calibration text.

Per layer, with l[t,s] a head's own logit, Z[t] = logsumexp_s l[t,s] and tau[t] the k-th largest probability
(mean over heads) of query t:

1. Threshold. A head matters for token s once its probability exp(l - Z) passes tau, so its ReLU opens at
   theta = Z + log tau. A ridge regression of theta on the hidden state gives the shift b = -theta. (With
   sinks, Z and tau are those of `mean_attention_of`; with capped logits, theta is then taken back to what it
   was before the cap, as l is below.)
2. Directions. l is a sum over rotary pairs. Pairs are picked greedily, each time the one that explains most
   of what is left of l's variance (over keys, weighted towards those near or above theta), with the complex
   coefficient that explains most. The index key is the model's own key on those pairs, the index query the
   model's own query times the coefficients; every pair keeps its own rotary frequency.
3. Offset. What the dropped pairs add to l on average near theta is moved into the threshold.
4. Scale. All head weights are one number per layer, for which KL(p || softmax(I)) is least.
5. Coarse level, where the index has two: `inherit_coarse.py`.

Every second text is read with gaps in its positions, up to the end of the model's context
(`calibration.spread_positions`): pairs that turn slowly look alike within a short text, and what is chosen
there fails beyond it (docs/log.md, "The first layer at 32K").
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from fulmen.config import DsaConfig
from fulmen.errors import TrainingDivergedError
from fulmen.modeling.gqa.attention import Heads, RotaryTable
from fulmen.modeling.gqa.calibration import asked_queries, read_densely
from fulmen.modeling.gqa.inherit_coarse import (
    ALWAYS_OPEN,
    Moments,
    best_mix,
    pair_moments,
    still_pairs,
    write_coarse,
)
from fulmen.modeling.gqa.own_logits import (
    Softmax,
    grouped_logits,
    hide_later,
    later_keys,
    mean_attention_of,
    quick_exp_,
    uncapped,
)
from fulmen.modeling.gqa.rotary_pairs import pair_covariance, pair_order, pick_pairs
from fulmen.modeling.lengths import context_of
from fulmen.ops.common.index_keys import round_index_keys
from fulmen.ops.common.rope import apply_rope
from fulmen.ops.scores import index_scores

# Of the sampled queries, those for which all pairs of dims are formed.
PAIR_EVERY = 8
ROWS_PER_BLOCK = 32
RIDGE = 1e-2
LOG_SCALES = torch.arange(-6.0, 3.0, 0.25)


class InheritedGqaLayer(NamedTuple):
    """How well one layer's indexer fits its attention on the calibration text.

    layer: its index in the model.
    topk_share: what it keeps, in units of the model's k.
    key_fit: share of the heads' logit variance that the index keys carry, 0 to 1.
    threshold_fit: R² of the thresholds' regression, 0 to 1.
    kl: KL(p || softmax(I)) in nats, the warm-up loss before its first step.
    """

    layer: int
    topk_share: float
    key_fit: float
    threshold_fit: float
    kl: float


class Observation(NamedTuple):
    """One calibration sequence as one layer sees it at R sampled queries, its tokens `rows_R`.

    q_RHD and k_GTD are float32, after RoPE and in `pair_order`; bare_q_RHD and bare_k_TGD as
    `Heads` has them; rotary: the tables of all its tokens, [1, T, R]; topk: what a query keeps.
    """

    topk: int
    rotary: RotaryTable
    rows_R: Tensor
    x_RC: Tensor
    bare_q_RHD: Tensor
    bare_k_TGD: Tensor
    q_RHD: Tensor
    k_GTD: Tensor
    theta_RH: Tensor


class _IndexHeads(NamedTuple):
    """The index queries of sampled queries and all index keys, float32."""

    q_RJE: Tensor
    k_TIE: Tensor


@torch.no_grad()
def inherit_gqa(
    model: PreTrainedModel,
    input_ids_BT: Tensor,
    topk: int,
    on_layer: Callable[[InheritedGqaLayer], None] = lambda _: None,
) -> list[InheritedGqaLayer]:
    """Set every indexer of a GQA DSA model in one dense pass over `input_ids_BT`; nothing else changes.

    Args:
        model: as `Family.from_dense` makes it.
        input_ids_BT: int64 token ids, B sequences of T tokens, no padding.
        topk: the k the thresholds are made for, times each layer's share; at most T / 4 is used.
        on_layer: called after each layer, for progress.

    Raises:
        ConfigError: a sequence too short to sample, or index heads that do not divide the attention heads.
        TrainingDivergedError: NaN in the model's activations.
    """
    dsa = DsaConfig.from_dict(model.config.dsa)
    report: list[InheritedGqaLayer] = []

    def fit(attention: Any, kwargs: dict, position_BT: Tensor) -> None:
        share = dsa.layer_topk(attention.layer_idx) / dsa.topk
        observations = observe(attention, *_given(attention, kwargs), topk * share, position_BT)
        report.append(fit_index(attention, observations)._replace(topk_share=share))
        _fit_coarse(attention, observations)
        on_layer(report[-1])

    read_densely(model, input_ids_BT, fit)
    return report


def fit_index(attention: Any, observations: Sequence[Observation]) -> InheritedGqaLayer:
    """Set one layer's index, but for a coarse level. Raises TrainingDivergedError as `inherit_gqa`."""
    cov_HFF = torch.stack([_pair_covariance(one, attention.scaling) for one in observations]).sum(0)
    n_groups = len(observations[0].k_GTD)
    # Many small steps: quicker on the CPU than on an accelerator.
    picked_GP, coef_HP2, key_fit = pick_pairs(cov_HFF.cpu(), attention.indexer.head_dim // 2, n_groups)
    _set_directions(attention, picked_GP, coef_HP2, observations[0].rotary[0].shape[-1])
    index = [_index_heads(attention, observation) for observation in observations]
    weight_CJ, bias_J, fit = _regressed_thresholds(attention, observations, index)
    _write(attention.indexer.shift_proj.weight, -weight_CJ.T)
    _write(attention.indexer.shift_proj.bias, -bias_J)
    kl = _set_scale(attention, observations, index)
    if not math.isfinite(kl):
        raise TrainingDivergedError(
            f"layer {attention.layer_idx} gives KL={kl} on the calibration text; check the model in float32"
        )
    return InheritedGqaLayer(attention.layer_idx, 1.0, key_fit, fit, kl)


@torch.no_grad()
def inherit_coarse_gqa(
    model: PreTrainedModel,
    input_ids_BT: Tensor,
    topk: int,
    on_layer: Callable[[int], None] = lambda _: None,
) -> None:
    """Set the coarse level of every indexer in one dense pass; otherwise as `inherit_gqa`."""
    done = 0
    dsa = DsaConfig.from_dict(model.config.dsa)

    def fit(attention: Any, kwargs: dict, position_BT: Tensor) -> None:
        nonlocal done
        layer_topk = topk * dsa.layer_topk(attention.layer_idx) / dsa.topk
        _fit_coarse(attention, observe(attention, *_given(attention, kwargs), layer_topk, position_BT))
        done += 1
        on_layer(done)

    read_densely(model, input_ids_BT, fit)


def _fit_coarse(attention: Any, observations: Sequence[Observation]) -> None:
    coarse = attention.indexer.coarse
    if coarse is None:
        return
    rotary = observations[0].rotary
    still_P = still_pairs(rotary, attention.head_dim // 2, context_of(attention.config))
    moments = []
    for one in observations:
        rows_R = one.rows_R[::PAIR_EVERY]
        k_GSD = one.k_GTD[:, : int(rows_R[-1]) + 1]
        queries = (one.q_RHD[::PAIR_EVERY], k_GSD, rows_R)
        moments.append(pair_moments(*queries, attention.softmax, one.topk, coarse.n_heads - 1, still_P))
    cpu = [Moments(*(part.cpu() for part in one)) for one in moments]
    write_coarse(attention, best_mix(cpu, still_P, coarse.width // 2), rotary[0].shape[-1])
    index = [_coarse_heads(attention, one) for one in observations]
    weight_CM, bias_M, _ = _regressed_thresholds(attention, observations, index)
    _write(coarse.w_shift, pad(-weight_CM.T, (0, 0, 0, 1)))
    _write(coarse.b_shift, pad(-bias_M, (0, 1), value=ALWAYS_OPEN))


def _coarse_heads(attention: Any, observation: Observation) -> _IndexHeads:
    """`_index_heads` of the coarse level, its mean head left out."""
    coarse, rows_R = attention.indexer.coarse, observation.rows_R
    cos_1TR, sin_1TR = observation.rotary
    of_rows = (observation.x_RC[None].to(coarse.wq.dtype), observation.bare_q_RHD[None])
    q_1RMN, _ = coarse.queries(*of_rows, cos_1TR[:, rows_R], sin_1TR[:, rows_R])
    k_1TN = round_index_keys(coarse.keys(observation.bare_k_TGD[None], cos_1TR, sin_1TR))
    return _IndexHeads(q_1RMN[0, :, :-1].float(), k_1TN[0, :, None].float())


def _given(attention: Any, kwargs: dict) -> tuple[Tensor, Heads]:
    return kwargs["hidden_states"], attention.heads(**kwargs)


def observe(
    attention: Any, x_BTC: Tensor, heads: Heads, topk: float, position_BT: Tensor
) -> list[Observation]:
    """What the layer would compute, with the threshold of every query that is asked.

    topk: what queries keep of the tokens that a text stands for.
    """
    tables = (table.expand(len(x_BTC), -1, -1).split(1) for table in heads.rotary)
    order_D = pair_order(attention.head_dim, heads.rotary[0].shape[-1]).to(x_BTC.device)
    found = []
    for position_T, x_TC, q_THD, k_TGD, *rotary in zip(
        position_BT, x_BTC, heads.q_BTHD, heads.k_BTGD, *tables, strict=True
    ):
        k, rows_R = asked_queries(topk, position_T)
        rows_R = rows_R.to(x_TC.device)
        q_RHD = apply_rope(q_THD[None, rows_R], *(table[:, rows_R] for table in rotary))[0, ..., order_D]
        k_TGD_turned = apply_rope(k_TGD[None], *rotary)[0, ..., order_D]
        turned = q_RHD.float(), k_TGD_turned.float().transpose(0, 1).contiguous()
        theta_RH = _thresholds(*turned, rows_R, attention.softmax, k)
        bare = x_TC[rows_R], q_THD[rows_R], k_TGD
        found.append(Observation(k, tuple(rotary), rows_R, *bare, *turned, theta_RH))
    return found


def _row_blocks(rows_R: Tensor) -> Iterator[tuple[slice, int]]:
    """Sampled queries that are looked at together, and the keys that the last of them sees."""
    for low in range(0, len(rows_R), ROWS_PER_BLOCK):
        some = slice(low, low + ROWS_PER_BLOCK)
        yield some, int(rows_R[some][-1]) + 1


def _thresholds(q_RHD: Tensor, k_GTD: Tensor, rows_R: Tensor, softmax: Softmax, topk: int) -> Tensor:
    """theta_RH = logsumexp of each head + log of the k-th largest mean probability, before any cap."""
    (scale, softcap, sinks_H), found = softmax, []
    for some, stop in _row_blocks(rows_R):
        logits_HRS = grouped_logits(q_RHD[some] * scale, k_GTD[:, :stop], softcap)
        prob_RS, norm_HR = mean_attention_of(hide_later(logits_HRS, rows_R[some]), sinks_H)
        tau_R = prob_RS.kthvalue(stop + 1 - topk).values.clamp_min(torch.finfo(prob_RS.dtype).tiny)
        found.append(uncapped(norm_HR + tau_R.log(), softcap).T)
    return torch.cat(found)


def _pair_covariance(observation: Observation, scale: float) -> Tensor:
    """cov_HFF of `pair_covariance`, keys weighted by min(1, exp((l - theta) / 2))."""
    rows_R, theta_RH = observation.rows_R[::PAIR_EVERY], observation.theta_RH[::PAIR_EVERY]
    q_RHD, k_GSD = observation.q_RHD[::PAIR_EVERY] * scale, observation.k_GTD[:, : int(rows_R[-1]) + 1]
    logits_HRS = hide_later(grouped_logits(q_RHD, k_GSD), rows_R)
    weight_HRS = quick_exp_(logits_HRS.sub_(theta_RH.T[..., None]).div_(2).clamp_max_(0))
    weight_HRS /= weight_HRS.sum(-1, keepdim=True)
    return pair_covariance(q_RHD, k_GSD, weight_HRS, rows_R)


def _set_directions(attention: Any, picked_GP: Tensor, coef_HP2: Tensor, rotary: int) -> None:
    """Write wk (a choice of the key's dims), wq (their queries times the coefficients) and rope_pairs."""
    indexer, (groups, n_pairs) = attention.indexer, picked_GP.shape
    heads, width, shared = len(coef_HP2), attention.head_dim, len(coef_HP2) // groups
    order_D, pooled = pair_order(width, rotary), heads // indexer.n_heads
    first_GP, second_GP = order_D[picked_GP], order_D[picked_GP + width // 2]
    slots_P, groups_G1 = torch.arange(n_pairs), torch.arange(groups)[:, None]
    wk_IEGD = torch.zeros(groups, 2 * n_pairs, groups, width)
    wk_IEGD[groups_G1, slots_P, groups_G1, first_GP] = 1
    wk_IEGD[groups_G1, slots_P + n_pairs, groups_G1, second_GP] = 1
    real_HP, imaginary_HP = (coef_HP2 * attention.scaling * (2 * n_pairs) ** 0.5 / pooled).unbind(-1)
    first_HP, second_HP = (dims_GP.repeat_interleave(shared, 0) for dims_GP in (first_GP, second_GP))
    heads_H1 = torch.arange(heads)[:, None]
    wq_JEHD = torch.zeros(indexer.n_heads, 2 * n_pairs, heads, width)
    wq_JEHD[heads_H1 // pooled, slots_P, heads_H1, first_HP] = real_HP
    wq_JEHD[heads_H1 // pooled, slots_P, heads_H1, second_HP] = imaginary_HP
    wq_JEHD[heads_H1 // pooled, slots_P + n_pairs, heads_H1, second_HP] = real_HP
    wq_JEHD[heads_H1 // pooled, slots_P + n_pairs, heads_H1, first_HP] = -imaginary_HP
    _write(indexer.wk.weight, wk_IEGD.flatten(2).flatten(0, 1))
    _write(indexer.wq.weight, wq_JEHD.flatten(2).flatten(0, 1))
    indexer.rope_pairs.copy_(picked_GP.clamp(max=rotary // 2))


def _index_heads(attention: Any, observation: Observation) -> _IndexHeads:
    """As the indexer makes them now; keys rounded as a cache keeps them."""
    indexer, rows_R, tables = attention.indexer, observation.rows_R, observation.rotary
    rows_rotation = indexer.rotation(*(table[:, rows_R] for table in tables))
    x_1RC = observation.x_RC[None].to(indexer.wq.weight.dtype)
    q_1RJE, _, _ = indexer.queries(x_1RC, observation.bare_q_RHD[None], rows_rotation)
    k_1TIE = round_index_keys(indexer.keys(observation.bare_k_TGD[None], indexer.rotation(*tables)))
    return _IndexHeads(q_1RJE[0].float(), k_1TIE[0].float())


def _regressed_thresholds(
    attention: Any, observations: Sequence[Observation], index: Sequence[_IndexHeads]
) -> tuple[Tensor, Tensor, float]:
    """`ridge` of the heads' thresholds on the hidden states."""
    targets = [_boundary_targets(*pair, attention.scaling) for pair in zip(observations, index, strict=True)]
    return ridge(torch.cat([one.x_RC for one in observations]), torch.cat(targets))


def _boundary_targets(observation: Observation, index: _IndexHeads, scale: float) -> Tensor:
    """Thresholds in units of the index logits, target_RJ: theta less what the dropped pairs add near it."""
    heads, index_scale = index.q_RJE.shape[1], index.q_RJE.shape[-1] ** -0.5
    # The mean logit of heads that share their keys is that of their mean query.
    q_RJD = observation.q_RHD.unflatten(1, (heads, -1)).mean(2) * scale
    theta_RJ = observation.theta_RH.unflatten(1, (heads, -1)).mean(2)
    q_RJE, k_ITE = index.q_RJE * index_scale, index.k_TIE.transpose(0, 1).contiguous()
    targets = []
    for some, stop in _row_blocks(observation.rows_R):
        own_JRS = grouped_logits(q_RJD[some], observation.k_GTD[:, :stop])
        missed_JRS = own_JRS - grouped_logits(q_RJE[some], k_ITE[:, :stop])
        hide_later(own_JRS, observation.rows_R[some])
        near_JRS = quick_exp_(own_JRS.sub_(theta_RJ[some].T[..., None]).abs_().div_(-2))
        amount_JR = near_JRS.sum(-1).clamp_min(1e-30)
        targets.append(theta_RJ[some] - (missed_JRS.mul_(near_JRS).sum(-1) / amount_JR).T)
    return torch.cat(targets)


def ridge(x_NC: Tensor, y_NJ: Tensor) -> tuple[Tensor, Tensor, float]:
    """weight_CJ, bias_J and R² of the ridge regression of y on x (penalty: RIDGE x mean variance)."""
    x64_NC, y64_NJ = x_NC.double(), y_NJ.double()
    x_mean_C, y_mean_J = x64_NC.mean(0), y64_NJ.mean(0)
    x0_NC, y0_NJ = x64_NC - x_mean_C, y64_NJ - y_mean_J
    gram_CC = x0_NC.T @ x0_NC
    penalty = RIDGE * gram_CC.diagonal().mean().clamp_min(1e-30)
    weight_CJ = torch.linalg.solve(gram_CC + penalty * torch.eye(len(gram_CC)).to(gram_CC), x0_NC.T @ y0_NJ)
    left = ((x0_NC @ weight_CJ - y0_NJ) ** 2).sum() / (y0_NJ**2).sum().clamp_min(1e-30)
    return weight_CJ.float(), (y_mean_J - x_mean_C @ weight_CJ).float(), float(1 - left)


def _set_scale(attention: Any, observations: Sequence[Observation], index: Sequence[_IndexHeads]) -> float:
    """Make all head weights the number with the least KL, which is returned (nats)."""
    indexer = attention.indexer
    kl_NZ = torch.stack(
        [_kl_per_scale(attention, *pair) for pair in zip(observations, index, strict=True)]
    ).cpu()
    kl_Z = kl_NZ.mean(0)
    best = int(kl_Z.argmin())
    _write(indexer.weights_proj.weight, torch.zeros(()))
    _write(indexer.weights_proj.bias, LOG_SCALES[best].exp())
    return float(kl_Z[best])


def _kl_per_scale(attention: Any, observation: Observation, index: _IndexHeads) -> Tensor:
    """kl_Z of some queries, where all head weights are exp(LOG_SCALES)."""
    some = torch.arange(0, len(observation.rows_R), PAIR_EVERY)
    scores_RS = _unweighted_scores(attention, observation, index, some)
    p_RS, _ = mean_attention_of(logits_of(attention, observation, some), attention.softmax[2])
    entropy = torch.special.entr(p_RS).sum(-1).mean()
    return _cross_entropies(p_RS, scores_RS) - entropy


def ranking_scores(attention: Any, observation: Observation, some_R: Tensor) -> Tensor:
    """scores_RS of the index as it is now, in any positive unit, of some of the observed queries; keys up to
    the last of them, -inf at those after each.
    """
    return _unweighted_scores(attention, observation, _index_heads(attention, observation), some_R)


def logits_of(attention: Any, observation: Observation, some_R: Tensor) -> Tensor:
    """logits_HRS of the model's own attention, otherwise as `ranking_scores`."""
    rows_R, (scale, softcap, _) = observation.rows_R[some_R], attention.softmax
    k_GSD = observation.k_GTD[:, : int(rows_R[-1]) + 1]
    return hide_later(grouped_logits(observation.q_RHD[some_R] * scale, k_GSD, softcap), rows_R)


def _unweighted_scores(
    attention: Any, observation: Observation, index: _IndexHeads, some_R: Tensor
) -> Tensor:
    rows_R, shift = observation.rows_R[some_R], attention.indexer.shift_proj
    q_1RJE, k_1SIE = index.q_RJE[None, some_R], index.k_TIE[None, : int(rows_R[-1]) + 1]
    b_1RJ = shift(observation.x_RC[None, some_R].to(shift.weight.dtype)).float()
    ends = (torch.zeros_like(rows_R)[None], rows_R[None] + 1)
    scores_RS = index_scores(q_1RJE, k_1SIE, torch.ones_like(b_1RJ), b_1RJ, *ends)[0]
    return scores_RS.masked_fill(later_keys(rows_R), -torch.inf)


def _cross_entropies(p_RS: Tensor, scores_RS: Tensor) -> Tensor:
    """[Z], of p and softmax(scale x scores), mean over the queries; each p adds up to 1."""
    below_RS = scores_RS - scores_RS.amax(-1, keepdim=True)
    mean_R = (p_RS * below_RS).masked_fill_(below_RS == -torch.inf, 0).sum(-1)
    scales = LOG_SCALES.exp().tolist()
    return torch.stack(
        [(quick_exp_(below_RS * scale).sum(-1).log() - scale * mean_R).mean() for scale in scales]
    )


def _write(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value.to(parameter.dtype).expand_as(parameter))
