"""One step of vLLM's scheduler: which tokens are computed, and where in the paged cache their context lies.

A cache is a list of rows; a token's row holds all that a layer keeps of it. Token s of a request lies in row
`block_table[s // block_size] * rows_per_block + s % block_size`.
"""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionMetadata, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheSpec


class Span(NamedTuple):
    """Requests whose queries are computed in one call: some that decode, or one that reads its prompt.

    Attributes:
        tokens: their queries among those of the step; `requests` of them, `queries` each.
        requests: the requests among those of the step.
        queries: how many each request has.
        longest: the most keys that one of the requests has.
    """

    tokens: slice
    requests: slice
    queries: int
    longest: int


class Rows(NamedTuple):
    """Rows of a cache: of each request's tokens `[B, S]` (int32; beyond its end any), of the new tokens `[T]`."""

    all_BS: Tensor
    new_T: Tensor


class Step(AttentionMetadata):
    """What the layers need to know of a step.

    Attributes:
        spans: the queries, cut up.
        n_tokens: queries; a padded batch has more rows.
        stop_T: keys that each query sees, itself the last (int64).
        longest: the most keys that a request has.
    """

    def __init__(self, common: CommonAttentionMetadata, block_size: int) -> None:
        starts = common.query_start_loc_cpu.tolist()
        lengths = common.seq_lens.tolist()
        self.block_size = block_size
        self.spans = cut_spans(starts, lengths)
        self.n_tokens = starts[-1]
        self.longest = max((span.longest for span in self.spans), default=0)
        self._blocks_BN = common.block_table_tensor[:, : -(-self.longest // block_size)]
        self._slots_T = common.slot_mapping[: self.n_tokens]
        self._starts, self._lengths = starts, lengths
        self._rows: dict[int, Rows] = {}

    @cached_property
    def stop_T(self) -> Tensor:
        stops = [
            torch.arange(length - (stop - start), length) + 1
            for start, stop, length in zip(self._starts, self._starts[1:], self._lengths, strict=False)
        ]
        return torch.cat(stops)

    def rows(self, rows_per_block: int) -> Rows:
        """The rows of a cache whose blocks lie `rows_per_block` rows apart."""
        if rows_per_block not in self._rows:
            places = torch.arange(self.block_size, dtype=torch.int32)
            all_BNP = self._blocks_BN[:, :, None] * rows_per_block + places
            block_T, place_T = self._slots_T // self.block_size, self._slots_T % self.block_size
            new_T = block_T * rows_per_block + place_T
            self._rows[rows_per_block] = Rows(all_BNP.flatten(1), new_T.long())
        return self._rows[rows_per_block]


class StepBuilder(AttentionMetadataBuilder[Step]):
    """Makes the `Step` of one cache."""

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step:
        return Step(common_attn_metadata, self.kv_cache_spec.block_size)


def cut_spans(starts: list[int], lengths: list[int]) -> list[Span]:
    """Neighbouring requests with one query each go together; request r has the queries from `starts[r]` on."""
    spans: list[Span] = []
    for request, (start, stop, length) in enumerate(zip(starts, starts[1:], lengths, strict=False)):
        queries = stop - start
        if queries == 0:
            continue
        last = spans[-1] if spans else None
        if last and queries == last.queries == 1 and last.requests.stop == request:
            spans[-1] = Span(
                slice(last.tokens.start, stop),
                slice(last.requests.start, request + 1),
                1,
                max(last.longest, length),
            )
        else:
            spans.append(Span(slice(start, stop), slice(request, request + 1), queries, length))
    return spans
