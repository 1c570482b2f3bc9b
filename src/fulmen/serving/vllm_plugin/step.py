"""One step of vLLM's scheduler: which tokens are computed, and where in the paged cache their context lies.

A cache is a list of rows; a token's row holds all that a layer keeps of it. Token s of a request lies in row
`block_table[s // block_size] * rows_per_block + s % block_size`.

Nothing is read back from the caches' device, which would have to finish its work first: how a step is cut up
follows from what vLLM has on the host, how many keys a query sees stays on the device. On a GPU it is not cut
up at all: the kernels find each request by vLLM's own buffers, which a CUDA graph reads anew when it replays.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheSpec

from fulmen.ops.dispatch import implementation
from fulmen.ops.paged.layer import NewTokens
from fulmen.ops.paged.requests import Requests
from fulmen.ops.paged.sparse import KeyRows
from fulmen.serving.vllm_plugin.rope import rotary_rows

# As many tokens as pass through a layer faster in one call than by matrix products of their own.
FEW = 32


class Span(NamedTuple):
    """Requests whose queries are computed in one call: some that decode, or one that reads its prompt.

    Attributes:
        tokens: their queries among those of the step.
        requests: the requests among those of the step.
        longest: the most keys that one of the requests may have. While vLLM does not know yet how many drafts
            of the step before were taken, more than it has.
        stop_BT: keys that each query sees, itself the last (int64).
    """

    tokens: slice
    requests: slice
    longest: int
    stop_BT: Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a cache, of the tokens of each request (int32; beyond its end any) and of the new tokens."""

    all_BS: Tensor
    new_T: Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """Where a step's tokens and their contexts lie in the caches of a layer.

    Attributes:
        sequences: of each span.
    """

    tokens: NewTokens
    sequences: list[KeyRows]

    @cached_property
    def decode(self) -> Callable[..., None]:
        """What computes `paged_decode` for all layers, whose tensors fit as they are this plugin's own.

        To choose it and to check them for every layer takes as long as a third of its work.
        """
        return implementation("paged_decode", self.tokens.rows_T.device, self.tokens.cos_TP.dtype).run


class DeviceLayout(NamedTuple):
    """The same for a GPU's kernels, which take all requests at once."""

    tokens: NewTokens
    requests: Requests


