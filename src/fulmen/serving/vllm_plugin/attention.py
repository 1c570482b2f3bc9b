"""The attention of a converted layer in vLLM: `fulmen.modeling.gqa.attention` over paged caches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.config import CompilationConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from fulmen.config import COARSE_FROM, DsaConfig
from fulmen.modeling.gqa.attention import pairs_apart
from fulmen.modeling.gqa.indexer import GqaIndexer
from fulmen.ops.common.index_keys import SCALE_BYTES
from fulmen.ops.paged import paged_attention
from fulmen.ops.paged.layer import CoarseCache, PagedLayer
from fulmen.ops.paged.project import Projections, project_and_store
from fulmen.ops.paged.requests import (
    StepBounds,
    attend_requests,
    require_paged_kernels,
    reserve_workspace,
)
from fulmen.ops.paged.sparse import KeyRows, paged_selection, paged_sparse_attention
from fulmen.serving.vllm_plugin.caches import KeyValueCache
from fulmen.serving.vllm_plugin.layer_caches import JointCache, caches_of_layer
from fulmen.serving.vllm_plugin.step import DeviceLayout, Span, Step
from fulmen.serving.vllm_plugin.weights import IndexerWeights

# As torch.compile's graphs name it.
OPERATION = "vllm::fulmen_dsa_attention"


class Kept(NamedTuple):
    """A layer over its caches from step to step, and what it was made of.

    All in one tuple: for every layer of every token, each look-up by `nn.Module` costs as much as a check.
    """

    layer: PagedLayer
    rows_per_block: tuple[int, ...]
    rotary: nn.Module
    cache: KeyValueCache | JointCache
    kv_cache: Tensor
    index_buffers: dict[str, Tensor | None]
    coarse_buffers: dict[str, Tensor | None]

    @property
    def holds(self) -> bool:
        """Whether neither the cache nor the indexer's pairs, of both levels, have been replaced."""
        if self.kv_cache is not self.cache.kv_cache:
            return False
        coarse, buffers = self.layer.coarse, self.coarse_buffers
        if coarse is not None and coarse.rope_pairs_P is not buffers["rope_pairs"]:
            return False
        return self.layer.rope_pairs_IP is self.index_buffers["rope_pairs"]


