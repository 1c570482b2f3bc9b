"""The indexer's loss by Triton kernels, forward and backward, without atomics: the same bits each time.

Mean attention p and index scores I of a chunk of queries are made side by side (`triton_tiles.py`); then one
program a row compares them, forward, or writes d loss / d I over p, backward, from which `triton_backward.py`
makes the gradients of the indexer's inputs. Backward computes p and I of each chunk anew: between the two
passes the log-sum-exp of each query and head is kept, and nothing larger.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fulmen.ops.losses.indexer.reference import IndexerLoss
from fulmen.ops.losses.indexer.triton_backward import fill_gradients, gradients_to_fill
from fulmen.ops.losses.indexer.triton_scores import scores_of_chunk
from fulmen.ops.losses.indexer.triton_target import LOWEST, attention_lse, mean_attention_of_chunk
from fulmen.ops.losses.indexer.triton_tiles import Chunk, LossKeys, chunks_of, interval_keys, selected_keys
from fulmen.ops.triton_kit import KERNEL_LOG2_E, compile_options, kernel_sizes, launch, power_of_2

# Below this a probability's logarithm may be that of a number flushed to 0.
TINIEST = tl.constexpr(torch.finfo(torch.float32).tiny)


def indexer_loss_triton(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    attn_q_BTHD: Tensor,
    attn_k_BSGD: Tensor,
    start_BT: Tensor,
    stop_BT: Tensor,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> IndexerLoss:
    """See `fulmen.ops.losses.indexer.indexer_loss`."""
    keys = interval_keys(start_BT, stop_BT, k_BSIE.shape[1])
    index, attention = (q_BTJE, k_BSIE, w_BTJ, b_BTJ), (attn_q_BTHD, attn_k_BSGD)
    return IndexerLoss(*TritonIndexerLoss.apply(*index, *attention, sinks_H, keys, scale, softcap))


def indexer_loss_selected_triton(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    attn_q_BTHD: Tensor,
    attn_k_BSGD: Tensor,
    topk_BTK: Tensor,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> IndexerLoss:
    """See `fulmen.ops.losses.indexer.indexer_loss_selected`."""
    index, attention = (q_BTJE, k_BSIE, w_BTJ, b_BTJ), (attn_q_BTHD, attn_k_BSGD)
    keys = selected_keys(topk_BTK)
    return IndexerLoss(*TritonIndexerLoss.apply(*index, *attention, sinks_H, keys, scale, softcap))


class TritonIndexerLoss(torch.autograd.Function):
    """`apply(q, k, w, b, attn_q, attn_k, sinks, keys, scale, softcap) -> (kl_BT, target_entropy_BT)`."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BTJE: Tensor,
        k_BSIE: Tensor,
        w_BTJ: Tensor,
        b_BTJ: Tensor | None,
        attn_q_BTHD: Tensor,
        attn_k_BSGD: Tensor,
        sinks_H: Tensor | None,
        keys: LossKeys,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        lse_BTH = attention_lse(attn_q_BTHD, attn_k_BSGD, keys, scale, softcap)
        attention = (attn_q_BTHD, attn_k_BSGD, _offsets(lse_BTH, sinks_H))
        kl_BT, entropy_BT = (torch.empty(lse_BTH.shape[:2], device=lse_BTH.device) for _ in range(2))
        for chunk in chunks_of(keys):
            p_BRC = mean_attention_of_chunk(*attention, keys, chunk, scale, softcap)
            scores_BRC = scores_of_chunk(q_BTJE, k_BSIE, w_BTJ, b_BTJ, keys, chunk)
            _launch_by_row(_row_loss_kernel, p_BRC, scores_BRC, keys, chunk, kl_BT, entropy_BT)
        ctx.save_for_backward(q_BTJE, k_BSIE, w_BTJ, b_BTJ, *attention, *keys[:3])
        ctx.columns, ctx.scale, ctx.softcap = keys.columns, scale, softcap
        ctx.mark_non_differentiable(entropy_BT)
        return kl_BT, entropy_BT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dkl_BT: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q_BTJE, k_BSIE, w_BTJ, b_BTJ, attn_q_BTHD, attn_k_BSGD, offset_BTH, *saved = ctx.saved_tensors
        index, attention = (q_BTJE, k_BSIE, w_BTJ, b_BTJ), (attn_q_BTHD, attn_k_BSGD, offset_BTH)
        start_BT, stop_BT, topk_BTK = saved
        keys = LossKeys(start_BT, stop_BT, topk_BTK, ctx.columns)
        dkl_BT = dkl_BT.contiguous()
        gradients = gradients_to_fill(*index)
        for chunk in chunks_of(keys):
            p_BRC = mean_attention_of_chunk(*attention, keys, chunk, ctx.scale, ctx.softcap)
            scores_BRC = scores_of_chunk(*index, keys, chunk)
            _launch_by_row(_row_gradient_kernel, p_BRC, scores_BRC, keys, chunk, dkl_BT)
            fill_gradients(p_BRC, chunk, keys, index, gradients)
        dq_BTJE, dk_BSIE, dw_BTJ, db_BTJ = gradients
        return dq_BTJE, dk_BSIE.to(k_BSIE.dtype), dw_BTJ, db_BTJ, None, None, None, None, None, None


