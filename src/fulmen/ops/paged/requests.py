"""Attention of a step's requests over paged caches, by block tables as a server keeps them; no gradient.

All queries of a step in one call: requests that decode one token or several, and chunks of prompts. Where the
keys lie and how many there are is read on the device alone, so that nothing waits for it and a CUDA graph can
replay the call for other requests.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fulmen.errors import BackendError, ConfigError
from fulmen.ops.dispatch import implementation, implements, implements_by_name, reason_against_backend
from fulmen.ops.paged import paged_attention
from fulmen.ops.paged.layer import PagedLayer, check_fields, require_coarse
from fulmen.ops.paged.project import NewIndexQueries
from fulmen.ops.paged.sparse import KeyRows, paged_sparse_attention

# What the kernels for GPUs hold in registers.
WIDEST_PAGED_HEAD = 256
MOST_PAGED_SELECTED = 8192


@dataclass(frozen=True, eq=False)
class Requests:
    """The requests of a step. Their tokens lie one after the other, as do those of a request.

    Attributes:
        block_BN: int32, the blocks of each request's keys in their order; any beyond its length.
        start_Z: int32, Z = B + 1: the first token of each request, and the end of the last one. Tokens beyond
            that are padding, and a request without a token is, too.
        length_B: int32, keys of each request; its last tokens are the new ones.
        block_size: tokens of a block.
        rows_per_block, index_rows_per_block: rows between the first tokens of two blocks in both caches.
        most_queries, most_keys: at least as many as any request has, known without asking the device.
        coarse_rows_per_block: as those, of the cache of coarse keys, of an index in two levels.

    Raises ConfigError: axes or dtypes that do not fit together.
    """

    block_BN: Tensor
    start_Z: Tensor
    length_B: Tensor
    block_size: int
    rows_per_block: int
    index_rows_per_block: int
    most_queries: int
    most_keys: int
    coarse_rows_per_block: int = 0

    def __post_init__(self) -> None:
        tables = _Tables(self.block_BN, self.start_Z, self.length_B)
        check_fields(tables, block_BN=torch.int32, start_Z=torch.int32, length_B=torch.int32)
        if len(self.start_Z) != self.count + 1:
            raise ConfigError(f"start_Z has {len(self.start_Z)} numbers; {self.count} requests need one more")
        if self.most_keys > (room := self.block_BN.shape[1] * self.block_size):
            raise ConfigError(f"most_keys={self.most_keys}; the blocks of block_BN hold {room}")

    @property
    def count(self) -> int:
        """How many requests."""
        return len(self.length_B)


@dataclass(frozen=True, eq=False)
class _Tables:
    """The tensors of `Requests`, to be checked."""

    block_BN: Tensor
    start_Z: Tensor
    length_B: Tensor


@torch.no_grad()
def attend_requests(
    layer: PagedLayer, requests: Requests, q_THD: Tensor, index: NewIndexQueries | None, out_THD: Tensor
) -> None:
    """Each query attends to its keys, up to `layer.dense_up_to`, else to the `layer.topk` best.

    Args:
        q_THD: rotated, of the cache's dtype; T is at least the end of `requests.start_Z`.
        index: what queries select by; None where `requests.most_keys` is at most `layer.dense_up_to`. Its
            coarse part may be None where the coarse level is not asked by so many keys.
        out_THD: contiguous, written; 0 for padding.

    Raises:
        ConfigError: shapes, dtypes or devices that do not fit together; selection without `index`.
        BackendError: a pinned backend that cannot run here, or a shape that it has no kernel for.
    """
    _check_requests(layer, requests, q_THD, index, out_THD)
    implementation("attend_requests", *layer.device_and_dtype).run(layer, requests, q_THD, index, out_THD)


@implements("attend_requests", "reference", "torch")
def attend_requests_composed(
    layer: PagedLayer, requests: Requests, q_THD: Tensor, index: NewIndexQueries | None, out_THD: Tensor
) -> None:
    """The specification, on any device: request by request, as the host reads where they are."""
    out_THD.zero_()
    starts, lengths = requests.start_Z.tolist(), requests.length_B.tolist()
    for request, (low, high) in enumerate(pairwise(starts)):
        if low == high:
            continue
        key_rows = _key_rows(layer, requests, request, lengths[request], high - low)
        q_BTHD, out_BTHD = q_THD[None, low:high], out_THD[None, low:high]
        if index is None or lengths[request] <= layer.dense_up_to:
            inputs = (layer.kv_RGC, key_rows.rows_BS, key_rows.stop_BT, None, *layer.softmax)
            out_BTHD.copy_(paged_attention(q_BTHD, *inputs))
            continue
        q_BTJE, w_BTJ, b_BTJ = (x[None, low:high] for x in index[:3])
        coarse = (None if x is None else x[None, low:high] for x in index[3:])
        paged_sparse_attention(layer, q_BTHD, q_BTJE, w_BTJ, b_BTJ, key_rows, out_BTHD, *coarse)


implements_by_name("attend_requests", "triton", "fulmen.ops.paged.triton_requests:attend_requests_triton")


def require_paged_kernels(
    what: str, device: torch.device | str, dtype: torch.dtype, width: int, topk: int
) -> None:
    """Raise BackendError unless the kernels for GPUs can serve such a layer on `device`, without a copy.

    what: the layer's name; width: of an attention head; topk: the most keys that a query keeps.
    """
    reason = reason_against_backend("triton", "attend_requests", device, dtype)
    reason = reason or reason_against_shape(width, topk)
    if reason:
        raise BackendError(f"{what} cannot be served on device {str(device)!r}: {reason}")


def reason_against_shape(width: int, topk: int) -> str | None:
    """Why the paged kernels for GPUs cannot compute such a layer; None if they can."""
    if width > WIDEST_PAGED_HEAD:
        return f"head_dim={width} has no kernel, widths up to {WIDEST_PAGED_HEAD} have; serve it on a CPU"
    if topk > MOST_PAGED_SELECTED:
        return f"topk={topk} has no kernel, up to {MOST_PAGED_SELECTED} have; convert with a lower --topk"
    return None


class StepBounds(NamedTuple):
    """What bounds the memory of a layer's step.

    Attributes:
        topk, all_up_to: keys that a query keeps of more than `all_up_to`.
        most_keys, most_requests: of any request, and of a step.
        n_candidates, coarse_from: of an index in two levels: the keys that the first leaves of more than
            `coarse_from`.
    """

    topk: int
    all_up_to: int
    most_keys: int
    most_requests: int
    n_candidates: int = 0
    coarse_from: int = 0

    @property
    def asks_coarse(self) -> bool:
        """Whether some query may have candidates."""
        return 0 < self.n_candidates <= self.coarse_from < self.most_keys


def reserve_workspace(out_THD: Tensor, bounds: StepBounds) -> None:
    """Allocate on its device, and free, as much as `attend_requests` takes beside its inputs and outputs.

    For servers that measure how much memory a step takes.
    """
    implementation("reserve_workspace", out_THD.device, out_THD.dtype).run(out_THD, bounds)


@implements("reserve_workspace", "reference", "torch")
def reserve_nothing(out_THD: Tensor, bounds: StepBounds) -> None:
    """The composed operation takes no more than its gathered keys."""


implements_by_name("reserve_workspace", "triton", "fulmen.ops.paged.triton_requests:reserve_workspace_triton")


def _key_rows(layer: PagedLayer, requests: Requests, request: int, n_keys: int, n_queries: int) -> KeyRows:
    """Where one request's keys lie."""
    key_S = torch.arange(n_keys, device=requests.block_BN.device)
    block_S = requests.block_BN[request, key_S // requests.block_size].long()
    place_S = key_S % requests.block_size
    apart = (requests.rows_per_block, requests.index_rows_per_block, requests.coarse_rows_per_block)
    rows, index_rows, coarse_rows = ((block_S * rows + place_S)[None].int() for rows in apart)
    stop_T = torch.arange(n_keys - n_queries + 1, n_keys + 1, device=key_S.device)
    return KeyRows(rows, index_rows, stop_T[None], None if layer.coarse is None else coarse_rows)


def _check_requests(
    layer: PagedLayer, requests: Requests, q_THD: Tensor, index: NewIndexQueries | None, out_THD: Tensor
) -> None:
    """Little work if all fits, as it is done for every layer."""
    count, like = len(q_THD), layer.kv_RGC
    given: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "q_THD": (q_THD, layer.shapes["q"]),
        "out_THD": (out_THD, layer.shapes["q"]),
    }
    if index is not None:
        given |= _numbers_of(layer, index)
    elif requests.most_keys > layer.dense_up_to:
        raise ConfigError(
            f"most_keys={requests.most_keys} is above dense_up_to={layer.dense_up_to}: give `index`"
        )
    if index is not None and layer.asks_coarse(requests.most_keys):
        require_coarse(layer, index.coarse_q_TMN, "index.coarse_q_TMN")
        require_coarse(layer, index.coarse_b_TM, "index.coarse_b_TM")
    for name, (x, numbers) in given.items():
        if x.shape != (count, *numbers) or x.dtype is not like.dtype or x.device != like.device:
            raise ConfigError(
                f"{name} has shape {tuple(x.shape)}, {x.dtype}, {x.device}; it must have "
                f"{(count, *numbers)}, {like.dtype}, {like.device}"
            )


def _numbers_of(layer: PagedLayer, index: NewIndexQueries) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    """What is given of it, by name, and of which shape a token's part must be."""
    of_head, of_coarse_head = (layer.n_index_heads,), (layer.coarse_heads,)
    shapes = (layer.shapes["index_q"], of_head, of_head, layer.shapes["coarse_q"], of_coarse_head)
    given = zip(index._fields, index, shapes, strict=True)
    return {f"index.{name}": (x, shape) for name, x, shape in given if x is not None}
