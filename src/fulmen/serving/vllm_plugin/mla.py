"""A converted DeepSeek model in vLLM on a CPU: `fulmen.modeling.mla` over paged caches.

On GPUs vLLM's own class serves it; on a CPU that refuses sparse MLA. Here vLLM builds the dense model, and
its attention is swapped, as the GQA families' is, for the operations of `fulmen.modeling.mla.attention`.
A prompt's queries read a copy of their context, tokens that are decoded one of the keys that they select.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v32.modeling_deepseek_v32 import (
    DeepseekV32Indexer,
    DeepseekV32RotaryEmbedding,
    yarn_apply_mscale,
)
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.deepseek_v2 import DeepseekV3ForCausalLM
from vllm.model_executor.models.utils import PPMissingLayer, maybe_prefix

from fulmen.errors import ConfigError
from fulmen.modeling.mla.attention import (
    MlaIndexInputs,
    MlaStates,
    absorb_and_rotate,
    mla_index_inputs,
    mla_up_projections,
)
from fulmen.modeling.mla.convert import V32_ROUTING
from fulmen.ops.attention.dense import dense_attention
from fulmen.ops.attention.sparse import sparse_attention
from fulmen.ops.paged.sparse import KeyRows
from fulmen.ops.topk import index_topk
from fulmen.serving.vllm_plugin import require_in_vllm
from fulmen.serving.vllm_plugin.attention import attend_as_one_operation, keep_out_of_graphs
from fulmen.serving.vllm_plugin.caches import LatentCache, MlaIndexKeyCache
from fulmen.serving.vllm_plugin.models import require_settings
from fulmen.serving.vllm_plugin.products import take_products_from_torch
from fulmen.serving.vllm_plugin.step import Span, Step
from fulmen.serving.vllm_plugin.weights import pack_experts_anew, watch_head


class RopeTable(NamedTuple):
    """Cosines and sines of all positions, as vLLM's tables hold them."""

    cos_sin_cache: Tensor


