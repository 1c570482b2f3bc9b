"""Layers of known models, and steps over their paged caches, of random numbers."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fulmen.ops.common.index_keys import pack_index_keys
from fulmen.ops.paged.layer import PagedLayer
from fulmen.ops.paged.project import NewIndexQueries
from fulmen.ops.paged.requests import Requests

BLOCK_SIZE = 16


class ModelShape(NamedTuple):
    """Heads H over G key heads of D on one GPU, index heads J over I of E, and k."""

    heads: int
    key_heads: int
    width: int
    index_heads: int
    index_key_heads: int
    index_width: int
    topk: int


MODELS = {
    "smollm2": ModelShape(9, 3, 64, 9, 3, 48, 512),
    "qwen3-8b": ModelShape(32, 8, 128, 32, 8, 96, 2048),
    "qwen3-32b": ModelShape(64, 8, 128, 64, 8, 96, 2048),
    # Its attention heads are split over the GPUs, its index is whole on each.
    "llama-70b-tp8": ModelShape(8, 1, 128, 64, 8, 96, 2048),
    "gemma3-270m": ModelShape(4, 1, 256, 4, 1, 192, 512),
}

Step = tuple[PagedLayer, Requests, Tensor, NewIndexQueries]


def decoding_step(shape: ModelShape, batch: int, length: int, device: str, queries: int = 1) -> Step:
    """`batch` requests of `length` keys, the last `queries` new, their blocks in no order; bfloat16."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=dtype)

    def integers(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    n_blocks = -(-length // BLOCK_SIZE)
    rows, kv_width = batch * n_blocks * BLOCK_SIZE, 2 * shape.width
    packed_RX = _packed(normal, rows, shape)
    pairs_IP = torch.zeros(shape.index_key_heads, shape.index_width // 2, dtype=torch.int64, device=device)
    caches = (normal(rows, shape.key_heads, kv_width), packed_RX, pairs_IP)
    heads, budget = (shape.heads, shape.index_heads), (shape.topk, shape.topk)
    layer = PagedLayer(*caches, *heads, *budget, shape.width**-0.5)
    block_BN = torch.randperm(batch * n_blocks, generator=generator, device=device).int().view(batch, -1)
    start_Z = integers([request * queries for request in range(batch + 1)])
    sizes = (BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE, queries, length)
    requests = Requests(block_BN, start_Z, integers([length] * batch), *sizes)
    count, per_head = batch * queries, (shape.index_heads,)
    index = NewIndexQueries(
        normal(count, *per_head, shape.index_width), normal(count, *per_head), normal(count, *per_head)
    )
    return layer, requests, normal(count, shape.heads, shape.width), index


def decode_floor(shape: ModelShape, length: int) -> int:
    """Bytes of the context's index keys, and of the keys and values that are selected."""
    index_row = shape.index_key_heads * (shape.index_width + 2)
    kept_row = shape.key_heads * 2 * shape.width * torch.bfloat16.itemsize
    return length * index_row + min(shape.topk, length) * kept_row


def _packed(normal: Any, rows: int, shape: ModelShape) -> Tensor:
    """Packed index keys, some at a time: as numbers they would take eight times as much."""
    sizes = (shape.index_key_heads, shape.index_width)
    parts = [min(65536, rows - low) for low in range(0, rows, 65536)]
    return torch.cat([pack_index_keys(normal(1, part, *sizes))[0].flatten(1) for part in parts])
