"""The selection loss by Triton kernels, forward and backward, without atomics: the same bits each time.

Attention whose keys have gates is one operation. For a chunk of queries the index scores are made and the cut
is found among them; then a kernel attends, each key's log gate added to its logits. Backward makes the scores
again, and a second kernel the gradients of the gates, heads summed in registers; those of the indexer's
inputs follow as for the indexer's KL. The rest of the loss is plain torch, no larger than attention's output.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fulmen.ops.attention.sinks import with_sinks
from fulmen.ops.common.intervals import interval_mask, selection_mask
from fulmen.ops.losses.indexer.triton_backward import fill_gradients, gradients_to_fill
from fulmen.ops.losses.indexer.triton_scores import scores_of_chunk
from fulmen.ops.losses.indexer.triton_tiles import Chunk, LossKeys, chunks_of, interval_keys
from fulmen.ops.losses.selection.reference import to_stream
from fulmen.ops.losses.selection.triton_gates import Gates, attend_with_gates, gate_gradients
from fulmen.ops.topk.triton import select_topk_triton


def selection_loss_triton(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    attn_q_BTHD: Tensor,
    attn_k_BSGD: Tensor,
    attn_v_BSGV: Tensor,
    out_weight_CN: Tensor,
    start_BT: Tensor,
    stop_BT: Tensor,
    topk: int,
    scale: float,
    temperature: float,
    softcap: float | None,
    sinks_H: Tensor | None,
    out_gate_BTN: Tensor | None,
) -> Tensor:
    """See `fulmen.ops.losses.selection.selection_loss`. Of equal scores the most recent ranks first."""
    keys = interval_keys(start_BT, stop_BT, k_BSIE.shape[1])
    index, attention = (q_BTJE, k_BSIE, w_BTJ, b_BTJ), (attn_q_BTHD, attn_k_BSGD, attn_v_BSGV)
    found = TritonGatedAttention.apply(*index, *attention, keys, topk, scale, temperature, softcap)
    gated_BTHV, gated_lse, dense_BTHV, dense_lse = found
    gated_BTHV, _ = with_sinks(gated_BTHV, gated_lse, sinks_H)
    dense_BTHV, _ = with_sinks(dense_BTHV, dense_lse, sinks_H)
    change_BTC, dense_BTC = (
        to_stream(x_BTHV, out_weight_CN, out_gate_BTN) for x_BTHV in (gated_BTHV - dense_BTHV, dense_BTHV)
    )
    norm_BT = dense_BTC.square().sum(-1)
    return change_BTC.square().sum(-1) / norm_BT.clamp_min(torch.finfo(norm_BT.dtype).tiny)


class TritonGatedAttention(torch.autograd.Function):
    """`apply(q, k, w, b, attn_q, attn_k, attn_v, keys, topk, scale, temperature, softcap)`.

    Returns out_BTHV and lse_BTH of the gated attention, and of the dense one, which have no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_BTJE: Tensor,
        k_BSIE: Tensor,
        w_BTJ: Tensor,
        b_BTJ: Tensor | None,
        attn_q_BTHD: Tensor,
        attn_k_BSGD: Tensor,
        attn_v_BSGV: Tensor,
        keys: LossKeys,
        topk: int,
        scale: float,
        temperature: float,
        softcap: float | None,
    ) -> tuple[Tensor, ...]:
        index, attention = (q_BTJE, k_BSIE, w_BTJ, b_BTJ), (attn_q_BTHD, attn_k_BSGD, attn_v_BSGV)
        shape = (*attn_q_BTHD.shape[:3], attn_v_BSGV.shape[3])
        gated_BTHV, dense_BTHV = (torch.empty(shape, device=attn_q_BTHD.device) for _ in range(2))
        gated_lse, dense_lse = (torch.empty(shape[:3], device=attn_q_BTHD.device) for _ in range(2))
        for chunk in chunks_of(keys):
            scores_BRC = scores_of_chunk(*index, keys, chunk)
            cut_BR, _ = _cut_of_chunk(scores_BRC, keys, chunk, topk)
            gates = Gates(scores_BRC, cut_BR, temperature)
            attend_with_gates(*attention, keys, chunk, gates, scale, softcap, gated_BTHV, gated_lse)
            open_gates = gates._replace(cut_BR=torch.full_like(cut_BR, -torch.inf))
            attend_with_gates(*attention, keys, chunk, open_gates, scale, softcap, dense_BTHV, dense_lse)
        ctx.save_for_backward(*index, *attention, *keys[:2], gated_BTHV, gated_lse)
        ctx.constants = (topk, scale, temperature, softcap)
        ctx.mark_non_differentiable(dense_BTHV, dense_lse)
        return gated_BTHV, gated_lse, dense_BTHV, dense_lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BTHV: Tensor, dlse_BTH: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        q_BTJE, k_BSIE, w_BTJ, b_BTJ, attn_q_BTHD, attn_k_BSGD, attn_v_BSGV, *saved = ctx.saved_tensors
        start_BT, stop_BT, out_BTHV, lse_BTH = saved
        topk, scale, temperature, softcap = ctx.constants
        index, attention = (q_BTJE, k_BSIE, w_BTJ, b_BTJ), (attn_q_BTHD, attn_k_BSGD, attn_v_BSGV)
        keys = LossKeys(start_BT, stop_BT, None, k_BSIE.shape[1])
        rows = (dout_BTHV.contiguous(), lse_BTH, (dout_BTHV * out_BTHV).sum(-1) - dlse_BTH)
        gradients = gradients_to_fill(*index)
        for chunk in chunks_of(keys):
            scores_BRC = scores_of_chunk(*index, keys, chunk)
            cut_BR, near_BRN = _cut_of_chunk(scores_BRC, keys, chunk, topk)
            gates = Gates(scores_BRC, cut_BR, temperature)
            dgates_BRC = gate_gradients(*attention, *rows, keys, chunk, gates, scale, softcap)
            dscores_BRC = _score_gradients(dgates_BRC, gates, near_BRN, keys, chunk)
            fill_gradients(dscores_BRC, chunk, keys, index, gradients)
        dq_BTJE, dk_BSIE, dw_BTJ, db_BTJ = gradients
        return dq_BTJE, dk_BSIE.to(k_BSIE.dtype), dw_BTJ, db_BTJ, *(None for _ in range(8))


