"""Build the coarse level of a GQA model's index in closed form: a PCA over frequencies and key heads.

A head's logit is l[t,s] = Re sum_p q[t,p] conj(k[s,g,p]), g its key head and p the rotary pairs, taken as
complex numbers. All heads read one coarse key of N numbers. Which mixes of a key's numbers turn as one?

- Of pairs that turn, those of one frequency, over g: as complex numbers, a mix turns as its parts do.
- Pairs that hardly turn within the model's context are still: any of their numbers mix, real and imaginary
  parts apart, over g and over frequencies. What a key is about, not where it stands, is mostly in these.

With A the second moment of a key head's queries, and C the covariance of the keys, weighted towards those
near or above the boundary at k, the mixes that carry most of all logits are the eigenvectors v of
A^1/2 C A^1/2 with the largest eigenvalues: the key is v^H A^1/2 k, a head's query v[g]* A^-1/2 q. (Of pairs
that turn, A is a number for each g and p.) Neighbouring heads of a key head may be pooled to their mean.

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
# A pair that turns by no more than this within the context is still.
STILL_RADIANS = 1.0
LEAST_SHARE = 1e-9


class CoarseMix(NamedTuple):
    """The U = N/2 pairs of a coarse key, and what each of their two numbers is made of; float64.

    Attributes:
        carried_U: how much of all logits each pair carries.
        turns_U: the rotary pair whose angle turns it, D/2: none.
        key_U2GD, query_U2GD: weights of the key heads' numbers and of a head's query, dims in `pair_order`.
    """

    carried_U: Tensor
    turns_U: Tensor
    key_U2GD: Tensor
    query_U2GD: Tensor


class Moments(NamedTuple):
    """Second moments, added over queries: of these, and the keys' covariance. Of all pairs, as complex
    numbers; and of the F numbers of a head's still pairs, E = G F those of all key heads.
    """

    query_PG: Tensor
    key_PGG: Tensor
    query_GFF: Tensor
    key_EE: Tensor


def still_pairs(rotary: tuple[Tensor, Tensor], n_pairs: int, context: int | None) -> Tensor:
    """bool still_P: whether a pair, in `pair_order`, turns by `STILL_RADIANS` at most within the context.

    rotary: cos_BTR and sin_BTR of at least two tokens, from the first on; where the model does not say its
    context, theirs counts.
    """
    sin_BTR, length = rotary[1], context or rotary[1].shape[1]
    step_P = sin_BTR[0, 1, : sin_BTR.shape[-1] // 2].double().abs().clamp(max=1).asin()
    unturned = step_P.new_ones(n_pairs - len(step_P)).bool()
    return torch.cat((step_P * length <= STILL_RADIANS, unturned)).cpu()


def pair_moments(
    q_RHD: Tensor, k_GSD: Tensor, rows_R: Tensor, softmax: Softmax, topk: int, n_heads: int, still_P: Tensor
) -> Moments:
    """Of some ascending queries, pooled to `n_heads`, and the keys that they see; dims in `pair_order`, after
    RoPE, float32.
    """
    weight_RS = _boundary_weights(q_RHD, k_GSD, rows_R, softmax, topk)
    q_RGMD = q_RHD.unflatten(1, (n_heads, -1)).mean(2).unflatten(1, (len(k_GSD), -1))
    query_PG = _complex(q_RGMD).abs().square().sum((0, 2)).T
    key_PGG = _covariance(_complex(k_GSD).permute(2, 1, 0), weight_RS)
    numbers_F = torch.cat((still_P, still_P)).nonzero()[:, 0].to(q_RHD.device)
    query_RGMF, key_SE = q_RGMD[..., numbers_F], k_GSD[..., numbers_F].transpose(0, 1).flatten(1)
    query_GFF = torch.einsum("rgmf,rgme->gfe", query_RGMF, query_RGMF)
    return Moments(query_PG, key_PGG, query_GFF, _covariance(key_SE, weight_RS))


def _boundary_weights(q_RHD: Tensor, k_GSD: Tensor, rows_R: Tensor, softmax: Softmax, topk: int) -> Tensor:
    """weight_RS of keys near or above the boundary at k, of sum 1 for each query."""
    scale, softcap, sinks_H = softmax
    logits_HRS = hide_later(grouped_logits(q_RHD * scale, k_GSD, softcap), rows_R)
    prob_RS, _ = mean_attention_of(logits_HRS, sinks_H)
    boundary_R1 = prob_RS.topk(min(topk, prob_RS.shape[1]), -1).values[:, -1:].clamp_min(1e-30)
    weight_RS = (prob_RS / boundary_R1).clamp(max=1).sqrt()
    return weight_RS / weight_RS.sum(-1, keepdim=True)


def _covariance(key_SX: Tensor, weight_RS: Tensor) -> Tensor:
    """[..., X, X] of `[..., S, X]`: about each query's own mean, added over queries."""
    mean_RX = weight_RS.to(key_SX.dtype) @ key_SX
    return (key_SX * weight_RS.sum(0)[:, None]).mT @ key_SX.conj() - mean_RX.mT @ mean_RX.conj()


