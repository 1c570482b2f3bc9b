"""Blocked attention over tiles of keys, with one running softmax per query; plain torch, any device.

Nothing larger than one tile of scores `[H * block, tile]` lives at a time; the backward pass computes the
tiles anew from the saved log-sum-exp (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fulmen.ops.common.precision import cap_logits, math_dtype, outside_autocast
from fulmen.ops.common.tiles import TILE_NUMBERS, KeyTile, take_keys, zero_bad_keys

# Powers of 2, not of e: on a CPU torch's exp2 takes 0.3 ns a number, its exp 0.8, and 3 to 30 where the
# result is 0 or denormal (float32, AVX-512, one core), as it is for most keys.
LOG2_E = 1 / math.log(2)

# Queries of a block. Measured: for dense attention 32, 64 and 128 are within 5 %; for sparse attention 64 is
# fastest, by up to a third over 16, when neighbouring queries select alike, and 20 % slower when at random.
BLOCK_QUERIES = 64
# Numbers in one tile of scores. Measured for many queries: 2**17 to 2**20 are within 10 % of each other.
TILE_SCORES = 2**18

# The blocks of batch row b: query rows, and the tiles of keys that they read.
AttentionBlocks = Callable[[int], Iterator[tuple[slice, Iterable[KeyTile]]]]


class BlockedAttention(torch.autograd.Function):
    """`apply(q_BTHD, k_BSGD, v_BSGV, scale, softcap, blocks) -> (out_BTHV, lse_BTH)`."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BTHD: Tensor,
        k_BSGD: Tensor,
        v_BSGV: Tensor,
        scale: float,
        softcap: float | None,
        blocks: AttentionBlocks,
    ) -> tuple[Tensor, Tensor]:
        batch, queries, heads, _ = q_BTHD.shape
        out_BTHV = q_BTHD.new_zeros(batch, queries, heads, v_BSGV.shape[-1])
        lse_BTH = torch.full(
            (batch, queries, heads), -torch.inf, dtype=math_dtype(q_BTHD.dtype), device=q_BTHD.device
        )
        for b in range(batch):
            for rows, tiles in blocks(b):
                out_THV, lse_TH = _attend_block(q_BTHD[b, rows], k_BSGD[b], v_BSGV[b], tiles, scale, softcap)
                out_BTHV[b, rows] = out_THV
                lse_BTH[b, rows] = lse_TH
        ctx.save_for_backward(q_BTHD, k_BSGD, v_BSGV, out_BTHV, lse_BTH)
        ctx.scale, ctx.softcap, ctx.blocks = scale, softcap, blocks
        return out_BTHV, lse_BTH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BTHV: Tensor, dlse_BTH: Tensor) -> tuple[Tensor | None, ...]:
        q_BTHD, k_BSGD, v_BSGV, out_BTHV, lse_BTH = ctx.saved_tensors
        dtype = lse_BTH.dtype
        dq_BTHD, dk_BSGD, dv_BSGV = (
            torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q_BTHD, k_BSGD, v_BSGV)
        )
        # d loss / d score = prob * (dprob - delta)
        delta_BTH = (dout_BTHV.to(dtype) * out_BTHV).sum(-1) - dlse_BTH
        with outside_autocast(q_BTHD.device):
            for b in range(q_BTHD.shape[0]):
                for rows, tiles in ctx.blocks(b):
                    dq_BTHD[b, rows] = _attend_block_backward(
                        q_BTHD[b, rows],
                        dout_BTHV[b, rows],
                        lse_BTH[b, rows],
                        delta_BTH[b, rows],
                        k_BSGD[b],
                        v_BSGV[b],
                        dk_BSGD[b],
                        dv_BSGV[b],
                        tiles,
                        ctx.scale,
                        ctx.softcap,
                    )
        inputs = (q_BTHD, k_BSGD, v_BSGV)
        gradients = zip((dq_BTHD, dk_BSGD, dv_BSGV), inputs, strict=True)
        return *(gradient.to(x.dtype) for gradient, x in gradients), None, None, None


