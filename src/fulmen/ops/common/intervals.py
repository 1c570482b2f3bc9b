"""Masks of visible keys: query t of batch row b sees the keys start_BT[b, t] <= s < stop_BT[b, t]."""

import torch
from torch import Tensor


def interval_mask(start: Tensor, stop: Tensor, n_keys: int, first_key: int = 0) -> Tensor:
    """bool `[..., n_keys]`: is key `first_key + i` inside the interval? `start` and `stop` are `[...]`."""
    keys_S = torch.arange(first_key, first_key + n_keys, device=start.device)
    return (keys_S >= start[..., None]) & (keys_S < stop[..., None])


def selection_mask(topk: Tensor, n_keys: int) -> Tensor:
    """bool `[..., n_keys]`: is the key among the indices `topk` `[..., K]`? Negative indices are nothing."""
    # Nothing goes into one column more, which is then cut off.
    columns = torch.where(topk < 0, n_keys, topk).long()
    mask = torch.zeros(*topk.shape[:-1], n_keys + 1, dtype=torch.bool, device=topk.device)
    return mask.scatter_(-1, columns, True)[..., :n_keys]


def kernel_positions(topk: Tensor) -> Tensor:
    """Selected positions as kernels read them: contiguous int32, where nothing is negative.

    Without the clamp an int64 below the int32 range would come back as a position.
    """
    return (topk if topk.dtype == torch.int32 else topk.clamp(min=-1).int()).contiguous()
