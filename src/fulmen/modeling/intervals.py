"""Which keys a query may see, as intervals in cache coordinates, made once per forward pass."""

from typing import NamedTuple

import torch
from torch import Tensor

from fulmen.errors import ConfigError
from fulmen.ops.common.opaque import opaque


class KeyIntervals(NamedTuple):
    """Query t of batch row b sees the keys s of `n_keys` with start_BT[b, t] <= s < stop_BT[b, t] (int64).

    `plain` says that nothing is hidden but the future: every interval is 0 .. past + t + 1.
    """

    start_BT: Tensor
    stop_BT: Tensor
    n_keys: int
    plain: bool


def visible_intervals(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    batch: int,
    n_queries: int,
    n_past: int,
    device: torch.device,
) -> KeyIntervals:
    """Intervals of causal attention under padding, or under packed documents.

    Left padding starts the intervals of its row; a padding query, left or right, sees nothing. Without a
    mask, a jump of `position_ids` [B or 1, T] starts a new document (Transformers' convention).

    Raises:
        ConfigError: a mask that is not `[B, past + T]`, or whose ones are not one run per row.
    """
    n_keys = n_past + n_queries
    stop_BT = torch.arange(n_past + 1, n_keys + 1, device=device).expand(batch, -1)
    if attention_mask is not None:
        mask_BS = _checked_mask(attention_mask, batch, n_keys).to(device)
        # A compiler cannot branch on what a mask holds.
        if torch.compiler.is_compiling() or not mask_BS.all():
            return _padded_intervals(mask_BS, stop_BT)
    elif position_ids is not None:
        start_BT = _document_starts(position_ids).expand(batch, -1)
        if torch.compiler.is_compiling() or start_BT.any():
            return KeyIntervals(start_BT, stop_BT, n_keys, plain=False)
    return KeyIntervals(torch.zeros_like(stop_BT), stop_BT, n_keys, plain=True)


def intervals_with_images(visible: KeyIntervals, is_image_BT: Tensor) -> KeyIntervals:
    """The intervals where a token of an image sees all of that image (Gemma 3, arXiv 2503.19786).

    is_image_BT: bool, of the queries; neighbours are of one image.
    """
    is_last_BT = is_image_BT & ~torch.nn.functional.pad(is_image_BT[:, 1:], (0, 1))
    # The nearest end of an image from here on.
    ends_BT = torch.where(is_last_BT, _own_ends(visible), visible.n_keys).flip(-1).cummin(-1).values.flip(-1)
    stop_BT = torch.where(is_image_BT, ends_BT, visible.stop_BT)
    return visible._replace(stop_BT=stop_BT, plain=False)


def narrowed_intervals(visible: KeyIntervals, window: int | None, n_keys: int) -> KeyIntervals:
    """The intervals for a layer whose queries see only their last `window` keys, themselves included.

    `n_keys` counts the keys at hand: a cache that has dropped the oldest ones shifts the coordinates.
    """
    dropped = visible.n_keys - n_keys
    if window is None or window >= visible.n_keys:
        window = visible.n_keys
        if dropped == 0:
            return visible
    # A window counts back from the query itself, whatever it sees behind.
    start_BT = torch.maximum(visible.start_BT, _own_ends(visible) - window).minimum(visible.stop_BT)
    return KeyIntervals((start_BT - dropped).clamp(min=0), visible.stop_BT - dropped, n_keys, plain=False)


def _own_ends(visible: KeyIntervals) -> Tensor:
    """For each query the number of keys up to its own, ends_T."""
    n_queries, n_keys = visible.stop_BT.shape[1], visible.n_keys
    return torch.arange(n_keys - n_queries + 1, n_keys + 1, device=visible.stop_BT.device)


def _checked_mask(attention_mask: Tensor, batch: int, n_keys: int) -> Tensor:
    shape = tuple(getattr(attention_mask, "shape", ()))
    if shape != (batch, n_keys):
        raise ConfigError(
            f"attention_mask has shape {shape}; pass {(batch, n_keys)}: a 0 or 1 for each token, past and new"
        )
    return attention_mask != 0


def _padded_intervals(mask_BS: Tensor, stop_BT: Tensor) -> KeyIntervals:
    start_BT, stop_BT = _intervals_of_rows(mask_BS, stop_BT)
    return KeyIntervals(start_BT, stop_BT, mask_BS.shape[1], plain=False)


def _fake_intervals(mask_BS: Tensor, stop_BT: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(stop_BT).contiguous(), torch.empty_like(stop_BT).contiguous()


@opaque(_fake_intervals)
def _intervals_of_rows(mask_BS: Tensor, stop_BT: Tensor) -> tuple[Tensor, Tensor]:
    n_keys = mask_BS.shape[1]
    count_B = mask_BS.sum(-1)
    first_B = mask_BS.int().argmax(-1)
    last_B = n_keys - 1 - mask_BS.flip(-1).int().argmax(-1)
    has_hole_B = (count_B > 0) & (count_B != last_B - first_B + 1)
    if has_hole_B.any():
        row = int(has_hole_B.int().argmax())
        raise ConfigError(
            f"attention_mask row {row} has zeros between its ones; pad on the left only (padding_side='left')"
        )
    start_BT = first_B[:, None].expand_as(stop_BT)
    is_padding_BT = (stop_BT <= start_BT) | (stop_BT > (first_B + count_B)[:, None])
    return start_BT, torch.where(is_padding_BT, start_BT, stop_BT)


def _document_starts(position_ids: Tensor) -> Tensor:
    """Position in the row where the document of each token starts."""
    jumps = position_ids[:, 1:] - position_ids[:, :-1] != 1
    positions = torch.arange(1, position_ids.shape[1], device=position_ids.device)
    starts = torch.where(jumps, positions, 0).cummax(-1).values
    return torch.nn.functional.pad(starts, (1, 0))