def _cut_of_chunk(scores_BRC: Tensor, keys: LossKeys, chunk: Chunk, topk: int) -> tuple[Tensor, Tensor]:
    """cut_BR: the mean of the scores ranked k/2 to 3k/2, -inf where all keys are kept.

    near_BRN: whose scores these are, -1 where a query sees fewer keys.
    """
    start_BR, stop_BR = (x[:, chunk.first : chunk.last] for x in (keys.start_BT, keys.stop_BT))
    best_BRK = select_topk_triton(scores_BRC, start_BR, stop_BR, topk + topk // 2 + topk % 2).long()
    best_scores_BRK = scores_BRC.gather(-1, best_BRK.clamp(min=0)).masked_fill(best_BRK < 0, -torch.inf)
    ranked_BRK, order_BRK = best_scores_BRK.sort(-1, descending=True)
    near_BRN = best_BRK.gather(-1, order_BRK)[..., topk - topk // 2 :]
    near_scores_BRN = ranked_BRK[..., topk - topk // 2 :].masked_fill(near_BRN < 0, 0)
    cut_BR = near_scores_BRN.sum(-1) / (near_BRN >= 0).sum(-1).clamp_min(1)
    return cut_BR.masked_fill(stop_BR - start_BR <= topk, -torch.inf), near_BRN


def _score_gradients(
    dgates_BRC: Tensor, gates: Gates, near_BRN: Tensor, keys: LossKeys, chunk: Chunk
) -> Tensor:
    """d loss / d I: through each key's own gate, and through the cut, which keys near it share."""
    rows = slice(chunk.first, chunk.last)
    inside_BRC = interval_mask(keys.start_BT[:, rows], keys.stop_BT[:, rows], keys.columns)
    dscores_BRC = (gates.scores_BRC - gates.cut_BR[..., None]).div_(-gates.temperature).sigmoid_()
    dscores_BRC.mul_(dgates_BRC).div_(gates.temperature).masked_fill_(~inside_BRC, 0)
    share_BR = dscores_BRC.sum(-1) / (near_BRN >= 0).sum(-1).clamp_min(1)
    return dscores_BRC.sub_(selection_mask(near_BRN, keys.columns) * share_BR[..., None])
