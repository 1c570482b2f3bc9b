"""The attention of a converted layer in vLLM: `fulmen.modeling.attention` over paged caches."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from fulmen.config import DsaConfig
from fulmen.modeling.indexer import GqaIndexer
from fulmen.ops.index_keys import SCALE_BYTES
from fulmen.ops.paged import paged_attention, paged_index_topk
from fulmen.ops.paged_decode import Projections, paged_decode
from fulmen.ops.paged_layer import PagedLayer, store_tokens
from fulmen.serving.vllm_plugin.caches import IndexKeyCache, KeyValueCache
from fulmen.serving.vllm_plugin.step import Rows, Span, Step


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
        if torch.compiler.is_compiling():
            torch.ops.vllm.fulmen_dsa_attention(qkv, hidden_states, positions, out, self.name)
        else:
            fulmen_dsa_attention(qkv, hidden_states, positions, out, self.name)
        return self.o_proj(out)[0]

    def attend(self, qkv: Tensor, x_TC: Tensor, positions_T: Tensor, step: Step, index_step: Step) -> Tensor:
        """out_THD of the step's queries; stores their keys, values and index keys."""
        heads = self._heads(qkv)
        rows = step.rows(self.cache.rows_per_block)
        index_rows = index_step.rows(self.index_cache.rows_per_block)
        tokens = step.tokens(self.rotary_emb, positions_T, qkv.dtype, rows, index_rows)
        all_q_TX = self._all_query_heads(heads[0]).flatten(1)
        all_k_TX = self._all_key_heads(heads[1]).flatten(1)
        if step.only_decodes:
            seen = step.sequences(rows, index_rows)
            inputs = (*heads, all_q_TX, all_k_TX, x_TC)
            return paged_decode(self._paged_layer(), self._projections, tokens, seen, *inputs)
        # While every context fits k nothing is selected; the index keys are stored for later all the same.
        index_q_TJE, w_TJ, b_TJ = (
            self._index_queries(all_q_TX, x_TC) if step.longest > self.topk else [None] * 3
        )
        index_heads = (index_q_TJE, self._index_keys(all_k_TX))
        q_THD, index_q_TJE = store_tokens(self._paged_layer(), tokens, *heads, *index_heads)
        index_inputs = None if index_q_TJE is None else (index_q_TJE, w_TJ, b_TJ)
        out_THD = torch.empty_like(q_THD)
        for span in step.spans:
            out_THD[span.tokens] = self._attend_span(q_THD, index_inputs, span, rows, index_rows)
        return out_THD

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q_THD, k_TGD, v_TGD before RoPE."""
        heads = (self.heads, self.kv_heads, self.kv_heads)
        q_THD, k_TGD, v_TGD = qkv.unflatten(-1, (-1, self.head_dim)).split(heads, 1)
        if self.q_norm is not None and self.k_norm is not None:
            q_THD, k_TGD = self.q_norm(q_THD.contiguous()), self.k_norm(k_TGD.contiguous())
        return q_THD, k_TGD, v_TGD

    def _paged_layer(self) -> PagedLayer:
        kept = self.__dict__.get("_kept_layer")
        if kept is None or kept[0] is not self.cache.kv_cache:
            caches = (self.cache.rows_RHC(), self.index_cache.rows_RHC()[:, 0], self.indexer.rope_pairs)
            heads = (self.heads, self.indexer.n_heads)
            kept = (self.cache.kv_cache, PagedLayer(*caches, *heads, self.layer_topk, self.topk, self.scale))
            self.__dict__["_kept_layer"] = kept
        return kept[1]

    @cached_property
    def _projections(self) -> Projections:
        """The indexer's weights, those of its weights and shifts as one matrix."""
        parts = (self.indexer.weights_proj, self.indexer.shift_proj)
        both = (torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts]))
        return Projections(self.indexer.wq.weight, self.indexer.wk.weight, *both)

    @cached_property
    def _products(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        """The same as functions of many tokens, each as fast as vLLM's own."""
        by = self._projections
        matrices = ((by.q_YX, None), (by.k_YX, None), (by.w_YC, by.bias_Y))
        return tuple(_prepared(*matrix) for matrix in matrices)

    def _index_queries(self, all_q_TX: Tensor, x_TC: Tensor) -> list[Tensor]:
        """index_q_TJE before RoPE, w_TJ, b_TJ: as `GqaIndexer.queries`."""
        project_q, _, project_both = self._products
        index_q_TJE = project_q(all_q_TX).unflatten(-1, (self.indexer.n_heads, -1))
        return [index_q_TJE, *project_both(x_TC).chunk(2, -1)]

    def _index_keys(self, all_k_TX: Tensor) -> Tensor:
        """index_k_TIE before RoPE."""
        return self._products[1](all_k_TX).unflatten(-1, (self.indexer.n_kv_heads, -1))

    def _attend_span(
        self, q_THD: Tensor, index_inputs: Any, span: Span, rows: Rows, index_rows: Rows
    ) -> Tensor:
        """out_NHD of a span's queries."""
        layer, shape = self._paged_layer(), (span.stop_BT.shape[0], -1)
        rows_BS, index_rows_BS = (x.all_BS[span.requests, : span.longest] for x in (rows, index_rows))
        topk_BTK = None
        if index_inputs is not None and span.longest > self.topk:
            index_q_BTJE, w_BTJ, b_BTJ = (x[span.tokens].unflatten(0, shape) for x in index_inputs)
            inputs = (index_q_BTJE, layer.packed_RX, index_rows_BS, w_BTJ, b_BTJ, span.stop_BT)
            topk_BTK = paged_index_topk(*inputs, layer.topk, layer.whole)
        q_BTHD = q_THD[span.tokens].unflatten(0, shape)
        out_BTHD = paged_attention(q_BTHD, layer.kv_RGC, rows_BS, span.stop_BT, topk_BTK, self.scale)
        return out_BTHD.flatten(0, 1)

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


def _prepared(weight_YX: Tensor, bias_Y: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A product; on a CPU by vLLM's packed weights."""
    if not current_platform.is_cpu():
        return lambda x: nn.functional.linear(x, weight_YX, bias_Y)
    layer: Any = nn.Module()
    layer.weight, layer.bias = nn.Parameter(weight_YX, requires_grad=False), bias_Y
    dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    return lambda x: layer.cpu_linear(x, layer.weight, layer.bias)


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