def best_mix(moments: list[Moments], still_P: Tensor, n: int) -> CoarseMix:
    """The `n` pairs that carry most."""
    query_PG, key_PGG, query_GFF, key_EE = (torch.stack(part).sum(0) for part in zip(*moments, strict=True))
    found = (_turning_mix(query_PG, key_PGG, still_P), _still_mix(query_GFF, key_EE, still_P))
    best_U = torch.cat([mix.carried_U for mix in found]).topk(n).indices
    return CoarseMix(*(torch.cat(part)[best_U] for part in zip(*found, strict=True)))


def _turning_mix(query_PG: Tensor, key_PGG: Tensor, still_P: Tensor) -> CoarseMix:
    """All mixes of one frequency, of pairs that are not still."""
    turning_P = (~still_P).nonzero()[:, 0]
    floor = LEAST_SHARE * float(query_PG.amax().clamp_min(1e-30))
    root_PG = query_PG[turning_P].clamp_min(floor).double().sqrt()
    weighted_PGG = root_PG[..., None] * key_PGG[turning_P].to(torch.complex128) * root_PG[:, None]
    carried_PG, mixes_PGG = torch.linalg.eigh(weighted_PGG)
    size_PG1 = _size(carried_PG)[..., None]
    mixes_PMG = mixes_PGG.mT  # the M-th mix of a pair
    key_UG = (mixes_PMG * root_PG[:, None] / size_PG1).flatten(0, 1)
    query_UG = (mixes_PMG / root_PG[:, None] * size_PG1).flatten(0, 1)
    turns_U = turning_P.repeat_interleave(query_PG.shape[1])
    weights = (_complex_weights(mix_UG, turns_U, len(still_P)) for mix_UG in (key_UG, query_UG))
    # Of a product of complex numbers the real part alone counts: half of it, all angles alike.
    return CoarseMix(carried_PG.flatten() / 2, turns_U, *weights)


def _still_mix(query_GFF: Tensor, key_EE: Tensor, still_P: Tensor) -> CoarseMix:
    """All mixes of the numbers of still pairs, two and two by what they carry."""
    roots = [_root(query_FF) for query_FF in query_GFF]
    root_EE, inverse_EE = (torch.block_diag(*parts) for parts in zip(*roots, strict=True))
    carried_E, mixes_EE = (x.flip(-1) for x in torch.linalg.eigh(root_EE @ key_EE.double() @ root_EE))
    size_E, n_pairs = _size(carried_E), len(carried_E) // 2
    numbers_F = torch.cat((still_P, still_P)).nonzero()[:, 0]

    def weights(mix_EE: Tensor) -> Tensor:
        mix_EGF = mix_EE.mT.unflatten(1, query_GFF.shape[:2])
        all_EGD = mix_EGF.new_zeros(*mix_EGF.shape[:2], 2 * len(still_P))
        all_EGD[..., numbers_F] = mix_EGF
        return all_EGD.unflatten(0, (n_pairs, 2))

    key_U2GD, query_U2GD = weights(root_EE @ mixes_EE / size_E), weights(inverse_EE @ mixes_EE * size_E)
    carried_U = carried_E.unflatten(0, (n_pairs, 2)).sum(1)
    return CoarseMix(carried_U, torch.full((n_pairs,), len(still_P)), key_U2GD, query_U2GD)


