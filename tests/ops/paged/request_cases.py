"""Steps of several requests over block tables, for the tests of the paged kernels."""

import torch

from fulmen.ops.common.index_keys import pack_index_keys
from fulmen.ops.paged.layer import PagedLayer
from fulmen.ops.paged.project import NewIndexQueries
from fulmen.ops.paged.requests import Requests
from tests.ops.ops_cases import normal

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
APART, INDEX_APART = 6, 4


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
    )


def request_case(shape, step, topk, dense_up_to, dtype=torch.float32, **more):
    """A layer with caches that are poisoned where no key lies, the step's requests, and their queries.

    Some keys are the same, and a low shift shuts most ReLUs: heavy ties, of which some are at the threshold.
    """
    n_heads, kv_heads, width, index_heads, index_kv_heads, index_width = shape
    requests = requests_of(step)
    n_rows = requests.block_BN.numel() * APART
    kv = torch.full((n_rows, kv_heads, 2 * width), torch.nan, dtype=dtype)
    packed = torch.full((n_rows, index_kv_heads * (index_width + 2)), 99, dtype=torch.int8)
    for request, (_, length) in enumerate(step):
        at_S = torch.arange(length)
        block_S = requests.block_BN[request, at_S // BLOCK_SIZE].long()
        kv[block_S * APART + at_S % BLOCK_SIZE] = normal(
            length, kv_heads, 2 * width, seed=request, dtype=dtype
        )
        keys = normal(length, index_kv_heads, index_width, seed=10 + request)
        keys[length // 2 :: 3] = keys[:1]
        rows_S = block_S * INDEX_APART + at_S % BLOCK_SIZE
        packed[rows_S] = pack_index_keys(keys[None])[0].flatten(1)
    pairs = torch.zeros(index_kv_heads, index_width // 2, dtype=torch.int64)
    layer = PagedLayer(kv, packed, pairs, n_heads, index_heads, topk, dense_up_to, width**-0.5, **more)
    count = int(requests.start_Z[-1]) + PADDING
    q_THD = normal(count, n_heads, width, seed=20, dtype=dtype)
    index = NewIndexQueries(
        normal(count, index_heads, index_width, seed=21, dtype=dtype),
        normal(count, index_heads, seed=22, dtype=dtype),
        normal(count, index_heads, seed=23, dtype=dtype) - 0.5,
    )
    return layer, requests, q_THD, index