class Step(AttentionMetadata):
    """What the layers need to know of a step; of that of an index cache they ask for rows alone.

    Attributes:
        n_tokens: queries; a padded batch has more rows. On a GPU padding is computed, too: a CUDA graph is of
            one size.
    """

    def __init__(self, common: CommonAttentionMetadata, block_size: int) -> None:
        self.block_size, self._common = block_size, common
        self._starts = common.query_start_loc_cpu.tolist()
        on_host = common.seq_lens.device.type == "cpu"
        self.n_tokens = self._starts[-1] if on_host else common.num_actual_tokens
        self._layouts: dict[Any, Layout] = {}
        self._device_layouts: dict[Any, DeviceLayout] = {}

    @cached_property
    def spans(self) -> list[Span]:
        """The queries, cut up."""
        bounds = self._common.seq_lens_cpu_upper_bound
        assert bounds is not None, "vLLM's runners give it for every target model"
        return cut_spans(self._starts, bounds.tolist(), self._common.seq_lens)

    @cached_property
    def longest(self) -> int:
        """The most keys that a request may have."""
        return max((span.longest for span in self.spans), default=0)

    @cached_property
    def only_decodes(self) -> bool:
        """Whether every request has one query, and they are few."""
        return len(self.spans) == 1 and self.n_tokens == len(self._starts) - 1 <= FEW

    def layout(
        self,
        index_steps: "tuple[Step, Step | None]",
        rows_per_block: tuple[int, ...],
        rotary: Any,
        positions_T: Tensor,
        dtype: torch.dtype,
    ) -> Layout:
        """For layers whose caches are cut like this and turn like this; kept for the further ones."""
        key = (rows_per_block, id(rotary))
        if key not in self._layouts:
            rows = self._rows(rows_per_block[0])
            index_rows, coarse_rows = (
                self._rows_of(other, apart, rows, rows_per_block[0])
                for other, apart in zip(index_steps, rows_per_block[1:], strict=True)
            )
            assert index_rows is not None
            cos_TP, sin_TP = rotary_rows(rotary, positions_T).to(dtype).chunk(2, -1)
            new_coarse_T = None if coarse_rows is None else coarse_rows.new_T
            tokens = NewTokens(rows.new_T, index_rows.new_T, cos_TP, sin_TP, new_coarse_T)
            sequences = [_of_span(span, rows, index_rows, coarse_rows) for span in self.spans]
            self._layouts[key] = Layout(tokens, sequences)
        return self._layouts[key]

    def device_layout(
        self,
        index_steps: "tuple[Step, Step | None]",
        rows_per_block: tuple[int, ...],
        rotary: Any,
        positions_T: Tensor,
        dtype: torch.dtype,
    ) -> DeviceLayout:
        """As `layout`, for the kernels of a GPU: views of vLLM's buffers, and each new token's rows."""
        key = (rows_per_block, id(rotary))
        if key not in self._device_layouts:
            cos_TP, sin_TP = rotary_rows(rotary, positions_T).to(dtype).chunk(2, -1)
            rows_T, index_rows_T, coarse_rows_T = (
                None if step is None else step._new_rows(apart)
                for step, apart in zip((self, *index_steps), rows_per_block, strict=True)
            )
            assert rows_T is not None
            assert index_rows_T is not None
            tokens = NewTokens(rows_T, index_rows_T, cos_TP, sin_TP, coarse_rows_T)
            common = self._common
            own_apart, index_apart, coarse_apart = rows_per_block
            requests = Requests(
                block_BN=common.block_table_tensor,
                start_Z=common.query_start_loc,
                length_B=common.seq_lens,
                block_size=self.block_size,
                rows_per_block=own_apart,
                index_rows_per_block=index_apart,
                most_queries=common.max_query_len,
                most_keys=min(common.max_seq_len, common.block_table_tensor.shape[1] * self.block_size),
                coarse_rows_per_block=coarse_apart,
            )
            self._device_layouts[key] = DeviceLayout(tokens, requests)
        return self._device_layouts[key]

    def _rows_of(self, other: "Step | None", apart: int, own: Rows, own_apart: int) -> Rows | None:
        """The rows of another cache, which are mostly the same; None: there is none."""
        if other is None:
            return None
        return own if apart == own_apart and other._has_blocks_of(self) else other._rows(apart)

    def _has_blocks_of(self, other: "Step") -> bool:
        mine, theirs = self._common, other._common
        same_slots = mine.slot_mapping is theirs.slot_mapping and self.block_size == other.block_size
        return same_slots and mine.block_table_tensor is theirs.block_table_tensor

    def _rows(self, rows_per_block: int) -> Rows:
        """The rows of a cache whose blocks lie `rows_per_block` rows apart."""
        blocks_BN = self._common.block_table_tensor[:, : -(-self.longest // self.block_size)]
        row_P = torch.arange(self.block_size, dtype=torch.int32, device=blocks_BN.device)
        all_BNP = blocks_BN[:, :, None] * rows_per_block + row_P
        return Rows(all_BNP.flatten(1), self._new_rows(rows_per_block))

    def _new_rows(self, rows_per_block: int) -> Tensor:
        """Rows of the new tokens; negative for padding, whose slots are -1."""
        new_T = self._common.slot_mapping[: self.n_tokens].long()
        if rows_per_block != self.block_size:  # else a slot is its row
            new_T = new_T // self.block_size * rows_per_block + new_T % self.block_size
        return new_T


class StepBuilder(AttentionMetadataBuilder[Step]):
    """Makes the `Step` of one cache."""

    # A CUDA graph replays decoding for other requests, with drafts or without: sizes of launches follow from
    # sizes of tensors and vLLM's bounds, which are those of the longest text while it captures.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

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

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Step:
        """As `build`; the kernels that run while vLLM captures are to read few keys of its empty caches."""
        common_attn_metadata.seq_lens.fill_(common_attn_metadata.max_query_len)
        return self.build(0, common_attn_metadata)


def _of_span(span: Span, rows: Rows, index_rows: Rows, coarse_rows: Rows | None) -> KeyRows:
    at = (span.requests, slice(span.longest))
    coarse_BS = None if coarse_rows is None else coarse_rows.all_BS[at]
    return KeyRows(rows.all_BS[at], index_rows.all_BS[at], span.stop_BT, coarse_BS)


def cut_spans(starts: list[int], bounds: list[int], length_B: Tensor) -> list[Span]:
    """Request r has `length_B[r]` keys and the queries `starts[r]` to `starts[r + 1]`, its last tokens.

    Args:
        bounds: at least those lengths, known on the host.
        length_B: integers, on the device of the caches, where they stay.
    """
    counts = [stop - start for start, stop in pairwise(starts)]
    spans, request = [], 0
    while request < len(counts):
        end = request + 1
        while counts[request] == 1 and end < len(counts) and counts[end] == 1:
            end += 1
        if counts[request]:
            stop_BT = length_B[request:end, None].long()
            if counts[request] > 1:
                stop_BT = stop_BT + torch.arange(1 - counts[request], 1, device=length_B.device)
            tokens, longest = slice(starts[request], starts[end]), max(bounds[request:end])
            spans.append(Span(tokens, slice(request, end), longest, stop_BT))
        request = end
    return spans
