"""Steps of several requests over block tables, for the tests of the paged kernels."""

import dataclasses

import torch

from fulmen.ops.common.index_keys import pack_index_keys
from fulmen.ops.dispatch import pin_backend
from fulmen.ops.paged.layer import CoarseCache, PagedLayer
from fulmen.ops.paged.project import NewIndexQueries
from fulmen.ops.paged.requests import Requests, attend_requests
from tests.ops.ops_cases import normal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# H, G, D, J, I, E: SmolLM2's ratios; a head of an odd width; one key head; one head a key head
REQUEST_SHAPES = [(9, 3, 16, 9, 3, 12), (4, 2, 20, 2, 1, 8), (8, 1, 32, 8, 2, 6), (3, 3, 16, 3, 3, 4)]
# Queries and keys of each request.
REQUEST_STEPS = {
    "decodes": [(1, 90), (1, 7), (1, 33)],
    "drafts": [(3, 90), (2, 8), (3, 40), (1, 5)],
    "prompt": [(23, 60)],
    "mixed": [(1, 50), (17, 64), (1, 3), (12, 12)],
    "padded": [(1, 70), (1, 20), (0, 0), (0, 0)],
}
BLOCK_SIZE, PADDING = 4, 3
# Rows between the first tokens of two blocks: other rows lie between, as of several layers.
APART, INDEX_APART, COARSE_APART = 6, 4, 7


def requests_of(step, device="cpu", most=None):
    """The step's requests, their blocks anywhere; blocks beyond a request's keys are of another one."""
    counts, lengths = zip(*step, strict=True)
    n_blocks = -(-max(lengths) // BLOCK_SIZE) + 1
    order = torch.randperm(len(step) * n_blocks, generator=torch.Generator().manual_seed(3))
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    return Requests(
        order.int().view(len(step), n_blocks).to(device),
        starts.to(device),
        torch.tensor(lengths, dtype=torch.int32).to(device),
        BLOCK_SIZE,
        *(APART, INDEX_APART),
        max(counts),
        most or max(lengths),
        COARSE_APART,
    )


def request_case(shape, step, topk, dense_up_to, dtype=torch.float32, coarse=None, **more):
    """A layer with caches that are poisoned where no key lies, the step's requests, and their queries.

    Some keys are the same, and a low shift shuts most ReLUs: heavy ties, of which some are at the threshold.
    coarse: of an index in two levels its heads, their width, how many candidates they leave, and from how
    many keys on.
    """
    n_heads, kv_heads, width, index_heads, index_kv_heads, index_width = shape
    requests = requests_of(step)
    kv = torch.full((requests.block_BN.numel() * APART, kv_heads, 2 * width), torch.nan, dtype=dtype)
    for request, (_, length) in enumerate(step):
        rows_S = rows_in(requests, request, torch.arange(length), APART)
        kv[rows_S] = normal(length, kv_heads, 2 * width, seed=request, dtype=dtype)
    packed = packed_cache(requests, step, index_kv_heads, index_width, INDEX_APART, seed=10)
    pairs = torch.zeros(index_kv_heads, index_width // 2, dtype=torch.int64)
    layer = PagedLayer(kv, packed, pairs, n_heads, index_heads, topk, dense_up_to, width**-0.5, **more)
    count = int(requests.start_Z[-1]) + PADDING
    q_THD = normal(count, n_heads, width, seed=20, dtype=dtype)
    index = NewIndexQueries(
        normal(count, index_heads, index_width, seed=21, dtype=dtype),
        normal(count, index_heads, seed=22, dtype=dtype),
        normal(count, index_heads, seed=23, dtype=dtype) - 0.5,
    )
    if coarse is not None:
        heads, coarse_width, n_candidates, coarse_from = coarse
        packed = packed_cache(requests, step, 1, coarse_width, COARSE_APART, seed=30)
        pairs = torch.zeros(coarse_width // 2, dtype=torch.int64)
        layer = dataclasses.replace(
            layer, coarse=CoarseCache(packed, pairs, heads, n_candidates, coarse_from)
        )
        index = index._replace(
            coarse_q_TMN=normal(count, heads, coarse_width, seed=24, dtype=dtype),
            coarse_b_TM=normal(count, heads, seed=25, dtype=dtype) - 0.5,
        )
    return layer, requests, q_THD, index


def packed_cache(requests, step, heads, width, apart, seed):
    """Packed keys of every request, some of them the same."""
    packed = torch.full((requests.block_BN.numel() * apart, heads * (width + 2)), 99, dtype=torch.int8)
    for request, (_, length) in enumerate(step):
        keys = normal(length, heads, width, seed=seed + request)
        keys[length // 2 :: 3] = keys[:1]
        rows_S = rows_in(requests, request, torch.arange(length), apart)
        packed[rows_S] = pack_index_keys(keys[None])[0].flatten(1)
    return packed


def rows_in(requests, request, at_S, apart):
    """Where a request's keys lie in a cache whose blocks are so many rows apart."""
    block_S = requests.block_BN[request, at_S // BLOCK_SIZE].long()
    return block_S * apart + at_S % BLOCK_SIZE


def there(part):
    """A part of a step on the device of the tests."""
    if isinstance(part, torch.Tensor):
        return part.to(DEVICE)
    if dataclasses.is_dataclass(part):
        fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        return type(part)(**{name: there(value) for name, value in fields.items()})
    return type(part)(*map(there, part)) if isinstance(part, tuple) else part


def attended(backend, layer, requests, q_THD, index):
    """The output; it is poisoned first."""
    out_THD = torch.full_like(q_THD, torch.nan)
    with pin_backend(backend):
        attend_requests(layer, requests, q_THD, index, out_THD)
    return out_THD
