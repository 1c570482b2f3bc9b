"""Build the coarse level of a GQA model's index in closed form: a PCA over frequencies and key heads.

A head's logit is l[t,s] = Re sum_p q[t,p] conj(k[s,g,p]), g its key head and p the rotary pairs, taken as
complex numbers. All heads read one coarse key of N/2 numbers, each a mix over g at one frequency: a mix turns
as its parts do. With a[g,p] = sum E |q[p]|^2 over the heads of g, and C_p the covariance of the keys,
weighted towards those near or above the boundary at k, the mixes that carry most of all logits are the
eigenvectors v of a^1/2 C a^1/2 with the largest eigenvalues over all frequencies: the key is v^H a^1/2 k, a
head's query v[g]* a[g]^-1/2 q. Neighbouring heads of a key head may be pooled to their mean.

Thresholds are fitted as the indexer's are (`inherit.py`), against these logits: without them a key that one
head wants is lost among those that all heads want a little. Where fewer keys than there are candidates pass
any, the mean of all heads chooses the others.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fulmen.modeling.gqa.own_logits import Softmax, grouped_logits, hide_later, mean_attention_of
from fulmen.modeling.gqa.rotary_pairs import pair_order

# The mean head's weight beside heads with a threshold, of which it only breaks ties; and its shift, above
# which its ReLU is always open.
MEAN_WEIGHT, ALWAYS_OPEN = 1 / 32, 8.0


class CoarseMix(NamedTuple):
    """Which frequency each complex number of the coarse head has, and the weights of the key heads in it."""

    pairs_N: Tensor
    key_NG: Tensor
    query_NG: Tensor


class Moments(NamedTuple):
    """Second moments by rotary pair, added over queries: of the queries, and the keys' covariance."""

    query_PG: Tensor
    key_PGG: Tensor


def pair_moments(
    q_RHD: Tensor, k_GSD: Tensor, rows_R: Tensor, softmax: Softmax, topk: int, n_heads: int
) -> Moments:
    """Of some ascending queries, pooled to `n_heads`, and the keys that they see; dims in `pair_order`, after
    RoPE, float32.
    """
    scale, softcap, sinks_H = softmax
    logits_HRS = hide_later(grouped_logits(q_RHD * scale, k_GSD, softcap), rows_R)
    prob_RS, _ = mean_attention_of(logits_HRS, sinks_H)
    boundary_R1 = prob_RS.topk(min(topk, prob_RS.shape[1]), -1).values[:, -1:].clamp_min(1e-30)
    weight_RS = (prob_RS / boundary_R1).clamp(max=1).sqrt()
    weight_RS /= weight_RS.sum(-1, keepdim=True)
    k_PGS = _complex(k_GSD).permute(2, 0, 1).contiguous()
    mean_PGR = k_PGS @ weight_RS.T.to(k_PGS.dtype)
    squares_PGG = (k_PGS * weight_RS.sum(0)) @ k_PGS.mH
    q_RMP = _complex(q_RHD.unflatten(1, (n_heads, -1)).mean(2))
    query_PG = q_RMP.abs().square().unflatten(1, (len(k_GSD), -1)).sum((0, 2)).T
    return Moments(query_PG, squares_PGG - mean_PGR @ mean_PGR.mH)


def best_mix(moments: list[Moments], n: int) -> CoarseMix:
    """The `n` complex numbers that carry most."""
    query_PG, key_PGG = (torch.stack(part).sum(0) for part in zip(*moments, strict=True))
    floor = 1e-9 * query_PG.amax().clamp_min(1e-30)
    root_PG = query_PG.clamp_min(float(floor)).double().sqrt()
    weighted_PGG = root_PG[..., None] * key_PGG.to(torch.complex128) * root_PG[:, None]
    carried_PG, mixes_PGG = torch.linalg.eigh(weighted_PGG)
    best_N = carried_PG.flatten().topk(n).indices
    pairs_N, mix_N = best_N // carried_PG.shape[1], best_N % carried_PG.shape[1]
    # Queries and keys of one size, so that 8 bits suit both.
    size_N1 = carried_PG[pairs_N, mix_N].clamp_min(1e-30)[:, None] ** 0.25
    key_NG = (root_PG[..., None] * mixes_PGG)[pairs_N, :, mix_N] / size_N1
    query_NG = (mixes_PGG / root_PG[..., None])[pairs_N, :, mix_N] * size_N1
    return CoarseMix(pairs_N, key_NG, query_NG)


def write_coarse(attention: Any, mix: CoarseMix, rotary: int) -> None:
    """Write wq, wk and rope_pairs of the attention's coarse level; its logits are E^-1/2 q . k, as all index
    logits are.
    """
    coarse, width = attention.indexer.coarse, attention.head_dim
    order_D, n = pair_order(width, rotary), len(mix.pairs_N)
    dims = (order_D[mix.pairs_N], order_D[mix.pairs_N + width // 2])
    groups, heads = mix.key_NG.shape[1], coarse.wq.shape[1] // width
    n_heads = coarse.n_heads - 1
    pooled = heads // n_heads
    key_NGD = _mixing(mix.key_NG, dims, width)
    query_NGD = _mixing(mix.query_NG, dims, width) * (attention.scaling / pooled * (2 * n) ** 0.5)
    query_MNHD = torch.zeros(n_heads, 2 * n, heads, width, dtype=query_NGD.dtype)
    heads_H = torch.arange(heads)
    query_MNHD[heads_H // pooled, :, heads_H] = query_NGD[:, heads_H * groups // heads].transpose(0, 1)
    coarse.wk.copy_(key_NGD.flatten(1))
    query_MNHD = torch.cat((query_MNHD, MEAN_WEIGHT * query_MNHD.mean(0, keepdim=True)))
    coarse.wq.copy_(query_MNHD.flatten(2).flatten(0, 1))
    coarse.rope_pairs.copy_(mix.pairs_N.clamp(max=rotary // 2))


def _mixing(mix_NG: Tensor, dims: tuple[Tensor, Tensor], width: int) -> Tensor:
    """[2 N, G, D]: the real, then the imaginary parts of sum_g conj(mix) x, x the numbers at `dims`."""
    n, groups = mix_NG.shape
    weights = torch.zeros(2, n, groups, width, dtype=torch.float64)
    real_NG, imaginary_NG = mix_NG.real, mix_NG.imag
    rows_N1, groups_G = torch.arange(n)[:, None], torch.arange(groups)
    first_N1, second_N1 = (some_N[:, None] for some_N in dims)
    weights[0, rows_N1, groups_G, first_N1] = real_NG
    weights[0, rows_N1, groups_G, second_N1] = imaginary_NG
    weights[1, rows_N1, groups_G, second_N1] = real_NG
    weights[1, rows_N1, groups_G, first_N1] = -imaginary_NG
    return weights.flatten(0, 1)


def _complex(x: Tensor) -> Tensor:
    """Dims p and p + D/2 as one complex number."""
    return torch.complex(*x.chunk(2, -1))
