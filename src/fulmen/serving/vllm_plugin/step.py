"""One step of vLLM's scheduler: which tokens are computed, and where in the paged cache their context lies.

A cache is a list of rows; a token's row holds all that a layer keeps of it. Token s of a request lies in row
`block_table[s // block_size] * rows_per_block + s % block_size`.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionMetadata, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheSpec


class Span(NamedTuple):
    """Requests whose queries are computed in one call: some that decode, or one that reads its prompt.

    Attributes:
        tokens: their queries among those of the step.
        requests: the requests among those of the step.
        longest: the most keys that one of the requests has.
        stop_BT: keys that each query sees, itself the last (int64).
    """

    tokens: slice
    requests: slice
    longest: int
    stop_BT: Tensor


class Rows(NamedTuple):
    """Rows of a cache, of the tokens of each request (int32; beyond its end any) and of the new tokens."""

    all_BS: Tensor
    new_T: Tensor


class Angles(NamedTuple):
    """Cosines and sines of the step's tokens.

    Attributes:
        cos_TR, sin_TR: as Transformers has them, each half of R twice.
        padded_2TP: both, of each rotary pair, then of one that does not turn; P = R/2 + 1.
    """

    cos_TR: Tensor
    sin_TR: Tensor
    padded_2TP: Tensor


class Step(AttentionMetadata):
    """What the layers need to know of a step.

    Attributes:
        spans: the queries, cut up.
        n_tokens: queries; a padded batch has more rows.
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
        self._rows: dict[int, Rows] = {}
        self._angles: tuple[Any, Angles] | None = None

    def angles(self, rotary: Any, positions_T: Tensor, dtype: torch.dtype) -> Angles:
        """From the table of vLLM's rotary embedding; the same for all layers that share it."""
        if self._angles is None or self._angles[0] is not rotary:
            cos_TP, sin_TP = rotary.cos_sin_cache[positions_T].to(dtype).chunk(2, -1)
            still_T1 = cos_TP.new_ones(len(positions_T), 1)
            padded = (torch.cat((cos_TP, still_T1), -1), torch.cat((sin_TP, still_T1 - 1), -1))
            cos_TR, sin_TR = (torch.cat((x_TP, x_TP), -1) for x_TP in (cos_TP, sin_TP))
            self._angles = (rotary, Angles(cos_TR, sin_TR, torch.stack(padded)))
        return self._angles[1]

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
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step:
        return Step(common_attn_metadata, self.kv_cache_spec.block_size)


def cut_spans(starts: list[int], lengths: list[int]) -> list[Span]:
    """Request r has `lengths[r]` keys and the queries `starts[r]` to `starts[r + 1]`, its last tokens."""
    counts = [stop - start for start, stop in pairwise(starts)]
    spans, request = [], 0
    while request < len(counts):
        end = request + 1
        while counts[request] == 1 and end < len(counts) and counts[end] == 1:
            end += 1
        if counts[request]:
            back_T = torch.arange(1 - counts[request], 1)
            spans.append(
                Span(
                    slice(starts[request], starts[end]),
                    slice(request, end),
                    max(lengths[request:end]),
                    torch.tensor(lengths[request:end])[:, None] + back_T,
                )
            )
        request = end
    return spans