class MlaDsaForCausalLM(DeepseekV3ForCausalLM):
    """vLLM's DeepseekV3ForCausalLM with an indexer and sparse attention in every layer."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = _require_servable_mla(vllm_config)
        take_products_from_torch(vllm_config.model_config.dtype)
        for key, value in V32_ROUTING.items():  # what Transformers' own files do not say
            setattr(config, key, value)
        # Before vLLM renames the kind of RoPE.
        rotary = _rope_table(config, vllm_config.model_config.max_model_len)
        scale = yarn_apply_mscale(
            config.rope_parameters, (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
        )
        with _dense_to_vllm(config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        for layer, block in enumerate(self.model.layers):
            if not isinstance(block, PPMissingLayer):
                name = f"{maybe_prefix(prefix, 'model')}.layers.{layer}.self_attn"
                block.self_attn = MlaDsaAttention(block.self_attn, layer, rotary, scale, vllm_config, name)
        pack_experts_anew(self)
        self._head_watch = watch_head(self)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """All weights. The indexers' are loaded by their own names, of which vLLM's loader joins some."""
        indexers = {name: held for name, held in self.named_parameters() if ".indexer." in name}
        loaded: set[str] = set()

        def others() -> Iterator[tuple[str, Tensor]]:
            for name, weight in weights:
                if name in indexers:
                    default_weight_loader(indexers[name], weight)
                    loaded.add(name)
                else:
                    yield name, weight

        loaded |= super().load_weights(others())
        self._head_watch.loaded()
        return loaded


class MlaDsaAttention(nn.Module):
    """Takes the place of vLLM's MLA attention, whose projections it keeps, and adds Transformers' `indexer`.

    Tensor parallelism: latents, indexer and its keys are on every rank whole, so that all select the same
    tokens; each attends with its own heads.
    """

    coarse_name = None

    def __init__(
        self, stock: Any, layer: int, rotary: RopeTable, scale: float, vllm_config: VllmConfig, name: str
    ) -> None:
        super().__init__()
        config: Any = vllm_config.model_config.hf_config
        self.fused_qkv_a_proj, self.q_b_proj = stock.fused_qkv_a_proj, stock.q_b_proj
        self.q_a_layernorm, self.kv_a_layernorm = stock.q_a_layernorm, stock.kv_a_layernorm
        self.kv_b_proj, self.o_proj = stock.kv_b_proj, stock.o_proj
        self.num_heads = stock.num_local_heads
        self.qk_nope_head_dim, self.v_head_dim = stock.qk_nope_head_dim, stock.v_head_dim
        self.latent_width = stock.kv_lora_rank
        self.down_widths = (stock.q_lora_rank, self.latent_width, stock.qk_rope_head_dim)
        self.rotary, self.scale, self.topk = rotary, scale, config.index_topk
        self.indexer = DeepseekV32Indexer(config, layer).requires_grad_(False)
        # As Transformers keeps them, whatever the model's dtype.
        self.indexer.weights_proj.float()
        self.name = f"{name}.attn"
        self.cache = LatentCache(self.name, vllm_config, sum(self.down_widths[1:]))
        self.index_cache = MlaIndexKeyCache(f"{name}.index_keys", vllm_config, config.index_head_dim)
        self.index_name = self.index_cache.name
        # Called with topk_BTK and stop_BT where queries select.
        self.told: Callable[[Tensor, Tensor], None] | None = None
        vllm_config.compilation_config.static_forward_context[self.name].attention = [self]
        keep_out_of_graphs(vllm_config.compilation_config)

    def forward(self, positions: Tensor, hidden_states: Tensor, llama_4_scaling: None = None) -> Tensor:
        """As the stock attention: hidden states `[T, C]`, positions `[T]`."""
        down, _ = self.fused_qkv_a_proj(hidden_states)
        out = down.new_empty(down.shape[0], self.num_heads * self.v_head_dim)
        attend_as_one_operation(down, hidden_states, positions, out, self.name)
        return self.o_proj(out)[0]

    def reserve(self, out_TX: Tensor) -> None:
        """vLLM measures memory; no query sees a key."""
        out_TX.zero_()

    def attend(
        self,
        down_TX: Tensor,
        x_TC: Tensor,
        positions_T: Tensor,
        step: Step,
        index_steps: tuple[Step, Step | None],
        out_TX: Tensor,
    ) -> None:
        """Fill `out_TX` for the step's queries; store their latents, rotary keys and index keys.

        down_TX: the inputs, projected down to queries, latents and rotary keys, side by side.
        """
        apart = (self.cache.rows_per_block, self.index_cache.rows_per_block, 0)
        where = step.layout(index_steps, apart, self.rotary, positions_T, down_TX.dtype)
        rotary = (_both_halves(where.tokens.cos_TP), _both_halves(where.tokens.sin_TP))
        states = self._states(down_TX[None], rotary)
        index = mla_index_inputs(self.indexer, x_TC[None], states.q_resid_BTC, rotary)
        new_TD = torch.cat((states.latent_BTL, states.rope_BTR), -1)[0]
        self.cache.rows_RHC()[where.tokens.rows_T, 0] = new_TD
        self.index_cache.rows_RHC()[where.tokens.index_rows_T, 0] = index.k_BTIE[0, :, 0]
        _, value_up_HVL = mla_up_projections(self)
        for span, key_rows in zip(step.spans, where.sequences, strict=True):
            out_BTHL = self._attend_span(states.q_BTHD[0], index, span, key_rows)
            out_BTHV = torch.einsum("bthl,hvl->bthv", out_BTHL, value_up_HVL)
            out_TX[span.tokens] = out_BTHV.flatten(2).flatten(0, 1)

    def _states(self, down_BTX: Tensor, rotary: tuple[Tensor, Tensor]) -> MlaStates:
        """As `fulmen.modeling.mla.attention.mla_states`."""
        q_down_BTC, latent_BTL, rope_BTR = (x.contiguous() for x in down_BTX.split(self.down_widths, -1))
        q_resid_BTC = self.q_a_layernorm(q_down_BTC)
        q_BTHX = self.q_b_proj(q_resid_BTC)[0].unflatten(-1, (self.num_heads, -1))
        key_up_HNL, _ = mla_up_projections(self)
        q_BTHD, rope_BTR = absorb_and_rotate(q_BTHX, rope_BTR, key_up_HNL, rotary)
        return MlaStates(q_BTHD, self.kv_a_layernorm(latent_BTL), rope_BTR, q_resid_BTC)

    def _attend_span(self, q_THD: Tensor, index: MlaIndexInputs, span: Span, key_rows: KeyRows) -> Tensor:
        """out_BTHL of a span's queries: over all their keys, up to k, else over those that they select."""
        rows_BS, stop_BT = key_rows.rows_BS.long(), key_rows.stop_BT
        q_BTHD = q_THD[span.tokens].unflatten(0, stop_BT.shape)
        topk_BTK = None
        if span.longest > self.topk:
            topk_BTK = self._select(index, span, key_rows)
            if stop_BT.shape[1] == 1:  # the selected keys alone, in their order
                rows_BS = rows_BS.gather(1, topk_BTK[:, 0].clamp(min=0).long())
                stop_BT, topk_BTK = (topk_BTK >= 0).sum(-1), None
        k_BSGD = self.cache.rows_RHC()[rows_BS]
        v_BSGV = k_BSGD[..., : self.latent_width]
        if topk_BTK is None:
            start_BT = torch.zeros_like(stop_BT)
            return dense_attention(q_BTHD, k_BSGD, v_BSGV, start_BT, stop_BT, self.scale)[0]
        return sparse_attention(q_BTHD, k_BSGD, v_BSGV, topk_BTK, self.scale)[0]

    def _select(self, index: MlaIndexInputs, span: Span, key_rows: KeyRows) -> Tensor:
        """topk_BTK of a span's queries, as `index_topk` has it."""
        stop_BT = key_rows.stop_BT
        k_BSIE = self.index_cache.rows_RHC()[key_rows.index_rows_BS.long()]
        q_BTJE, w_BTJ = (x[0, span.tokens].unflatten(0, stop_BT.shape) for x in (index.q_BTJE, index.w_BTJ))
        topk_BTK = index_topk(q_BTJE, k_BSIE, w_BTJ, None, torch.zeros_like(stop_BT), stop_BT, self.topk)
        if self.told is not None:
            self.told(topk_BTK, stop_BT)
        return topk_BTK


