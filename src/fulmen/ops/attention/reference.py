"""The specification of attention over visible keys; dense and sparse attention differ in that set alone."""

from typing import NamedTuple

import torch
from torch import Tensor

from fulmen.ops.common.precision import cap_logits, math_dtype


class AttentionReference(NamedTuple):
    """Every intermediate: `probs_BTHS` is zero and `logits_BTHS` -inf where the key is not visible."""

    visible_BTS: Tensor
    logits_BTHS: Tensor
    probs_BTHS: Tensor
    out_BTHV: Tensor
    lse_BTH: Tensor


def attention_reference(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    visible_BTS: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> AttentionReference:
    """Query by query: softmax over its visible keys, in ascending order, and the mean of their values.

    Reads only visible keys, so that NaN elsewhere is harmless. No visible key: out 0, lse -inf (or the sink).
    """
    dtype = math_dtype(q_BTHD.dtype)
    q, k, v = q_BTHD.to(dtype), k_BSGD.to(dtype), v_BSGV.to(dtype)
    rows = [
        _attention_reference_row(q[b, t], k[b], v[b], visible_BTS[b, t], scale, softcap, sinks_H)
        for b in range(q.shape[0])
        for t in range(q.shape[1])
    ]
    if not rows:  # an empty result has gradients too
        none_BTHS, none_BTHV = (q[..., :1].expand(-1, -1, -1, n) for n in (k.shape[1], v.shape[3]))
        return AttentionReference(visible_BTS, none_BTHS, none_BTHS, none_BTHV.to(q_BTHD.dtype), q[..., 0])
    logits, probs, out, lse = (
        torch.stack(column).unflatten(0, q_BTHD.shape[:2]) for column in zip(*rows, strict=True)
    )
    return AttentionReference(visible_BTS, logits, probs, out.to(q_BTHD.dtype), lse)


def _attention_reference_row(
    q_HD: Tensor,
    k_SGD: Tensor,
    v_SGV: Tensor,
    visible_S: Tensor,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    keys_N = visible_S.nonzero().squeeze(1)
    shared = q_HD.shape[0] // k_SGD.shape[1]
    k_NHD = k_SGD[keys_N].repeat_interleave(shared, dim=1)
    v_NHV = v_SGV[keys_N].repeat_interleave(shared, dim=1)
    logits_HN = cap_logits(torch.einsum("hd,nhd->hn", q_HD, k_NHD) * scale, softcap)
    lse_H = logits_HN.logsumexp(-1)
    probs_HN = (logits_HN - lse_H[:, None]).exp()
    if sinks_H is not None:
        keys_lse_H, lse_H = lse_H, torch.logaddexp(lse_H, sinks_H.to(lse_H.dtype))
        probs_HN = probs_HN * (keys_lse_H - lse_H).exp()[:, None]
    out_HV = torch.einsum("hn,nhv->hv", probs_HN, v_NHV)
    everywhere_HS = logits_HN.new_zeros(q_HD.shape[0], len(visible_S))
    logits_HS = (everywhere_HS - torch.inf).index_copy(1, keys_N, logits_HN)
    return logits_HS, everywhere_HS.index_copy(1, keys_N, probs_HN), out_HV, lse_H