def _attend_block(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGV: Tensor,
    tiles: Iterable[KeyTile],
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    dtype = math_dtype(q_THD.dtype)
    n_groups = k_SGD.shape[1]
    q_GMD = group_heads(q_THD.to(dtype) * (scale * LOG2_E), n_groups)
    # Finite, so that a row whose keys are all hidden so far subtracts no infinity from another.
    peak_GM1 = q_GMD.new_full((*q_GMD.shape[:2], 1), torch.finfo(dtype).min)
    total_GM1 = torch.zeros_like(peak_GM1)
    sum_GMV = q_GMD.new_zeros(*q_GMD.shape[:2], v_SGV.shape[-1])
    has_keys_T = torch.zeros(len(q_THD), dtype=torch.bool, device=q_THD.device)
    for tile in tiles:
        scores_GMC, _, v_GCV = _tile_scores(q_GMD, k_SGD, v_SGV, tile, softcap)
        higher_GM1 = torch.maximum(peak_GM1, scores_GMC.amax(-1, keepdim=True))
        fade_GM1 = (peak_GM1 - higher_GM1).exp2_()
        weights_GMC = scores_GMC.sub_(higher_GM1).exp2_()
        total_GM1.mul_(fade_GM1).add_(weights_GMC.sum(-1, keepdim=True))
        sum_GMV.mul_(fade_GM1).baddbmm_(weights_GMC, v_GCV)
        peak_GM1 = higher_GM1
        has_keys_T |= True if tile.hidden_TS is None else ~tile.hidden_TS.all(-1)
    # Keys that are there, but weigh nothing, have scores of -inf alone: as their softmax, no number.
    has_keys_M1 = has_keys_T.repeat(total_GM1.shape[1] // max(len(q_THD), 1))[:, None]
    total_GM1.masked_fill_((total_GM1 == 0) & has_keys_M1, torch.nan)
    out_GMV = sum_GMV / total_GM1.masked_fill(total_GM1 == 0, 1)
    lse_GM1 = (peak_GM1 + total_GM1.log2()) / LOG2_E
    return ungroup_heads(out_GMV, len(q_THD)), ungroup_heads(lse_GM1, len(q_THD)).squeeze(-1)


def _attend_block_backward(
    q_THD: Tensor,
    dout_THV: Tensor,
    lse_TH: Tensor,
    delta_TH: Tensor,
    k_SGD: Tensor,
    v_SGV: Tensor,
    dk_SGD: Tensor,
    dv_SGV: Tensor,
    tiles: Iterable[KeyTile],
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Adds to dk and dv in place, returns dq."""
    n_groups = k_SGD.shape[1]
    # Queries without keys (lse = -inf), and those that saw NaN, must not touch hidden keys by 0 * NaN.
    lse_TH1 = lse_TH[..., None]
    q_GMD, dout_GMV, delta_GM1 = (
        group_heads(x.to(lse_TH.dtype).masked_fill(~lse_TH1.isfinite(), 0), n_groups)
        for x in (q_THD, dout_THV, delta_TH[..., None])
    )
    q_GMD = q_GMD * (scale * LOG2_E)
    lse_GM1 = group_heads(lse_TH1.masked_fill(lse_TH1 == -torch.inf, torch.inf) * LOG2_E, n_groups)
    has_nan = bool(lse_TH.isnan().any())
    dq_GMD = torch.zeros_like(q_GMD)
    for tile in tiles:
        scores_GMC, k_GCD, v_GCV = _tile_scores(q_GMD, k_SGD, v_SGV, tile, softcap)
        slope_GMC = None if softcap is None else _slope_of_cap(scores_GMC, softcap)
        probs_GMC = scores_GMC.sub_(lse_GM1).exp2_()
        if has_nan:
            _fill_hidden(probs_GMC, tile, 0)
        _add_to_keys(dv_SGV, tile.keys, torch.bmm(probs_GMC.transpose(1, 2), dout_GMV))
        dscores_GMC = torch.bmm(dout_GMV, v_GCV.transpose(1, 2)).sub_(delta_GM1).mul_(probs_GMC)
        if slope_GMC is not None:
            dscores_GMC.mul_(slope_GMC)
        _add_to_keys(dk_SGD, tile.keys, torch.bmm(dscores_GMC.transpose(1, 2), q_GMD).div_(LOG2_E))
        dq_GMD.baddbmm_(dscores_GMC, k_GCD, alpha=scale)
    return ungroup_heads(dq_GMD, len(q_THD))


def _tile_scores(
    q_GMD: Tensor, k_SGD: Tensor, v_SGV: Tensor, tile: KeyTile, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of the tile in powers of 2, -inf where hidden, with its keys and values."""
    cap = None if softcap is None else softcap * LOG2_E
    k_GCD = take_keys(k_SGD, tile.keys, q_GMD.dtype)
    v_GCV = take_keys(v_SGV, tile.keys, q_GMD.dtype)
    if tile.hidden_TS is None:
        return cap_logits(torch.bmm(q_GMD, k_GCD.transpose(1, 2)), cap), k_GCD, v_GCV
    (k_GCD, bad_keys_C), (v_GCV, bad_values_C) = zero_bad_keys(k_GCD), zero_bad_keys(v_GCV)
    scores_GMC = cap_logits(torch.bmm(q_GMD, k_GCD.transpose(1, 2)), cap)
    for bad_C in (bad_keys_C, bad_values_C):
        if bad_C is not None:
            scores_GMC.masked_fill_(bad_C, torch.nan)
    return _fill_hidden(scores_GMC, tile, -torch.inf), k_GCD, v_GCV


def _slope_of_cap(scores_GMC: Tensor, softcap: float) -> Tensor:
    """What a capped score gains where the logit gains 1; 0 where hidden."""
    return 1 - (scores_GMC / (softcap * LOG2_E)).clamp_(min=-1).square_()


def _fill_hidden(x_GMC: Tensor, tile: KeyTile, value: float) -> Tensor:
    """In place."""
    if tile.hidden_TS is not None:
        x_GMC.unflatten(1, (-1, len(tile.hidden_TS))).masked_fill_(tile.hidden_TS, value)
    return x_GMC


def _add_to_keys(sums_SGD: Tensor, keys: slice | Tensor, x_GCD: Tensor) -> None:
    # The keys of a tile are distinct; index_add_ goes row by row and is far slower.
    sums_SGD[keys] += x_GCD.transpose(0, 1)


def group_heads(x_THD: Tensor, n_groups: int) -> Tensor:
    """`[T, H, D]` to `[G, (H / G) * T, D]`: the queries that read the same key head in one matrix."""
    queries, heads, width = x_THD.shape
    grouped = x_THD.reshape(queries, n_groups, heads // n_groups, width)
    return grouped.permute(1, 2, 0, 3).reshape(n_groups, heads // n_groups * queries, width)


def ungroup_heads(x_GMD: Tensor, queries: int) -> Tensor:
    """The inverse of `group_heads`."""
    return x_GMD.unflatten(1, (-1, queries)).flatten(0, 1).transpose(0, 1)


def attention_block_size(q_BTHD: Tensor, k_BSGD: Tensor) -> tuple[int, int]:
    """Query rows of a block, keys of a tile."""
    n_rows = min(BLOCK_QUERIES, max(q_BTHD.shape[1], 1))
    by_scores = TILE_SCORES // (n_rows * q_BTHD.shape[2])
    by_keys = TILE_NUMBERS // (k_BSGD.shape[2] * k_BSGD.shape[3])
    return n_rows, max(min(by_scores, by_keys), 128)
