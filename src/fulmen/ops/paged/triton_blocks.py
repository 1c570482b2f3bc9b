"""How the paged Triton kernels find their queries and keys: requests by their starts, rows by block tables.

Tokens of all requests lie one after the other. A kernel's tile has neighbouring queries of one request, and
which one follows from where requests start, on the device: so a grid depends on sizes alone, and a CUDA graph
replays for other requests. Tiles of request r begin at `start[r] // BLOCK_QUERIES + r`, which leaves each
request a tile more than it may need.
"""

import triton
import triton.language as tl

from fulmen.ops.triton_kit import power_of_2

# A kernel is compiled once for all smaller numbers of requests.
FEWEST_REQUESTS = 32


def tiles_of(first: int, end: int, n_requests: int, block_queries: int) -> tuple[int, int]:
    """Of tokens `first` to `end`: the first tile that may hold some, and how many tiles may."""
    first_tile = first // block_queries
    return first_tile, (max(end, 1) - 1) // block_queries + n_requests - first_tile


def requests_held(n_requests: int) -> int:
    """As many as a kernel looks through at once."""
    return power_of_2(n_requests, FEWEST_REQUESTS)


@triton.jit
def request_of(
    start_Z, length_B, tile, n_requests, BLOCK_QUERIES: tl.constexpr, BLOCK_REQUESTS: tl.constexpr
):
    """Of a tile: its request, first token, how many of the request's tokens follow that, keys it sees."""
    request_B = tl.arange(0, BLOCK_REQUESTS)
    # All at once: a search would wait for one load after the other.
    first_B = tl.load(start_Z + request_B, mask=request_B < n_requests, other=1 << 30)
    begin_B = first_B // BLOCK_QUERIES + request_B
    request = tl.sum((begin_B <= tile).to(tl.int32), 0) - 1
    start = tl.load(start_Z + request)
    end = tl.load(start_Z + request + 1)
    token = start + (tile - start // BLOCK_QUERIES - request) * BLOCK_QUERIES
    # The request's last token sees all of its keys.
    stop = tl.load(length_B + request) - (end - token) + 1
    return request, token, end - token, stop


@triton.jit
def rows_of(block_N, key_K, present_K, rows_per_block, PAGE: tl.constexpr):
    """int64: in which rows of a cache keys lie, by their request's row of the block table."""
    block_K = tl.load(block_N + key_K // PAGE, mask=present_K, other=0)
    return block_K.to(tl.int64) * rows_per_block + key_K % PAGE
