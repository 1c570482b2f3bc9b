"""Build the indexer of a GQA model from the model's own heads, in closed form, from some calibration text.

Per layer, with l[t,s] a head's own logit, Z[t] = logsumexp_s l[t,s] and tau[t] the k-th largest probability
(mean over heads) of query t:

1. Threshold. A head matters for token s once its probability exp(l - Z) passes tau, so its ReLU opens at
   theta = Z + log tau. A ridge regression of theta on the hidden state gives the shift b = -theta.
2. Directions. l is a sum over rotary pairs. Pairs are picked greedily, each time the one that explains most
   of what is left of l's variance (over keys, weighted towards those near or above theta), with the complex
   coefficient that explains most. The index key is the model's own key on those pairs, the index query the
   model's own query times the coefficients; every pair keeps its own rotary frequency.
3. Offset. What the dropped pairs add to l on average near theta is moved into the threshold.
4. Scale. All head weights are one number per layer, for which KL(p || softmax(I)) is least.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fulmen.config import DsaConfig
from fulmen.errors import ConfigError, TrainingDivergedError
from fulmen.modeling.lengths import LENGTH_OVER_TOPK
from fulmen.modeling.selectors import DenseSelector, dsa_attentions, use_selector
from fulmen.ops.common.index_keys import round_index_keys
from fulmen.ops.common.rope import apply_rope
from fulmen.ops.scores import index_scores

# Queries of a sequence that the thresholds are fitted on (hidden sizes want many), evenly over log t so
# that short pasts count too; every eighth of them where all pairs of dims are formed.
THRESHOLD_ROWS = 384
PAIR_EVERY = 8
ROWS_PER_BLOCK = 32
# Queries whose weighted keys are alive at once.
PAIR_BLOCK = 8
RIDGE = 1e-2
LOG_SCALES = torch.arange(-6.0, 3.0, 0.25)
SHORTEST_SEQUENCE = 16


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


class _Observation(NamedTuple):
    """One calibration sequence as one layer sees it; q and k are after RoPE, R sampled queries `rows_R`."""

    x_TC: Tensor
    q_THD: Tensor
    k_TGD: Tensor
    rows_R: Tensor
    theta_RH: Tensor


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
    length = input_ids_BT.shape[1]
    if length < SHORTEST_SEQUENCE:
        raise ConfigError(
            f"calibration length {length} is too short; use at least {SHORTEST_SEQUENCE} tokens"
        )
    dsa = DsaConfig.from_dict(model.config.dsa)
    report: list[InheritedGqaLayer] = []

    def fit(attention: Any, _: Any, kwargs: dict) -> None:
        share = dsa.layer_topk(attention.layer_idx) / dsa.topk
        # A shorter sequence has no boundary at k to learn: that of a smaller k is learned instead.
        layer_topk = min(max(1, round(topk * share)), length // LENGTH_OVER_TOPK)
        report.append(_fit_layer(attention, kwargs, layer_topk)._replace(topk_share=share))
        on_layer(report[-1])

    hooks = [layer.register_forward_pre_hook(fit, with_kwargs=True) for layer in dsa_attentions(model)]
    try:
        with use_selector(model, DenseSelector()):
            model.base_model(input_ids_BT, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return report


def _fit_layer(attention: Any, kwargs: dict, topk: int) -> InheritedGqaLayer:
    observations = _observe(attention, kwargs, topk)
    cov_HFF = sum((_pair_covariance(w, attention.scaling) for w in observations), start=torch.zeros(()))
    picked_GP, coef_HP2, key_fit = pick_pairs(
        cov_HFF, attention.indexer.head_dim // 2, len(observations[0].k_TGD[0])
    )
    rotary = kwargs["position_embeddings"]
    _set_directions(attention, picked_GP, coef_HP2, rotary[0].shape[-1])
    targets = [_boundary_targets(attention, observation, rotary) for observation in observations]
    x_NC = torch.cat([observation.x_TC[observation.rows_R] for observation in observations])
    weight_CJ, bias_J, fit = ridge(x_NC, torch.cat(targets))
    _write(attention.indexer.shift_proj.weight, -weight_CJ.T)
    _write(attention.indexer.shift_proj.bias, -bias_J)
    kl = _set_scale(attention, observations, rotary)
    if not math.isfinite(kl):
        raise TrainingDivergedError(
            f"layer {attention.layer_idx} gives KL={kl} on the calibration text; check the model in float32"
        )
    return InheritedGqaLayer(attention.layer_idx, 1.0, key_fit, fit, kl)


def _observe(attention: Any, kwargs: dict, topk: int) -> list[_Observation]:
    """What the layer would compute, with the threshold of every sampled query."""
    x_BTC, (cos_BTR, sin_BTR) = kwargs["hidden_states"], kwargs["position_embeddings"]
    q_BTHD, k_BTGD, _ = attention.project(x_BTC)
    order_D = pair_order(attention.head_dim, cos_BTR.shape[-1])
    q_BTHD = apply_rope(q_BTHD, cos_BTR, sin_BTR)[..., order_D].float()
    k_BTGD = apply_rope(k_BTGD, cos_BTR, sin_BTR)[..., order_D].float()
    rows_R = sampled_queries(topk, x_BTC.shape[1]).to(x_BTC.device)
    observations = []
    for x_TC, q_THD, k_TGD in zip(x_BTC.float(), q_BTHD, k_BTGD, strict=True):
        blocks = [
            _thresholds(own_logits(q_THD, k_TGD, rows, attention.scaling), topk)
            for rows in rows_R.split(ROWS_PER_BLOCK)
        ]
        observations.append(_Observation(x_TC, q_THD, k_TGD, rows_R, torch.cat(blocks)))
    return observations


def sampled_queries(first: int, stop: int) -> Tensor:
    """At most `THRESHOLD_ROWS` ascending positions first <= t < stop, evenly spread over log t."""
    points_R = (torch.arange(THRESHOLD_ROWS) + 0.5) / THRESHOLD_ROWS
    rows_R = (first * (stop / first) ** points_R.double()).long()
    return rows_R.clamp(first, stop - 1).unique()


def pair_order(head_dim: int, rotary: int) -> Tensor:
    """Dims of a head so that p and p + D/2 form a pair: rotary pairs first, the others then."""
    dims_D = torch.arange(head_dim)
    half, rest = rotary // 2, (head_dim - rotary) // 2
    rotated, still = dims_D[:rotary], dims_D[rotary:]
    return torch.cat((rotated[:half], still[:rest], rotated[half:], still[rest:]))


def own_logits(q_THD: Tensor, k_SGD: Tensor, rows_R: Tensor, scale: float) -> Tensor:
    """The model's own logits_HRS of ascending queries, -inf at later keys; S ends with the last query."""
    k_SGD = k_SGD[: int(rows_R[-1]) + 1]
    groups = k_SGD.shape[1]
    q_GMD = q_THD[rows_R].unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)
    logits_GMS = torch.bmm(q_GMD, k_SGD.permute(1, 2, 0)) * scale
    logits_HRS = logits_GMS.unflatten(1, (-1, len(rows_R))).flatten(0, 1)
    return logits_HRS.masked_fill_(_later(rows_R), -torch.inf)


