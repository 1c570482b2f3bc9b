"""Layers of known models, and steps over their paged caches, of random numbers."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fulmen.config import COARSE_FROM, DEFAULT_CANDIDATE_FACTOR
from fulmen.ops.common.index_keys import SCALE_BYTES, pack_index_keys
from fulmen.ops.paged.layer import CoarseCache, PagedLayer
from fulmen.ops.paged.project import NewIndexQueries
from fulmen.ops.paged.requests import Requests

BLOCK_SIZE = 16


class ModelShape(NamedTuple):
    """Heads H over G key heads of D on one GPU, index heads J over I of E, and k.

    Of an index in two levels also coarse heads M of N, and the candidates over k; M = 0: it has one.
    """

    heads: int
    key_heads: int
    width: int
    index_heads: int
    index_key_heads: int
    index_width: int
    topk: int
    coarse_heads: int = 0
    coarse_width: int = 0
    candidate_factor: int = DEFAULT_CANDIDATE_FACTOR

    @property
    def n_candidates(self) -> int:
        """C; 0 where the index has one level."""
        return self.candidate_factor * self.topk if self.coarse_heads else 0

    @property
    def coarse_from(self) -> int:
        """Keys from which candidates are chosen."""
        return COARSE_FROM * self.n_candidates


ONE_LEVEL = {
    "smollm2": ModelShape(9, 3, 64, 9, 3, 48, 512),
    "qwen3-8b": ModelShape(32, 8, 128, 32, 8, 96, 2048),
    "qwen3-32b": ModelShape(64, 8, 128, 64, 8, 96, 2048),
    # Its attention heads are split over the GPUs, its index is whole on each.
    "llama-70b-tp8": ModelShape(8, 1, 128, 64, 8, 96, 2048),
    "gemma3-270m": ModelShape(4, 1, 256, 4, 1, 192, 512),
}
# As conversion makes them: a coarse head for each of the model's heads, and their mean.
COARSE = {
    **{"smollm2": (10, 24), "qwen3-8b": (33, 64), "qwen3-32b": (65, 64), "llama-70b-tp8": (65, 64)},
    "gemma3-270m": (5, 32),
}
TWO_LEVELS = {
    f"{name}-two-level": ONE_LEVEL[name]._replace(coarse_heads=heads, coarse_width=width)
    for name, (heads, width) in COARSE.items()
}
MODELS = ONE_LEVEL | TWO_LEVELS

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
    packed_RX = _packed(normal, rows, (shape.index_key_heads, shape.index_width))
    pairs_IP = torch.zeros(shape.index_key_heads, shape.index_width // 2, dtype=torch.int64, device=device)
    caches = (normal(rows, shape.key_heads, kv_width), packed_RX, pairs_IP)
    heads, budget = (shape.heads, shape.index_heads), (shape.topk, shape.topk)
    layer = PagedLayer(*caches, *heads, *budget, shape.width**-0.5, _coarse_level(normal, rows, shape))
    block_BN = torch.randperm(batch * n_blocks, generator=generator, device=device).int().view(batch, -1)
    start_Z = integers([request * queries for request in range(batch + 1)])
    sizes = (BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE, queries, length, BLOCK_SIZE)
    requests = Requests(block_BN, start_Z, integers([length] * batch), *sizes)
    count, per_head, per_coarse_head = batch * queries, (shape.index_heads,), (shape.coarse_heads,)
    parts = [normal(count, *per_head, shape.index_width), normal(count, *per_head), normal(count, *per_head)]
    if shape.coarse_heads:
        parts += (normal(count, *per_coarse_head, shape.coarse_width), normal(count, *per_coarse_head))
    return layer, requests, normal(count, shape.heads, shape.width), NewIndexQueries(*parts)


def decode_floor(shape: ModelShape, length: int) -> int:
    """Bytes of the keys that the index has to read, and of the keys and values that are selected.

    The index keys of the context; in two levels, where these are asked, its coarse keys and the index keys of
    the candidates.
    """
    index_row = shape.index_key_heads * (shape.index_width + SCALE_BYTES)
    kept_row = shape.key_heads * 2 * shape.width * torch.bfloat16.itemsize
    kept = min(shape.topk, length) * kept_row
    if shape.coarse_heads and length > shape.coarse_from:
        return length * (shape.coarse_width + SCALE_BYTES) + shape.n_candidates * index_row + kept
    return length * index_row + kept


def _coarse_level(normal: Any, rows: int, shape: ModelShape) -> CoarseCache | None:
    if not shape.coarse_heads:
        return None
    packed_RX = _packed(normal, rows, (1, shape.coarse_width))
    pairs_P = torch.zeros(shape.coarse_width // 2, dtype=torch.int64, device=packed_RX.device)
    return CoarseCache(packed_RX, pairs_P, shape.coarse_heads, shape.n_candidates, shape.coarse_from)


def _packed(normal: Any, rows: int, sizes: tuple[int, int]) -> Tensor:
    """Packed keys of so many heads, so wide, some at a time: as numbers they would take eight times that."""
    parts = [min(65536, rows - low) for low in range(0, rows, 65536)]
    return torch.cat([pack_index_keys(normal(1, part, *sizes))[0].flatten(1) for part in parts])
