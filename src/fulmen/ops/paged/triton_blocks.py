"""How the paged Triton kernels find their queries and keys: requests by their starts, rows by block tables.

Tokens of all requests lie one after the other. A kernel's tile has neighbouring queries of one request, and
which one follows from where requests start, on the device: so a grid depends on sizes alone, and a CUDA graph
replays for other requests. Tiles of request r begin at `start[r] // BLOCK_QUERIES + r`, which leaves each
request a tile more than it may need.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fulmen.ops.paged.requests import Requests
from fulmen.ops.triton_kit import power_of_2

# A kernel is compiled once for all smaller numbers of requests.
FEWEST_REQUESTS = 32


class Queries(NamedTuple):
    """What a launch is for: those of `tokens` that see more than `more_than` keys and at most `at_most`."""

    requests: Requests
    tokens: slice
    more_than: int
    at_most: int

    @property
    def n_tokens(self) -> int:
        """Tokens, among which they are; results of a launch have a row for each."""
        return self.tokens.stop - self.tokens.start

    @property
    def most_keys(self) -> int:
        """At least as many as any of them sees."""
        return min(self.requests.most_keys, self.at_most)

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """Where requests start, and how many keys they have."""
        return self.requests.start_Z, self.requests.length_B

    def numbers(self, block_queries: int) -> tuple[int, int, int, int, int, int]:
        """For a kernel: n_requests, first_tile, first, end, more_than, at_most."""
        first_tile, _ = tiles_of(self.tokens.start, self.tokens.stop, self.requests.count, block_queries)
        bounds = (self.tokens.start, self.tokens.stop, self.more_than, self.at_most)
        return self.requests.count, first_tile, *bounds

    def n_tiles(self, block_queries: int) -> int:
        """Tiles of so many neighbours that may hold some of them."""
        return tiles_of(self.tokens.start, self.tokens.stop, self.requests.count, block_queries)[1]


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
def is_wanted(token, n_left, stop, first, end, more_than, at_most):
    """Whether a query of a tile is one of `Queries`; the numbers are those of `request_of` and `numbers`."""
    return (n_left > 0) & (token >= first) & (token < end) & (stop > more_than) & (stop <= at_most)


@triton.jit
def rows_of(block_N, key_K, present_K, rows_per_block, PAGE: tl.constexpr):
    """int64: in which rows of a cache keys lie, by their request's row of the block table."""
    block_K = tl.load(block_N + key_K // PAGE, mask=present_K, other=0)
    return block_K.to(tl.int64) * rows_per_block + key_K % PAGE


@triton.jit
def rows_from(block_N, low, end, rows_per_block, PAGE: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """`rows_of` the keys `low` and on that lie before `end`: each block is looked up once, where tiles and
    blocks fit into one another. `low` is a multiple of BLOCK_KEYS.
    """
    if BLOCK_KEYS % PAGE == 0 and (PAGE & (PAGE - 1)) == 0:
        page_N = low // PAGE + tl.arange(0, BLOCK_KEYS // PAGE)
        first_N = tl.load(block_N + page_N, mask=page_N * PAGE < end, other=0).to(tl.int64) * rows_per_block
        return tl.reshape(first_N[:, None] + tl.arange(0, PAGE)[None, :], [BLOCK_KEYS])
    key_K = low + tl.arange(0, BLOCK_KEYS)
    return rows_of(block_N, key_K, key_K < end, rows_per_block, PAGE)