def _later(rows_R: Tensor) -> Tensor:
    """bool [R, S]: keys after each query; S ends with the last row."""
    return torch.arange(int(rows_R[-1]) + 1, device=rows_R.device) > rows_R[:, None]


def _thresholds(logits_HRS: Tensor, topk: int) -> Tensor:
    """theta_RH = logsumexp of each head + log of the k-th largest mean probability."""
    norm_HR = logits_HRS.logsumexp(-1)
    prob_RS = (logits_HRS - norm_HR[..., None]).exp_().mean(0)
    tau_R = prob_RS.topk(topk, dim=-1).values[:, -1].clamp_min(torch.finfo(prob_RS.dtype).tiny)
    return (norm_HR + tau_R.log()).T


def _pair_covariance(observation: _Observation, scale: float) -> Tensor:
    """cov_HFF of the contributions of all D/2 pairs to a head's logits, F = D: first their real, then their
    imaginary parts; over keys, centred per query, weighted by min(1, exp((l - theta) / 2))."""
    rows_R, theta_RH = observation.rows_R[::PAIR_EVERY], observation.theta_RH[::PAIR_EVERY]
    logits_HRS = own_logits(observation.q_THD, observation.k_TGD, rows_R, scale)
    weight_HRS = ((logits_HRS - theta_RH.T[..., None]) / 2).clamp_max_(0).exp_()
    weight_HRS /= weight_HRS.sum(-1, keepdim=True)
    shared = observation.q_THD.shape[1] // observation.k_TGD.shape[1]
    k_SGD = observation.k_TGD[: weight_HRS.shape[-1]]
    return torch.stack(
        [
            _weighted_covariance(observation.q_THD[rows_R, head] * scale, k_SGD[:, head // shared], weight_RS)
            for head, weight_RS in enumerate(weight_HRS)
        ]
    )


def pair_matrices(q_RD: Tensor) -> Tensor:
    """[R, F, D]: times a key, Re and Im of q conj(k) per pair of dims p, p + D/2; all Re add up to q . k."""
    real_RPP, imaginary_RPP = (torch.diag_embed(half_RP) for half_RP in q_RD.chunk(2, -1))
    rows = (real_RPP, imaginary_RPP), (imaginary_RPP, -real_RPP)
    return torch.cat([torch.cat(row, -1) for row in rows], -2)


def _weighted_covariance(q_RD: Tensor, k_SD: Tensor, weight_RS: Tensor) -> Tensor:
    """Of the contributions, through the keys' own covariance: D x D a query, not S x D."""
    total_FF = torch.zeros((), dtype=torch.float64)
    for some in torch.arange(len(q_RD)).split(PAIR_BLOCK):
        mean_RD = weight_RS[some] @ k_SD
        square_RDD = k_SD.T @ (weight_RS[some, :, None] * k_SD)
        keys_RDD = square_RDD - mean_RD[:, :, None] * mean_RD[:, None]
        pairs_RFD = pair_matrices(q_RD[some])
        total_FF = total_FF + (pairs_RFD @ keys_RDD @ pairs_RFD.mT).sum(0).double()
    return total_FF


def pick_pairs(cov_HFF: Tensor, n_pairs: int, n_groups: int) -> tuple[Tensor, Tensor, float]:
    """Greedy forward selection of pairs, shared by the heads of a group.

    Args:
        cov_HFF: as `_pair_covariance`, float64.
        n_pairs: pairs per group (P).
        n_groups: key heads (G).

    Returns:
        picked_GP (int64), coef_HP2 (real and imaginary factor of each pair's query), and the share of the
        logits' variance explained.
    """
    heads, width, _ = cov_HFF.shape
    half, shared = width // 2, heads // n_groups
    jitter_HFF = 1e-9 * cov_HFF.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] * torch.eye(width).double()
    full_HFF = cov_HFF + jitter_HFF
    total_H = full_HFF[:, :half, :half].sum((1, 2))
    picked, coefs, explained = [], [], 0.0
    for group in range(n_groups):
        mine = slice(group * shared, (group + 1) * shared)
        pairs_P = _forward_selection(full_HFF[mine], n_pairs)
        dims = torch.cat((pairs_P, pairs_P + half))
        kept_HKK, cross_HK = full_HFF[mine][:, dims][..., dims], full_HFF[mine][:, dims, :half].sum(-1)
        coef_HK = torch.linalg.solve(kept_HKK, cross_HK)
        explained += float((coef_HK * cross_HK).sum())
        picked.append(pairs_P)
        coefs.append(coef_HK.unflatten(-1, (2, n_pairs)).transpose(1, 2))
    return torch.stack(picked), torch.cat(coefs).float(), explained / float(total_H.sum())


def _forward_selection(cov_HFF: Tensor, n_pairs: int) -> Tensor:
    """Each step takes the pair that explains most, then regresses it out of all the others."""
    half = cov_HFF.shape[-1] // 2
    left_HFF, floor_HFF = cov_HFF.clone(), cov_HFF.diagonal(dim1=1, dim2=2)
    pairs = torch.arange(half)
    free = torch.ones(half, dtype=torch.bool)
    chosen: list[int] = []
    for _ in range(n_pairs):
        target_HF = left_HFF[..., :half].sum(-1)
        block_HP22 = torch.stack(
            [
                torch.stack([left_HFF[:, pairs + a * half, pairs + b * half] for b in (0, 1)], -1)
                for a in (0, 1)
            ],
            -2,
        )
        # Chosen pairs have nothing left; without the floor their blocks would be singular.
        floor_HP2 = torch.stack((floor_HFF[:, :half], floor_HFF[:, half:]), -1) * 1e-9
        aim_HP2 = torch.stack((target_HF[:, :half], target_HF[:, half:]), -1)
        solved_HP2 = torch.linalg.solve(block_HP22 + torch.diag_embed(floor_HP2 + 1e-30), aim_HP2)
        gain_P = (solved_HP2 * aim_HP2).sum((0, 2)).masked_fill(~free, -torch.inf)
        best = int(gain_P.argmax())
        chosen.append(best)
        free[best] = False
        dims = [best, best + half]
        column_HF2 = left_HFF[:, :, dims]
        inner_H22 = left_HFF[:, dims][..., dims] + torch.diag_embed(floor_HFF[:, dims] * 1e-9 + 1e-30)
        left_HFF = left_HFF - column_HF2 @ torch.linalg.solve(inner_H22, column_HF2.transpose(1, 2))
    return torch.tensor(chosen)


def _set_directions(attention: Any, picked_GP: Tensor, coef_HP2: Tensor, rotary: int) -> None:
    """Write wk (a choice of the key's dims), wq (their queries times the coefficients) and rope_pairs."""
    indexer, groups = attention.indexer, len(picked_GP)
    heads, n_pairs, _ = coef_HP2.shape
    width, order = attention.head_dim, pair_order(attention.head_dim, rotary).tolist()
    per_group, pooled = indexer.n_heads // groups, heads // indexer.n_heads
    wk_IEGD = torch.zeros(groups, 2 * n_pairs, groups, width)
    wq_JEHD = torch.zeros(indexer.n_heads, 2 * n_pairs, heads, width)
    unit = attention.scaling * (2 * n_pairs) ** 0.5 / pooled
    for group, pairs_P in enumerate(picked_GP):
        for slot, pair in enumerate(pairs_P.tolist()):
            first, second = order[pair], order[pair + width // 2]
            wk_IEGD[group, slot, group, first] = 1
            wk_IEGD[group, slot + n_pairs, group, second] = 1
            for index_head in range(group * per_group, (group + 1) * per_group):
                for head in range(index_head * pooled, (index_head + 1) * pooled):
                    real, imaginary = (coef_HP2[head, slot] * unit).tolist()
                    wq_JEHD[index_head, slot, head, [first, second]] = torch.tensor([real, imaginary])
                    wq_JEHD[index_head, slot + n_pairs, head, [second, first]] = torch.tensor(
                        [real, -imaginary]
                    )
    _write(indexer.wk.weight, wk_IEGD.flatten(2).flatten(0, 1))
    _write(indexer.wq.weight, wq_JEHD.flatten(2).flatten(0, 1))
    indexer.rope_pairs.copy_(picked_GP.clamp(max=rotary // 2))


def _boundary_targets(attention: Any, observation: _Observation, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Thresholds in units of the index logits, target_RJ: theta less what the dropped pairs add near it."""
    q_TJE, k_SIE = _index_heads(attention, observation, rotary)
    targets = []
    for rows, theta_RH in zip(
        observation.rows_R.split(ROWS_PER_BLOCK), observation.theta_RH.split(ROWS_PER_BLOCK), strict=True
    ):
        own_HRS = own_logits(observation.q_THD, observation.k_TGD, rows, attention.scaling)
        index_JRS = own_logits(q_TJE, k_SIE, rows, q_TJE.shape[-1] ** -0.5)
        pooled = len(own_HRS) // len(index_JRS)
        own_JRS, theta_RJ = (
            own_HRS.unflatten(0, (-1, pooled)).mean(1),
            theta_RH.unflatten(1, (-1, pooled)).mean(2),
        )
        near_JRS = (own_JRS - theta_RJ.T[..., None]).abs_().div_(-2).exp_()
        missed_JRS = (own_JRS - index_JRS).masked_fill_(_later(rows), 0)
        targets.append(theta_RJ - ((missed_JRS * near_JRS).sum(-1) / near_JRS.sum(-1).clamp_min(1e-30)).T)
    return torch.cat(targets)


def _index_heads(
    attention: Any, observation: _Observation, rotary: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """q_TJE and k_TIE as the indexer makes them now."""
    index = _index_inputs(attention, observation, rotary)
    return index.q_BTJE[0], index.k_BTIE[0]


def _index_inputs(attention: Any, observation: _Observation, rotary: tuple[Tensor, Tensor]) -> Any:
    x_1TC = observation.x_TC[None].to(attention.indexer.wq.weight.dtype)
    q_1THD, k_1TGD, _ = attention.project(x_1TC)
    cos_1TR, sin_1TR = (table[:1] for table in rotary)
    index = attention.indexer(x_1TC, q_1THD, k_1TGD, cos_1TR, sin_1TR)
    index = index._replace(k_BTIE=round_index_keys(index.k_BTIE))
    return type(index)(*(tensor.float() for tensor in index))


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


def _set_scale(attention: Any, observations: list[_Observation], rotary: tuple[Tensor, Tensor]) -> float:
    """Make all head weights the number with the least KL, which is returned (nats)."""
    indexer = attention.indexer
    _write(indexer.weights_proj.weight, torch.zeros(()))
    _write(indexer.weights_proj.bias, torch.ones(()))
    kl_Z = sum(
        (_kl_per_scale(attention, observation, rotary) for observation in observations), start=torch.zeros(())
    )
    best = int(kl_Z.argmin())
    _write(indexer.weights_proj.bias, LOG_SCALES[best].exp())
    return float(kl_Z[best]) / len(observations)


def _kl_per_scale(attention: Any, observation: _Observation, rotary: tuple[Tensor, Tensor]) -> Tensor:
    rows_R = observation.rows_R[::PAIR_EVERY]
    index = _index_inputs(attention, observation, rotary)
    q, w, b = (tensor[:, rows_R] for tensor in (index.q_BTJE, index.w_BTJ, index.b_BTJ))
    k = index.k_BTIE[:, : int(rows_R[-1]) + 1]
    scores_RS = index_scores(q, k, w, b, torch.zeros_like(rows_R)[None], rows_R[None] + 1)[0]
    logits_HRS = own_logits(observation.q_THD, observation.k_TGD, rows_R, attention.scaling)
    p_RS = logits_HRS.softmax(-1).mean(0)
    entropy = torch.special.entr(p_RS).sum(-1).mean()
    cross = partial(_cross_entropy, p_RS, scores_RS, _later(rows_R))
    return torch.stack([cross(float(log_scale.exp())) - entropy for log_scale in LOG_SCALES])


def _cross_entropy(p_RS: Tensor, scores_RS: Tensor, later_RS: Tensor, scale: float) -> Tensor:
    log_q_RS = (scores_RS * scale).log_softmax(-1).masked_fill_(later_RS, 0)
    return -(p_RS * log_q_RS).sum(-1).mean()


def _write(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value.to(parameter.dtype).expand_as(parameter))
