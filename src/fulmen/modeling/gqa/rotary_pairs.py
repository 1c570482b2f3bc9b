"""Which rotary pairs of a model's keys carry its logits: their covariance, and a greedy choice among them.

A logit q . k is a sum over pairs of dims p and p + D/2, each the real part of q[p] conj(k[p]) as complex
numbers; the imaginary part is what a rotated query would make of the same key.
"""

import torch
from torch import Tensor

# Keys whose products of dims are alive at once.
KEYS_AT_ONCE = 512


def pair_order(head_dim: int, rotary: int) -> Tensor:
    """Dims of a head so that p and p + D/2 form a pair: rotary pairs first, the others then."""
    dims_D = torch.arange(head_dim)
    half, rest = rotary // 2, (head_dim - rotary) // 2
    rotated, still = dims_D[:rotary], dims_D[rotary:]
    return torch.cat((rotated[:half], still[:rest], rotated[half:], still[rest:]))


def pair_products(q: Tensor, x: Tensor) -> Tensor:
    """[..., D]: Re and Im of q conj(x) per pair of dims p, p + D/2; all Re add up to q . x."""
    (q_real, q_imaginary), (x_real, x_imaginary) = q.chunk(2, -1), x.chunk(2, -1)
    real = q_real * x_real + q_imaginary * x_imaginary
    return torch.cat((real, q_imaginary * x_real - q_real * x_imaginary), -1)


def pair_covariance(q_RHD: Tensor, k_GSD: Tensor, weight_HRS: Tensor, rows_R: Tensor) -> Tensor:
    """cov_HFF of the contributions of all D/2 pairs to a head's logits, F = D: first their real, then their
    imaginary parts; over keys, centred per query, a sum over queries; float64.

    Through the keys' own covariance: D x D a query, not S x D.

    Args:
        q_RHD, k_GSD: queries times the logits' scale, keys.
        weight_HRS: adds up to 1 over the keys.
        rows_R: ascending positions of the queries; no weight is read of keys after them.
    """
    weight_GMRS = weight_HRS.unflatten(0, (len(k_GSD), -1))
    q_GMRD = q_RHD.transpose(0, 1).unflatten(0, (len(k_GSD), -1))
    groups = []
    for q_MRD, k_SD, weight_MRS in zip(q_GMRD, k_GSD, weight_GMRS, strict=True):
        mean_MRD = weight_MRS @ k_SD
        keys_MRDD = (
            _square_moments(k_SD, weight_MRS, rows_R) - mean_MRD[..., :, None] * mean_MRD[..., None, :]
        )
        half_MRDF = pair_products(q_MRD[..., None, :], keys_MRDD)
        groups.append(pair_products(q_MRD[..., None, :], half_MRDF.mT).sum(1, dtype=torch.float64))
    return torch.cat(groups)


def _square_moments(k_SD: Tensor, weight_MRS: Tensor, rows_R: Tensor) -> Tensor:
    """sum_s weight k k^T as [M, R, D, D]: one matrix product with the D (D + 1) / 2 products of two dims."""
    width = k_SD.shape[-1]
    upper_2N = torch.triu_indices(width, width, device=k_SD.device)
    moments_MRN = k_SD.new_zeros(*weight_MRS.shape[:2], upper_2N.shape[1])
    for low in range(0, len(k_SD), KEYS_AT_ONCE):
        some = slice(low, low + KEYS_AT_ONCE)
        first = int((rows_R < low).sum())
        products_NS = _products_of_dims(k_SD[some].T)
        weight_NS = weight_MRS[:, first:, some].flatten(0, 1)
        moments_MRN[:, first:] += (weight_NS @ products_NS.T).unflatten(0, (len(weight_MRS), -1))
    moments_MRDD = k_SD.new_empty(*weight_MRS.shape[:2], width, width)
    moments_MRDD[..., upper_2N[0], upper_2N[1]] = moments_MRN
    moments_MRDD[..., upper_2N[1], upper_2N[0]] = moments_MRN
    return moments_MRDD


def _products_of_dims(k_DS: Tensor) -> Tensor:
    """[N, S] of every two dims, in the order of `torch.triu_indices`."""
    k_DS, width = k_DS.contiguous(), len(k_DS)
    products_NS = k_DS.new_empty(width * (width + 1) // 2, k_DS.shape[1])
    for dim, some_NS in enumerate(products_NS.split(tuple(range(width, 0, -1)))):
        torch.mul(k_DS[dim], k_DS[dim:], out=some_NS)
    return products_NS


def pick_pairs(cov_HFF: Tensor, n_pairs: int, n_groups: int) -> tuple[Tensor, Tensor, float]:
    """Greedy forward selection of pairs, shared by the heads of a group.

    Args:
        cov_HFF: as `pair_covariance`, float64.
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
