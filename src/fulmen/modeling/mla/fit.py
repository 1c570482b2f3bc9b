"""Least squares in closed form for `mla_inherit`; float64, rows are samples."""

import torch
from torch import Tensor


def ridge_regression(inputs_NX: Tensor, outputs_NY: Tensor, ridge: float) -> Tensor:
    """weights_XY of least ||inputs @ weights - outputs||^2 + penalty; `ridge` is relative to inputs^2."""
    return ridge_solution(inputs_NX.T @ inputs_NX, inputs_NX.T @ outputs_NY, ridge)


def ridge_solution(gram_XX: Tensor, cross_XY: Tensor, ridge: float) -> Tensor:
    """`ridge_regression` from its sums inputs.T @ inputs and inputs.T @ outputs."""
    penalty = ridge * gram_XX.diagonal().mean().clamp_min(torch.finfo(gram_XX.dtype).tiny)
    return torch.linalg.solve(gram_XX + penalty * torch.eye(len(gram_XX)).to(gram_XX), cross_XY)


def matrix_power(symmetric_XX: Tensor, power: float, floor: float = 1e-6) -> Tensor:
    """A power of a positive semidefinite matrix; eigenvalues below `floor` times the largest become that."""
    values_X, vectors_XX = torch.linalg.eigh(symmetric_XX)
    values_X = values_X.clamp_min(floor * values_X[-1].clamp_min(torch.finfo(values_X.dtype).tiny))
    return (vectors_XX * values_X**power) @ vectors_XX.T


def reduced_rank_directions(inputs_NX: Tensor, outputs_NY: Tensor, weight_YY: Tensor, rank: int) -> Tensor:
    """rows_KX, K = min(rank, X, Y): the directions of the inputs that best predict the outputs, best first.

    The error is measured by the positive semidefinite `weight_YY`: reduced-rank regression (Izenman 1975).
    Inputs and outputs are centred. Each row's product with the inputs has variance 1, and no two correlate.
    """
    inputs_NX = inputs_NX - inputs_NX.mean(0)
    outputs_NY = outputs_NY - outputs_NY.mean(0)
    whiten_XX = matrix_power(inputs_NX.T @ inputs_NX / len(inputs_NX), -0.5)
    cross_YX = outputs_NY.T @ inputs_NX / len(inputs_NX)
    _, _, directions_KX = torch.linalg.svd(
        matrix_power(weight_YY, 0.5) @ cross_YX @ whiten_XX, full_matrices=False
    )
    return directions_KX[:rank] @ whiten_XX


def steadying_factor(fixed_N: Tensor, extra_N: Tensor) -> float:
    """t >= 0 for which fixed + t * extra (both >= 0) varies least, relative to its mean."""
    (var_fixed, covariance), (_, var_extra) = torch.cov(torch.stack([fixed_N, extra_N])).tolist()
    mean_fixed, mean_extra = float(fixed_N.mean()), float(extra_N.mean())
    gain = var_fixed * mean_extra - covariance * mean_fixed
    cost = var_extra * mean_fixed - covariance * mean_extra
    # More than this would leave the fixed part, which is what counts, little of LayerNorm's range.
    most = mean_fixed / max(mean_extra, 1e-12)
    if gain <= 0:
        return 0.0
    return min(gain / cost, most) if cost > 0 else most


def group_alike(gram_HH: Tensor, n_groups: int) -> list[list[int]]:
    """Split H items into `n_groups` <= H groups of near equal size, greedily by correlation.

    `gram_HH` holds the items' inner products. Each group is the first item left and those most like it.
    """
    norms_H = gram_HH.diagonal().clamp_min(torch.finfo(gram_HH.dtype).tiny).sqrt()
    likeness_HH = gram_HH / norms_H / norms_H[:, None]
    left = list(range(len(gram_HH)))
    groups = []
    for groups_left in range(n_groups, 0, -1):
        size = -(-len(left) // groups_left)
        first = left[0]
        group = sorted(left, key=lambda item: (item != first, -float(likeness_HH[first, item])))[:size]
        groups.append(sorted(group))
        left = [item for item in left if item not in group]
    return groups