def _offsets(lse_BTH: Tensor, sinks_H: Tensor | None) -> Tensor:
    """lse less the log of a head's weight in p: its share of what all heads take from the keys."""
    if sinks_H is None:
        return lse_BTH + math.log(lse_BTH.shape[2])
    share_BTH = (lse_BTH - sinks_H.to(lse_BTH.dtype)).sigmoid()
    total_BT1 = share_BTH.sum(-1, keepdim=True).clamp_min(torch.finfo(share_BTH.dtype).tiny)
    return lse_BTH - (share_BTH / total_BT1).log()


def _launch_by_row(
    kernel: Any, p_BRC: Tensor, scores_BRC: Tensor, keys: LossKeys, chunk: Chunk, *rows_BT: Tensor
) -> None:
    sizes = kernel_sizes("loss_row")
    launch(
        kernel,
        (p_BRC.shape[1], p_BRC.shape[0]),
        *(p_BRC, scores_BRC, keys.start_BT, keys.stop_BT, *rows_BT),
        *(chunk.first, keys.start_BT.shape[1], keys.columns),
        BLOCK=min(sizes["columns"], power_of_2(keys.columns)),
        **compile_options(sizes),
    )


@triton.jit
def _row_loss_kernel(
    p_BRC,
    scores_BRC,
    start_BT,
    stop_BT,
    kl_BT,
    entropy_BT,
    first_query,
    n_queries,
    n_columns,
    BLOCK: tl.constexpr,
):
    row, p_C, scores_C = _row_of_program(p_BRC, scores_BRC, first_query, n_queries, n_columns)
    start, stop = tl.load(start_BT + row), tl.load(stop_BT + row)
    peak, log2_total, _ = _row_totals(p_C, scores_C, start, stop, BLOCK)
    cross_C = tl.zeros([BLOCK], tl.float32)
    entropy_C = tl.zeros([BLOCK], tl.float32)
    for low in range(start // BLOCK * BLOCK, stop, BLOCK):
        p, score, there = _load_columns(p_C, scores_C, start, stop, low, BLOCK)
        cross_C -= p * tl.where(there, (score - peak) - log2_total, 0.0)
        entropy_C -= p * tl.log2(tl.where(p < TINIEST, 1.0, p))
    entropy = tl.sum(entropy_C, 0)
    tl.store(kl_BT + row, (tl.sum(cross_C, 0) - entropy) / KERNEL_LOG2_E)
    tl.store(entropy_BT + row, entropy / KERNEL_LOG2_E)


@triton.jit
def _row_gradient_kernel(
    p_BRC,
    scores_BRC,
    start_BT,
    stop_BT,
    dkl_BT,
    first_query,
    n_queries,
    n_columns,
    BLOCK: tl.constexpr,
):
    """d loss / d I in the place of p, 0 where a column has no key."""
    row, p_C, scores_C = _row_of_program(p_BRC, scores_BRC, first_query, n_queries, n_columns)
    start, stop, dkl = tl.load(start_BT + row), tl.load(stop_BT + row), tl.load(dkl_BT + row)
    peak, log2_total, total_p = _row_totals(p_C, scores_C, start, stop, BLOCK)
    for low in range(start // BLOCK * BLOCK, stop, BLOCK):
        column_C = low + tl.arange(0, BLOCK)
        p, score, there = _load_columns(p_C, scores_C, start, stop, low, BLOCK)
        softmax = tl.exp2((score - peak) - log2_total)
        dscore = tl.where(there, dkl * (softmax * total_p - p), 0.0)
        tl.store(p_C + column_C, dscore, mask=(column_C >= start) & (column_C < stop))


@triton.jit
def _row_of_program(p_BRC, scores_BRC, first_query, n_queries, n_columns):
    """Row of (batch, query), and where its columns are."""
    batch, query = tl.program_id(1).to(tl.int64), tl.program_id(0)
    offset = (batch * tl.num_programs(0) + query) * n_columns
    return batch * n_queries + first_query + query, p_BRC + offset, scores_BRC + offset


@triton.jit
def _row_totals(p_C, scores_C, start, stop, BLOCK: tl.constexpr):
    """The largest score, log2 of the sum of 2^(score - largest), the sum of p: 1, or 0 of no keys."""
    peak_C = tl.full([BLOCK], LOWEST, tl.float32)
    total_C = tl.zeros([BLOCK], tl.float32)
    sum_p_C = tl.zeros([BLOCK], tl.float32)
    for low in range(start // BLOCK * BLOCK, stop, BLOCK):
        p, score, _ = _load_columns(p_C, scores_C, start, stop, low, BLOCK)
        higher_C = tl.maximum(peak_C, score)
        # NaN may be the larger of two or not; a sum keeps it.
        total_C = total_C * tl.exp2(peak_C - higher_C) + tl.exp2(score - higher_C)
        peak_C = higher_C
        sum_p_C += p
    peak = tl.max(peak_C, 0)
    total = tl.sum(total_C * tl.exp2(peak_C - peak), 0)
    return peak, tl.log2(tl.where(total == 0, 1.0, total)), tl.sum(sum_p_C, 0)


@triton.jit
def _load_columns(p_C, scores_C, start, stop, low, BLOCK: tl.constexpr):
    """p, 0 where a column has no key; its score in powers of 2, there -inf; whether it has one."""
    column_C = low + tl.arange(0, BLOCK)
    inside = (column_C >= start) & (column_C < stop)
    score = tl.load(scores_C + column_C, mask=inside, other=float("-inf")) * KERNEL_LOG2_E
    return tl.load(p_C + column_C, mask=inside, other=0.0), score, score != float("-inf")
