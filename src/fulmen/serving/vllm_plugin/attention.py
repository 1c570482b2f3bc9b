"""The attention of a converted layer in vLLM: `fulmen.modeling.attention` over paged caches."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from fulmen.config import DsaConfig
from fulmen.modeling.indexer import GqaIndexer, apply_rope, rotate_half_split
from fulmen.ops.index_keys import SCALE_BYTES
from fulmen.ops.paged import paged_attention, paged_index_topk, store_index_keys
from fulmen.ops.precision import math_dtype
from fulmen.serving.vllm_plugin.caches import IndexKeyCache, KeyValueCache
from fulmen.serving.vllm_plugin.step import Angles, Span, Step


class DsaAttention(nn.Module):
    """Takes the place of a vLLM attention module, whose projections it keeps, and adds `indexer`.

    Tensor parallelism: the indexer and its cache are on every rank whole. It reads all heads' queries and
    keys, gathered from the ranks, so that every rank computes the same scores from the same numbers and
    selects the same tokens; each then attends with its own heads.
    """

    def __init__(self, stock: Any, layer: int, dsa: DsaConfig, vllm_config: VllmConfig, name: str) -> None:
        super().__init__()
        self.qkv_proj, self.o_proj, self.rotary_emb = stock.qkv_proj, stock.o_proj, stock.rotary_emb
        self.q_norm, self.k_norm = getattr(stock, "q_norm", None), getattr(stock, "k_norm", None)
        self.head_dim, self.heads, self.kv_heads = stock.head_dim, stock.num_heads, stock.num_kv_heads
        self.total_kv_heads, self.scale = stock.total_num_kv_heads, stock.scaling
        self.topk, self.layer_topk = dsa.topk, dsa.layer_topk(layer)
        self.indexer = GqaIndexer(vllm_config.model_config.hf_config, dsa)
        self._weights_and_shift: tuple[Tensor, Tensor] | None = None
        self.name = f"{name}.attn"
        self.cache = KeyValueCache(self.name, vllm_config, self.kv_heads, self.head_dim)
        self.index_shape = (dsa.index_n_kv_heads, dsa.index_head_dim + SCALE_BYTES)
        self.index_cache = IndexKeyCache(
            f"{name}.index_keys", vllm_config, self.index_shape[0] * self.index_shape[1]
        )
        vllm_config.compilation_config.static_forward_context[self.name].attention = [self]

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """As the stock attention: hidden states `[T, C]`, positions `[T]`."""
        qkv, _ = self.qkv_proj(hidden_states)
        out = qkv.new_empty(qkv.shape[0], self.heads * self.head_dim)
        torch.ops.vllm.fulmen_dsa_attention(qkv, hidden_states, positions, out, self.name)
        return self.o_proj(out)[0]

    def attend(self, qkv: Tensor, x_TC: Tensor, positions_T: Tensor, step: Step, index_step: Step) -> Tensor:
        """out_THD of the step's queries; stores their keys, values and index keys."""
        heads_TND, v_TGD = qkv.unflatten(-1, (-1, self.head_dim)).split(
            (self.heads + self.kv_heads, self.kv_heads), 1
        )
        q_THD, k_TGD = heads_TND.split((self.heads, self.kv_heads), 1)
        if self.q_norm is not None and self.k_norm is not None:
            q_THD, k_TGD = self.q_norm(q_THD.contiguous()), self.k_norm(k_TGD.contiguous())
            heads_TND = torch.cat((q_THD, k_TGD), 1)
        angles = step.angles(self.rotary_emb, positions_T, qkv.dtype)
        # While every context fits k nothing is selected; the index keys are stored for later all the same.
        scored_THD = q_THD if step.longest > self.topk else None
        index_q_TJE, index_k_TIE = self._index_heads(scored_THD, k_TGD, angles)
        index_inputs = None if index_q_TJE is None else (index_q_TJE, *self._index_weights(x_TC))
        q_THD, k_TGD = apply_rope(heads_TND, angles.cos_TR, angles.sin_TR).split(
            (self.heads, self.kv_heads), 1
        )
        self._store(torch.cat((k_TGD, v_TGD), -1), index_k_TIE, step, index_step)
        out_THD = torch.empty_like(q_THD)
        for span in step.spans:
            shape = (span.stop_BT.shape[0], -1)
            topk_BTK = None
            if index_inputs is not None and span.longest > self.topk:
                index_q_BTJE, w_BTJ, b_BTJ = (x[span.tokens].unflatten(0, shape) for x in index_inputs)
                topk_BTK = self._select(index_q_BTJE, w_BTJ, b_BTJ, span, index_step)
            q_BTHD = q_THD[span.tokens].unflatten(0, shape)
            out_THD[span.tokens] = self._attend_span(q_BTHD, topk_BTK, span, step).flatten(0, 1)
        return out_THD

    def _index_heads(
        self, q_THD: Tensor | None, k_TGD: Tensor, angles: Angles
    ) -> tuple[Tensor | None, Tensor]:
        """index_q_TJE (None without queries) and index_k_TIE: those of `GqaIndexer`, turned together."""
        indexer = self.indexer
        cos_TI1P, sin_TI1P = angles.padded_2TP[:, :, indexer.rope_pairs].unsqueeze(3)
        groups = (indexer.n_kv_heads, -1, indexer.head_dim)
        k_TI1E = indexer.wk(self._all_key_heads(k_TGD).flatten(1)).unflatten(-1, groups)
        if q_THD is None:
            return None, rotate_half_split(k_TI1E, cos_TI1P, sin_TI1P).flatten(1, 2)
        q_TIME = indexer.wq(self._all_query_heads(q_THD).flatten(1)).unflatten(-1, groups)
        both_TINE = rotate_half_split(torch.cat((q_TIME, k_TI1E), 2), cos_TI1P, sin_TI1P)
        return both_TINE[:, :, :-1].flatten(1, 2), both_TINE[:, :, -1]

    def _index_weights(self, x_TC: Tensor) -> tuple[Tensor, Tensor]:
        """w_TJ and b_TJ, by one product."""
        if self._weights_and_shift is None:
            parts = (self.indexer.weights_proj, self.indexer.shift_proj)
            self._weights_and_shift = (
                torch.cat([part.weight for part in parts]),
                torch.cat([part.bias for part in parts]),
            )
        w_TJ, b_TJ = nn.functional.linear(x_TC, *self._weights_and_shift).chunk(2, -1)
        return w_TJ, b_TJ

    def _store(self, kv_TGC: Tensor, index_k_TIE: Tensor, step: Step, index_step: Step) -> None:
        self.cache.rows_RHC()[step.rows(self.cache.rows_per_block).new_T] = kv_TGC
        packed_RX = self.index_cache.rows_RHC()[:, 0]
        store_index_keys(index_k_TIE, packed_RX, index_step.rows(self.index_cache.rows_per_block).new_T)

    def _select(
        self, index_q_BTJE: Tensor, w_BTJ: Tensor, b_BTJ: Tensor, span: Span, index_step: Step
    ) -> Tensor:
        rows_BS = index_step.rows(self.index_cache.rows_per_block).all_BS[span.requests, : span.longest]
        packed_RX = self.index_cache.rows_RHC()[:, 0]
        inputs = (index_q_BTJE.to(math_dtype(index_q_BTJE.dtype)), packed_RX, rows_BS, w_BTJ, b_BTJ)
        return paged_index_topk(*inputs, span.stop_BT, self.layer_topk, self.topk)

    def _attend_span(self, q_BTHD: Tensor, topk_BTK: Tensor | None, span: Span, step: Step) -> Tensor:
        rows_BS = step.rows(self.cache.rows_per_block).all_BS[span.requests, : span.longest]
        k_RGD, v_RGD = self.cache.rows_RHC().split(self.head_dim, -1)
        return paged_attention(q_BTHD, k_RGD, v_RGD, rows_BS, span.stop_BT, topk_BTK, self.scale)

    def _all_query_heads(self, q_THD: Tensor) -> Tensor:
        if get_tensor_model_parallel_world_size() == 1:
            return q_THD
        return tensor_model_parallel_all_gather(q_THD.contiguous(), 1)

    def _all_key_heads(self, k_TGD: Tensor) -> Tensor:
        if get_tensor_model_parallel_world_size() == 1:
            return k_TGD
        gathered_TGD = tensor_model_parallel_all_gather(k_TGD.contiguous(), 1)
        # With more ranks than key heads, neighbours hold the same one.
        return gathered_TGD[:, :: gathered_TGD.shape[1] // self.total_kv_heads]


def fulmen_dsa_attention(
    qkv: Tensor, hidden_states: Tensor, positions: Tensor, out: Tensor, layer_name: str
) -> None:
    """One operation to torch.compile: all that depends on the step."""
    context = get_forward_context()
    steps: Any = context.attn_metadata
    if steps is None:  # vLLM measures memory
        out.zero_()
        return
    (attention,) = context.no_compile_layers[layer_name].attention
    step = steps[layer_name]
    n = step.n_tokens
    out_THD = attention.attend(
        qkv[:n], hidden_states[:n], positions[:n], step, steps[attention.index_cache.name]
    )
    out[:n] = out_THD.flatten(1)


def _fake(qkv: Tensor, hidden_states: Tensor, positions: Tensor, out: Tensor, layer_name: str) -> None:
    return None


direct_register_custom_op("fulmen_dsa_attention", fulmen_dsa_attention, mutates_args=["out"], fake_impl=_fake)
