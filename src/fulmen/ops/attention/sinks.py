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
