"""Attention sinks: a learned logit of each head that takes part in its softmax and has no value."""

import torch
from torch import Tensor


def with_sinks(out_BTHV: Tensor, lse_BTH: Tensor, sinks_H: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention over keys alone, out and lse, as that of a softmax with a sink beside the keys.

    None: there is none. All that a sink does is that the keys share what it leaves,
    exp(lse) / (exp(lse) + exp(sink)); so no kernel knows of it, and gradients reach it through the lse.
    """
    if sinks_H is None:
        return out_BTHV, lse_BTH
    sinks_H = sinks_H.to(lse_BTH.dtype)
    share_BTH1 = (lse_BTH - sinks_H).sigmoid()[..., None]
    return (out_BTHV * share_BTH1).to(out_BTHV.dtype), torch.logaddexp(lse_BTH, sinks_H)


def softmax_with_sinks(logits_HTS: Tensor, sinks_H: Tensor | None) -> Tensor:
    """Probabilities of the keys, whose sum a sink takes from; there may be axes before H."""
    if sinks_H is None:
        return logits_HTS.softmax(-1)
    sinks_HT1 = sinks_H.to(logits_HTS.dtype)[:, None, None].expand(*logits_HTS.shape[:-1], 1)
    return torch.cat((logits_HTS, sinks_HT1), -1).softmax(-1)[..., :-1]