def _require_servable_mla(vllm_config: VllmConfig) -> Any:
    """The model's config. Raises ConfigError, or UnsupportedModelError, where vLLM cannot serve it so."""
    require_settings(vllm_config)
    config: Any = vllm_config.model_config.hf_config
    require_in_vllm(config)
    if vllm_config.quant_config is not None:
        raise ConfigError(
            f"quantization={vllm_config.model_config.quantization!r} of MLA is not supported on a CPU; "
            "use a GPU, or convert the dequantised weights"
        )
    if (kind := config.rope_parameters["rope_type"]) not in ("default", "yarn"):
        raise ConfigError(
            f"rope_type={kind!r} of MLA is not supported in vLLM; use `fulmen chat` or Transformers"
        )
    return config


def _rope_table(config: Any, length: int) -> RopeTable:
    """Transformers' own, for all positions; attention and indexer turn by the same."""
    cos, sin = DeepseekV32RotaryEmbedding(config)(torch.empty(0), torch.arange(length)[None])
    return RopeTable(torch.cat([part[0].chunk(2, -1)[0] for part in (cos, sin)], -1))


def _both_halves(part_TP: Tensor) -> Tensor:
    """As Transformers' tables are laid out, `[1, T, R]`."""
    return torch.cat((part_TP, part_TP), -1)[None]


@contextmanager
def _dense_to_vllm(config: Any) -> Iterator[None]:
    """Within the block vLLM sees a config without an indexer."""
    topk = config.index_topk
    del config.index_topk
    try:
        yield
    finally:
        config.index_topk = topk