class DsaAttention(nn.Module):
    """Takes the place of a vLLM attention module, whose projections it keeps, and adds `indexer`.

    Tensor parallelism: the indexer and its cache are on every rank whole. It reads all heads' queries and
    keys, gathered from the ranks, so that every rank computes the same scores from the same numbers and
    selects the same tokens; each then attends with its own heads.
    """

    def __init__(
        self, stock: Any, rotary: Any, layer: int, dsa: DsaConfig, vllm_config: VllmConfig, name: str
    ) -> None:
        super().__init__()
        self.qkv_proj, self.o_proj, self.rotary_emb = stock.qkv_proj, stock.o_proj, rotary
        self.q_norm, self.k_norm = getattr(stock, "q_norm", None), getattr(stock, "k_norm", None)
        self.sinks = getattr(stock, "sinks", None)
        self.head_dim, self.heads, self.kv_heads = stock.head_dim, stock.num_heads, stock.num_kv_heads
        self.total_kv_heads, self.scale = stock.total_num_kv_heads, stock.scaling
        self.softcap = getattr(vllm_config.model_config.hf_config, "attn_logit_softcapping", None)
        # A factor of each position, which RoPE does not change: before it is as good as after.
        scaled = getattr(stock, "do_llama_4_scaling", False)
        self._query_scale = stock._get_llama_4_attn_scale if scaled else None
        # LongRoPE's table has no such word: it turns halves.
        halves = getattr(rotary, "is_neox_style", True)
        self._pairs_apart = None if halves else pairs_apart(self.head_dim, rotary.rotary_dim)
        self.topk, self.layer_topk = dsa.topk, dsa.layer_topk(layer)
        self.indexer = GqaIndexer(vllm_config.model_config.hf_config, dsa).requires_grad_(False)
        # Before any weights come: biases are then read in the precision that the checkpoint has.
        self._weights = IndexerWeights(self.indexer)
        self._kept: Kept | None = None
        self._ranks = get_tensor_model_parallel_world_size()
        widths = [dsa.index_n_kv_heads * (dsa.index_head_dim + SCALE_BYTES)]
        if dsa.coarse_head_dim:
            widths.append(dsa.coarse_head_dim + SCALE_BYTES)
        caches = caches_of_layer(name, vllm_config, self.kv_heads, self.head_dim, widths)
        self.cache, self.index_cache, self.coarse_cache = caches
        self.name, self.index_name = self.cache.name, self.index_cache.name
        self.coarse_name = None if self.coarse_cache is None else self.coarse_cache.name
        self.n_candidates = dsa.candidates(layer)
        self._bounds = (vllm_config.model_config.max_model_len, vllm_config.scheduler_config.max_num_seqs)
        if (kind := vllm_config.device_config.device_type) != "cpu":
            dtype: Any = vllm_config.model_config.dtype  # resolved by now
            require_paged_kernels(name, kind, dtype, self.head_dim, max(self.topk, self.layer_topk))
        # Called with topk_BTK and stop_BT where a prompt's queries select; not for tokens that are decoded.
        self.told: Callable[[Tensor, Tensor], None] | None = None
        vllm_config.compilation_config.static_forward_context[self.name].attention = [self]
        keep_out_of_graphs(vllm_config.compilation_config)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """As the stock attention: hidden states `[T, C]`, positions `[T]`, or `[3, T]` of a text's tokens."""
        qkv, _ = self.qkv_proj(hidden_states)
        return self.o_proj(self.heads_output(qkv, hidden_states, positions))[0]

    def heads_output(self, qkv: Tensor, hidden_states: Tensor, positions: Tensor) -> Tensor:
        """What the heads give, side by side, of what `qkv_proj` gave."""
        if positions.ndim > 1:
            # Time, height and width: only the tokens of an image have three.
            positions = positions[0]
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = self._heads(qkv)
            normed = (self.q_norm(q.contiguous()), self.k_norm(k.contiguous()), v)
            qkv = torch.cat([x.flatten(1) for x in normed], -1)
        if self._pairs_apart is not None:
            q, k, v = self._heads(qkv)
            reordered = (q[..., self._pairs_apart], k[..., self._pairs_apart], v)
            qkv = torch.cat([x.flatten(1) for x in reordered], -1)
        if self._query_scale is not None:
            q, k, v = self._heads(qkv)
            scaled = (q * self._query_scale(positions)[..., None]).to(q.dtype)
            qkv = torch.cat([x.flatten(1) for x in (scaled, k, v)], -1)
        out = qkv.new_empty(qkv.shape[0], self.heads * self.head_dim)
        attend_as_one_operation(qkv, hidden_states, positions, out, self.name)
        return out

    def forget(self) -> None:
        """To be called when its weights have been replaced: what was made of them is made anew."""
        self._kept = None

    def attend(
        self,
        qkv: Tensor,
        x_TC: Tensor,
        positions_T: Tensor,
        step: Step,
        index_steps: tuple[Step, Step | None],
        out_TX: Tensor,
    ) -> None:
        """Fill `out_TX` for the step's queries; store their keys, values and index keys.

        `index_steps`: the step in the caches of index keys and, of an index in two levels, of coarse keys.
        """
        kept = self._kept_layer()
        layer = kept.layer
        if qkv.device.type != "cpu":
            where_all = step.device_layout(
                index_steps, kept.rows_per_block, kept.rotary, positions_T, qkv.dtype
            )
            self._attend_on_device(layer, where_all, qkv, x_TC, out_TX)
            return
        where = step.layout(index_steps, kept.rows_per_block, kept.rotary, positions_T, qkv.dtype)
        all_qk_TX = qkv if self._ranks == 1 else self._gathered(qkv)
        if step.only_decodes:
            inputs = (qkv, all_qk_TX, x_TC, out_TX)
            where.decode(layer, self._projections, where.tokens, where.sequences[0], *inputs)
            return
        # While every context fits k nothing is selected, and while all keys are candidates the coarse level
        # is not asked; keys of both levels are stored for later all the same.
        new = (self._projections, where.tokens, qkv, all_qk_TX, x_TC)
        q_THD, index = project_and_store(layer, *new, longest=step.longest)
        for span, sequences in zip(step.spans, where.sequences, strict=True):
            self._attend_span(layer, q_THD, index, span, sequences, out_TX[span.tokens])

    def reserve(self, out_TX: Tensor) -> None:
        """Take and give back what a step of as many tokens may take beside its results, which are 0."""
        out_TX.zero_()
        if out_TX.device.type != "cpu":
            coarse = (self.n_candidates, COARSE_FROM * self.n_candidates) if self.coarse_name else (0, 0)
            most_kept = (self.layer_topk, max(self.topk, self.layer_topk))
            bounds = StepBounds(*most_kept, *self._bounds, *coarse)
            reserve_workspace(out_TX.unflatten(1, (self.heads, self.head_dim)), bounds)

    def _attend_on_device(
        self, layer: PagedLayer, where: DeviceLayout, qkv: Tensor, x_TC: Tensor, out_TX: Tensor
    ) -> None:
        """The same on a GPU: all requests at once, and nothing is asked of it."""
        all_qk_TX = qkv if self._ranks == 1 else self._gathered(qkv)
        new = (self._projections, where.tokens, qkv, all_qk_TX, x_TC)
        q_THD, index = project_and_store(layer, *new, longest=where.requests.most_keys)
        attend_requests(layer, where.requests, q_THD, index, out_TX.unflatten(1, q_THD.shape[1:]))

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q_THD, k_TGD, v_TGD before RoPE."""
        heads = (self.heads, self.kv_heads, self.kv_heads)
        return qkv.unflatten(-1, (-1, self.head_dim)).split(heads, 1)

    def _kept_layer(self) -> Kept:
        if self._kept is None or not self._kept.holds:
            caches = (self.cache.rows_RHC(), self.index_cache.rows_RHC()[:, 0], self.indexer.rope_pairs)
            heads = (self.heads, self.indexer.n_heads)
            budget, softmax = (self.layer_topk, self.topk), (self.softcap, self.sinks)
            layer = PagedLayer(*caches, *heads, *budget, self.scale, self._coarse(), *softmax)
            all_caches = (self.cache, self.index_cache, self.coarse_cache)
            apart = tuple(0 if one is None else one.rows_per_block for one in all_caches)
            coarse_buffers = {} if self.indexer.coarse is None else self.indexer.coarse._buffers
            places = (self.cache, self.cache.kv_cache, self.indexer._buffers, coarse_buffers)
            self._kept = Kept(layer, apart, self.rotary_emb, *places)
        return self._kept

    def _coarse(self) -> CoarseCache | None:
        if self.coarse_cache is None or self.indexer.coarse is None:
            return None
        packed_RX = self.coarse_cache.rows_RHC()[:, 0]
        coarse, count = self.indexer.coarse, self.n_candidates
        return CoarseCache(packed_RX, coarse.rope_pairs, coarse.n_heads, count, COARSE_FROM * count)

    @property
    def _projections(self) -> Projections:
        if not self._weights.hold:
            self._weights = IndexerWeights(self.indexer)
        return self._weights.projections

    def _attend_span(
        self, layer: PagedLayer, q_THD: Tensor, index: Any, span: Span, key_rows: KeyRows, out_TX: Tensor
    ) -> None:
        """Fill `out_TX` for a span's queries."""
        shape = key_rows.stop_BT.shape
        q_BTHD = q_THD[span.tokens].unflatten(0, shape)
        out_BTHD = out_TX.unflatten(1, q_THD.shape[1:]).unflatten(0, shape)
        if index is not None and span.longest > self.topk:
            index_q_BTJE, w_BTJ, b_BTJ = (x[span.tokens].unflatten(0, shape) for x in index[:3])
            coarse = [None if x is None else x[span.tokens].unflatten(0, shape) for x in index[3:]]
            paged_sparse_attention(layer, q_BTHD, index_q_BTJE, w_BTJ, b_BTJ, key_rows, out_BTHD, *coarse)
            if self.told is not None:
                topk_BTK = paged_selection(layer, index_q_BTJE, w_BTJ, b_BTJ, key_rows, *coarse)
                self.told(topk_BTK, key_rows.stop_BT)
        else:
            dense = (layer.kv_RGC, key_rows.rows_BS, key_rows.stop_BT, None, *layer.softmax)
            out_BTHD.copy_(paged_attention(q_BTHD, *dense))

    def _gathered(self, qkv: Tensor) -> Tensor:
        """Queries and keys of all ranks' heads, side by side."""
        q_THD, k_TGD, _ = self._heads(qkv)
        all_q_THD = tensor_model_parallel_all_gather(q_THD.contiguous(), 1)
        all_k_TGD = tensor_model_parallel_all_gather(k_TGD.contiguous(), 1)
        # With more ranks than key heads, neighbours hold the same one.
        all_k_TGD = all_k_TGD[:, :: all_k_TGD.shape[1] // self.total_kv_heads]
        return torch.cat((all_q_THD.flatten(1), all_k_TGD.flatten(1)), 1)


def fulmen_dsa_attention(
    qkv: Tensor, hidden_states: Tensor, positions: Tensor, out: Tensor, layer_name: str
) -> None:
    """One operation to torch.compile: all that depends on the step."""
    context = get_forward_context()
    steps: Any = context.attn_metadata
    (attention,) = context.no_compile_layers[layer_name].attention
    if steps is None:  # vLLM measures memory
        attention.reserve(out)
        return
    step = steps[layer_name]
    if step.n_tokens != len(qkv):  # a padded batch
        qkv, hidden_states, positions, out = (
            x[: step.n_tokens] for x in (qkv, hidden_states, positions, out)
        )
    coarse_step = None if attention.coarse_name is None else steps[attention.coarse_name]
    index_steps = (steps[attention.index_name], coarse_step)
    attention.attend(qkv, hidden_states, positions, step, index_steps, out)


def attend_as_one_operation(
    qkv: Tensor, hidden_states: Tensor, positions: Tensor, out: Tensor, layer_name: str
) -> None:
    """`fulmen_dsa_attention` of the layer, which a compiler does not look into."""
    if torch.compiler.is_compiling():
        torch.ops.vllm.fulmen_dsa_attention(qkv, hidden_states, positions, out, layer_name)
    else:
        fulmen_dsa_attention(qkv, hidden_states, positions, out, layer_name)


def keep_out_of_graphs(compilation: CompilationConfig) -> None:
    """Where vLLM cuts a model at its own attention, to capture the pieces as CUDA graphs, cut it here, too.

    In a piece that is captured, this attention would be what it is while vLLM captures: zeros.
    """
    if compilation.splitting_ops and OPERATION not in compilation.splitting_ops:
        compilation.splitting_ops.append(OPERATION)


def _fake(qkv: Tensor, hidden_states: Tensor, positions: Tensor, out: Tensor, layer_name: str) -> None:
    return None


direct_register_custom_op("fulmen_dsa_attention", fulmen_dsa_attention, mutates_args=["out"], fake_impl=_fake)