def _size(carried: Tensor) -> Tensor:
    """Makes queries and keys of one size, so that 8 bits suit both."""
    return carried.clamp_min(1e-30) ** 0.25


def _root(query_FF: Tensor) -> tuple[Tensor, Tensor]:
    """The root of a second moment, and its inverse; float64."""
    size_F, axes_FF = torch.linalg.eigh(query_FF.double())
    root_F = size_F.clamp_min(LEAST_SHARE * float(size_F.sum().clamp_min(1e-30))).sqrt()
    return (axes_FF * root_F) @ axes_FF.mT, (axes_FF / root_F) @ axes_FF.mT


def _complex_weights(mix_UG: Tensor, turns_U: Tensor, half: int) -> Tensor:
    """[U, 2, G, D]: the real, then the imaginary part of sum_g conj(mix) x, x a head's pair `turns_U`."""
    weights_U2GD = torch.zeros(len(mix_UG), 2, mix_UG.shape[1], 2 * half, dtype=torch.float64)
    rows_U = torch.arange(len(mix_UG))
    weights_U2GD[rows_U, 0, :, turns_U] = weights_U2GD[rows_U, 1, :, turns_U + half] = mix_UG.real
    weights_U2GD[rows_U, 0, :, turns_U + half] = mix_UG.imag
    weights_U2GD[rows_U, 1, :, turns_U] = -mix_UG.imag
    return weights_U2GD


def write_coarse(attention: Any, mix: CoarseMix, rotary: int) -> None:
    """Write wq, wk and rope_pairs of the attention's coarse level; its logits are N^-1/2 q . k, as all index
    logits are.
    """
    coarse, width = attention.indexer.coarse, attention.head_dim
    order_D, n_heads = pair_order(width, rotary), coarse.n_heads - 1
    heads = coarse.wq.shape[1] // width
    pooled = heads // n_heads
    # First the first number of each pair, then the second, as RoPE has it; the model's own order of dims.
    key_NGD, query_NGD = (_in_order(x_U2GD, order_D) for x_U2GD in (mix.key_U2GD, mix.query_U2GD))
    n, groups = key_NGD.shape[:2]
    query_NGD *= attention.scaling / pooled * n**0.5
    heads_H = torch.arange(heads)
    query_MNHD = torch.zeros(n_heads, n, heads, width, dtype=query_NGD.dtype)
    query_MNHD[heads_H // pooled, :, heads_H] = query_NGD[:, heads_H * groups // heads].transpose(0, 1)
    coarse.wk.copy_(key_NGD.flatten(1))
    query_MNHD = torch.cat((query_MNHD, MEAN_WEIGHT * query_MNHD.mean(0, keepdim=True)))
    coarse.wq.copy_(query_MNHD.flatten(2).flatten(0, 1))
    coarse.rope_pairs.copy_(mix.turns_U.clamp(max=rotary // 2))


def _in_order(x_U2GD: Tensor, order_D: Tensor) -> Tensor:
    """[N, G, D]"""
    found_NGD = x_U2GD.transpose(0, 1).flatten(0, 1)
    return torch.empty_like(found_NGD).index_copy_(-1, order_D, found_NGD)


def _complex(x: Tensor) -> Tensor:
    """Dims p and p + D/2 as one complex number."""
    return torch.complex(*x.chunk(2, -1))
