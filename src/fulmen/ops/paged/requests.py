"""Attention of a step's requests over paged caches, by block tables as a server keeps them; no gradient.

All queries of a step in one call: requests that decode one token or several, and chunks of prompts. Where the
keys lie and how many there are is read on the device alone, so that nothing waits for it and a CUDA graph can
replay the call for other requests.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fulmen.errors import BackendError, ConfigError
from fulmen.ops.dispatch import implementation, implements, implements_by_name, reason_against_backend
from fulmen.ops.paged import paged_attention
from fulmen.ops.paged.layer import PagedLayer, check_fields
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
        index: what queries select by; None where `requests.most_keys` is at most `layer.dense_up_to`.
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
        key_rows = _key_rows(requests, request, lengths[request], high - low)
        q_BTHD, out_BTHD = q_THD[None, low:high], out_THD[None, low:high]
        if index is None or lengths[request] <= layer.dense_up_to:
            inputs = (layer.kv_RGC, key_rows.rows_BS, key_rows.stop_BT, None, *layer.softmax)
            out_BTHD.copy_(paged_attention(q_BTHD, *inputs))
            continue
        q_BTJE, w_BTJ, b_BTJ = (x[None, low:high] for x in (index.q_TJE, index.w_TJ, index.b_TJ))
        paged_sparse_attention(layer, q_BTHD, q_BTJE, w_BTJ, b_BTJ, key_rows, out_BTHD)


implements_by_name("attend_requests", "triton", "fulmen.ops.paged.triton_requests:attend_requests_triton")


def require_paged_kernels(
    what: str, device: torch.device | str, dtype: torch.dtype, width: int, topk: int, two_levels: bool
) -> None:
    """Raise BackendError unless the kernels for GPUs can serve such a layer on `device`, without a copy.

    what: the layer's name; width: of an attention head; topk: the most keys that a query keeps.
    """
    reason = reason_against_backend("triton", "attend_requests", device, dtype)
    reason = reason or reason_against_shape(width, topk, two_levels)
    if reason:
        raise BackendError(f"{what} cannot be served on device {str(device)!r}: {reason}")


def reason_against_shape(width: int, topk: int, two_levels: bool) -> str | None:
    """Why the paged kernels for GPUs cannot compute such a layer; None if they can."""
    if width > WIDEST_PAGED_HEAD:
        return f"head_dim={width} has no kernel, widths up to {WIDEST_PAGED_HEAD} have; serve it on a CPU"
    if topk > MOST_PAGED_SELECTED:
        return f"topk={topk} has no kernel, up to {MOST_PAGED_SELECTED} have; convert with a lower --topk"
    if two_levels:
        return "an index in two levels has no kernel; convert with --index one-level, or serve it on a CPU"
    return None


def reserve_workspace(out_THD: Tensor, topk: int, all_up_to: int, most_keys: int, most_requests: int) -> None:
    """Allocate on its device, and free, as much as `attend_requests` takes beside its inputs and outputs.

    For servers that measure how much memory a step takes. topk, all_up_to: keys that a query keeps of more
    than `all_up_to`; most_keys: of any request; most_requests: of a step.
    """
    run = implementation("reserve_workspace", out_THD.device, out_THD.dtype).run
    run(out_THD, topk, all_up_to, most_keys, most_requests)


@implements("reserve_workspace", "reference", "torch")
def reserve_nothing(out_THD: Tensor, topk: int, all_up_to: int, most_keys: int, most_requests: int) -> None:
    """The composed operation takes no more than its gathered keys."""


implements_by_name("reserve_workspace", "triton", "fulmen.ops.paged.triton_requests:reserve_workspace_triton")


def _key_rows(requests: Requests, request: int, n_keys: int, n_queries: int) -> KeyRows:
    """Where one request's keys lie."""
    key_S = torch.arange(n_keys, device=requests.block_BN.device)
    block_S = requests.block_BN[request, key_S // requests.block_size].long()
    place_S = key_S % requests.block_size
    apart = (requests.rows_per_block, requests.index_rows_per_block)
    rows, index_rows = ((block_S * rows + place_S)[None].int() for rows in apart)
    stop_T = torch.arange(n_keys - n_queries + 1, n_keys + 1, device=key_S.device)
    return KeyRows(rows, index_rows, stop_T[None])


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
        given["index.q_TJE"] = (index.q_TJE, layer.shapes["index_q"])
        given |= {
            name: (x, (layer.n_index_heads,))
            for name, x in (("index.w_TJ", index.w_TJ), ("index.b_TJ", index.b_TJ))
        }
    elif requests.most_keys > layer.dense_up_to:
        raise ConfigError(
            f"most_keys={requests.most_keys} is above dense_up_to={layer.dense_up_to}: give `index`"
        )
    for name, (x, numbers) in given.items():
        if x.shape != (count, *numbers) or x.dtype is not like.dtype or x.device != like.device:
            raise ConfigError(
                f"{name} has shape {tuple(x.shape)}, {x.dtype}, {x.device}; it must have "
                f"{(count, *numbers)}, {like.dtype}, {like.device}"
            )
