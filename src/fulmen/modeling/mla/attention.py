"""fulmen's attention inside a stock DeepseekV32ForCausalLM or GlmMoeDsaForCausalLM: same weights, same names.

The stock forward masks a dense attention over expanded keys. Here each query reads its selected latents only:
the query is carried into the latent space (absorbed), so that one key [latent, rotary key] serves all heads.

Numbers are the stock model's, but for ties: of tokens with equal index scores the most recent are
selected here, any by the stock model's `torch.topk`. Where fewer than `index_topk` scores are above
0, the two may attend to different tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Attention, DeepseekV32Indexer
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaAttention, GlmMoeDsaIndexer

from fulmen.errors import CacheError, ConfigError, UnsupportedModelError
from fulmen.modeling.forward_checks import require_no_attention_weights, require_no_dropout
from fulmen.modeling.intervals import KeyIntervals, visible_intervals
from fulmen.modeling.mla.cache import MlaCache, MlaLayer
from fulmen.modeling.mla.convert import MLA_DSA_TYPES
from fulmen.modeling.selectors import IndexerSelector, SelectionInputs, Selector
from fulmen.ops.attention.dense import dense_attention
from fulmen.ops.attention.sparse import sparse_attention
from fulmen.ops.common.rope import apply_rope

MlaAttention = DeepseekV32Attention | GlmMoeDsaAttention
MlaIndexer = DeepseekV32Indexer | GlmMoeDsaIndexer
Rotary = tuple[Tensor, Tensor]


class MlaStates(NamedTuple):
    """What one layer computes from its input.

    L: `kv_lora_rank`, R: `qk_rope_head_dim`, D = L + R, C: `hidden_size` or `q_lora_rank`.

    q_BTHD: queries in the latent space and their rotary part, after RoPE.
    latent_BTL, rope_BTR: the new tokens' latents and rotary keys after RoPE: what the cache holds.
    q_resid_BTC: the low-rank query, which the indexer reads too.
    """

    q_BTHD: Tensor
    latent_BTL: Tensor
    rope_BTR: Tensor
    q_resid_BTC: Tensor


class MlaIndexInputs(NamedTuple):
    """What `fulmen.ops.scores` takes, from a stock indexer: one index key head, no shift."""

    q_BTJE: Tensor
    k_BTIE: Tensor
    w_BTJ: Tensor
    b_BTJ: None = None


class MlaLossInputs(NamedTuple):
    """Arguments of `fulmen.ops.losses.indexer` for one layer; only `index_inputs` carries gradient."""

    index_inputs: MlaIndexInputs
    attn_q_BTHD: Tensor
    attn_k_BSGD: Tensor
    scale: float


def mla_states(attention: MlaAttention, x_BTC: Tensor, rotary: Rotary) -> MlaStates:
    """Absorbed queries and latent keys of a stock layer (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Args:
        attention: a DeepseekV32Attention or GlmMoeDsaAttention.
        x_BTC: the layer's input, after its input norm.
        rotary: the model's (cos, sin), each [B, T, R] (or [1, T, R]).
    """
    q_resid_BTC = attention.q_a_layernorm(attention.q_a_proj(x_BTC))
    q_BTHX = attention.q_b_proj(q_resid_BTC).unflatten(-1, (attention.num_heads, -1))
    latent_BTL, rope_BTR = attention.kv_a_proj_with_mqa(x_BTC).split(
        [attention.kv_lora_rank, attention.qk_rope_head_dim], -1
    )
    key_up_HNL, _ = mla_up_projections(attention)
    q_BTHD, rope_BTR = absorb_and_rotate(q_BTHX, rope_BTR, key_up_HNL, rotary)
    return MlaStates(q_BTHD, attention.kv_a_layernorm(latent_BTL), rope_BTR, q_resid_BTC)


def absorb_and_rotate(
    q_BTHX: Tensor, rope_BTR: Tensor, key_up_HNL: Tensor, rotary: Rotary
) -> tuple[Tensor, Tensor]:
    """q_BTHD and rope_BTR of `MlaStates`, of queries and rotary keys as they are projected."""
    q_nope_BTHN, q_rope_BTHR = q_BTHX.split([key_up_HNL.shape[1], rope_BTR.shape[-1]], -1)
    q_latent_BTHL = torch.einsum("bthn,hnl->bthl", q_nope_BTHN, key_up_HNL)
    q_rope_BTHR = apply_rope(half_split_pairs(q_rope_BTHR), *rotary)
    rope_BTR = apply_rope(half_split_pairs(rope_BTR)[:, :, None], *rotary)[:, :, 0]
    return torch.cat((q_latent_BTHL, q_rope_BTHR), -1), rope_BTR


def mla_up_projections(attention: Any) -> tuple[Tensor, Tensor]:
    """The weights that expand a latent into each head's key and value: key_up_HNL, value_up_HVL.

    attention: a MlaAttention, or what has its `num_heads`, `kv_b_proj` and widths of heads.
    """
    expand_HXL = attention.kv_b_proj.weight.unflatten(0, (attention.num_heads, -1))
    return expand_HXL.split([attention.qk_nope_head_dim, attention.v_head_dim], 1)


def half_split_pairs(x: Tensor) -> Tensor:
    """Reorder the last axis from rotary pairs of neighbours (2p, 2p + 1) to pairs (p, p + R/2)."""
    return torch.cat((x[..., 0::2], x[..., 1::2]), -1)


def mla_index_inputs(
    indexer: MlaIndexer, x_BTC: Tensor, q_resid_BTC: Tensor, rotary: Rotary
) -> MlaIndexInputs:
    """Index queries, keys and head weights of a stock indexer, with gradient.

    The rotary dims come first. V3.2 rotates them half-split although its attention rotates neighbours; GLM-5
    rotates neighbours in both.
    """
    q_BTJE = indexer.wq_b(q_resid_BTC).unflatten(-1, (indexer.n_heads, -1))
    k_BTIE = indexer.k_norm(indexer.wk(x_BTC))[:, :, None]
    if isinstance(indexer, GlmMoeDsaIndexer):
        rope = indexer.qk_rope_head_dim
        q_BTJE = torch.cat((half_split_pairs(q_BTJE[..., :rope]), q_BTJE[..., rope:]), -1)
        k_BTIE = torch.cat((half_split_pairs(k_BTIE[..., :rope]), k_BTIE[..., rope:]), -1)
    w_BTJ = indexer.weights_proj(x_BTC.to(indexer.weights_proj.weight.dtype)).float() * indexer.n_heads**-0.5
    return MlaIndexInputs(apply_rope(q_BTJE, *rotary), apply_rope(k_BTIE, *rotary), w_BTJ)


def mla_loss_inputs(attention: MlaAttention, x_BTC: Tensor, rotary: Rotary) -> MlaLossInputs:
    """Inputs of the warm-up's KL loss for one layer: gradient reaches the indexer's weights and nothing else.

    The attention's side is absorbed: H query heads of width L + R against one key head. The layer must have
    an indexer (GLM-5's "shared" layers have none).
    """
    assert attention.indexer is not None, "a shared layer has no indexer to train"
    x_BTC = x_BTC.detach()
    with torch.no_grad():
        states = mla_states(attention, x_BTC, rotary)
    keys_BSGD = torch.cat((states.latent_BTL, states.rope_BTR), -1)[:, :, None]
    index = mla_index_inputs(attention.indexer, x_BTC, states.q_resid_BTC, rotary)
    return MlaLossInputs(index, states.q_BTHD, keys_BSGD, attention.scaling)


class MlaSparseForward:
    """The forward that replaces a stock attention's; its subclasses differ in what they take and return."""

    selector: Selector = IndexerSelector()

    def attend(
        self: Any,
        x_BTC: Tensor,
        rotary: Rotary,
        visible: KeyIntervals,
        cache: Cache | None,
        shared_BTK: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's output and its selection (None: every visible key).

        A layer without an indexer uses `shared_BTK`, the selection of the last layer that has one.
        """
        states = mla_states(self, x_BTC, rotary)
        k_BSGD = _all_mla_keys(cache, self.layer_idx, states)
        # The absorbed value is the latent itself, the first part of the key.
        v_BSGV = k_BSGD[..., : self.kv_lora_rank]
        topk_BTK = shared_BTK
        if self.indexer is not None:
            # Detached: the KL loss trains the indexer alone, the other losses all the rest.
            index = mla_index_inputs(self.indexer, x_BTC.detach(), states.q_resid_BTC.detach(), rotary)
            topk_BTK = self.select(index, states.q_BTHD, k_BSGD, v_BSGV, visible, cache)
        if topk_BTK is None:
            intervals = (visible.start_BT, visible.stop_BT)
            out_BTHL, _ = dense_attention(states.q_BTHD, k_BSGD, v_BSGV, *intervals, self.scaling)
        else:
            out_BTHL, _ = sparse_attention(states.q_BTHD, k_BSGD, v_BSGV, topk_BTK, self.scaling)
        _, value_up_HVL = mla_up_projections(self)
        return self.o_proj(torch.einsum("bthl,hvl->bthv", out_BTHL, value_up_HVL).flatten(2)), topk_BTK

    def output_weight(self: Any) -> Tensor:
        """out_weight_CN: from all heads' outputs in the latent space, as `sparse_attention` gives them."""
        _, value_up_HVL = mla_up_projections(self)
        weight_CHV = self.o_proj.weight.unflatten(1, value_up_HVL.shape[:2])
        return torch.einsum("chv,hvl->chl", weight_CHV, value_up_HVL).flatten(1)

    def select(
        self: Any,
        index: MlaIndexInputs,
        q_BTHD: Tensor,
        k_BSGD: Tensor,
        v_BSGV: Tensor,
        visible: KeyIntervals,
        cache: Cache | None,
    ) -> Tensor | None:
        """Store the new index keys, then let the selector choose."""
        k_BSIE = index.k_BTIE
        if cache is not None:
            k_BSIE = cache.update_indexer(k_BSIE[:, :, 0], self.layer_idx)[:, :, None]
        topk = self.indexer.index_topk
        if not self.selector.is_needed(visible.n_keys, topk):
            return None
        inputs = SelectionInputs(
            index_q_BTJE=index.q_BTJE,
            index_k_BSIE=k_BSIE,
            index_w_BTJ=index.w_BTJ,
            index_b_BTJ=index.b_BTJ,  # type: ignore[arg-type]
            q_BTHD=q_BTHD,
            k_BSGD=k_BSGD,
            v_BSGV=v_BSGV,
            start_BT=visible.start_BT,
            stop_BT=visible.stop_BT,
            scale=self.scaling,
            layer_idx=self.layer_idx,
        )
        return self.selector.select(inputs, topk)


class FulmenV32Attention(MlaSparseForward, DeepseekV32Attention):
    """DeepseekV32Attention computed by fulmen's ops."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Rotary,
        attention_mask: Any,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As the stock forward, but `attention_mask` is KeyIntervals, and there are no attention weights."""
        return self.attend(hidden_states, position_embeddings, attention_mask, past_key_values, None)[0], None


class FulmenGlmAttention(MlaSparseForward, GlmMoeDsaAttention):
    """GlmMoeDsaAttention computed by fulmen's ops; a "shared" layer takes the last full layer's selection."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Rotary,
        attention_mask: Any,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        prev_topk_indices: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None, Tensor | None]:
        """As the stock forward, but `attention_mask` is KeyIntervals, and there are no attention weights."""
        out_BTC, topk_BTK = self.attend(
            hidden_states, position_embeddings, attention_mask, past_key_values, prev_topk_indices
        )
        return out_BTC, None, topk_BTK


_FULMEN_MLA_CLASSES: dict[type, type] = {
    DeepseekV32Attention: FulmenV32Attention,
    GlmMoeDsaAttention: FulmenGlmAttention,
}


def accelerate_mla(model: PreTrainedModel) -> None:
    """Let `model` (a stock DSA model) compute its attention by fulmen's ops, until `restore_mla`.

    Weights, state dict and config stay the stock ones; no T x S mask is built. Every Transformers cache with
    room for index keys works; one that the model makes itself is an MlaCache, which grows without copies.
    Of tokens with equal index scores the most recent are selected; the stock forward selects any of them.

    Raises UnsupportedModelError for a model without a stock DSA attention.
    """
    layers = [module for module in model.modules() if type(module) in _FULMEN_MLA_CLASSES]
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no stock DSA attention; convert it first, "
            f"or load one of {', '.join(MLA_DSA_TYPES)}"
        )
    for layer in layers:
        layer.__class__ = _FULMEN_MLA_CLASSES[type(layer)]
    hook = model.base_model.register_forward_pre_hook(_mask_to_intervals, with_kwargs=True)
    vars(model.base_model)["fulmen_mask_hook"] = hook


def restore_mla(model: PreTrainedModel) -> None:
    """Undo `accelerate_mla`; a model that is not accelerated stays as it is."""
    for module in model.modules():
        for stock, fulmen in _FULMEN_MLA_CLASSES.items():
            if type(module) is fulmen:
                vars(module).pop("selector", None)
                module.__class__ = stock
    hook = vars(model.base_model).pop("fulmen_mask_hook", None)
    if hook is not None:
        hook.remove()


@contextmanager
def fulmen_attention(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """`accelerate_mla(model)` within the block; nothing changes if the model is accelerated already."""
    if any(isinstance(module, MlaSparseForward) for module in model.modules()):
        yield model
        return
    accelerate_mla(model)
    try:
        yield model
    finally:
        restore_mla(model)


def _mask_to_intervals(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the stock model builds its T x S mask: hand it the visible intervals in the mask's place."""
    names = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")
    given = dict.fromkeys(names) | dict(zip(names, args, strict=False)) | kwargs
    require_no_dropout(model.config, training=model.training)
    require_no_attention_weights(given.get("output_attentions"), model.config.output_attentions)
    if given["use_cache"] is None:
        given["use_cache"] = bool(model.config.use_cache) and not model.training
    if given["past_key_values"] is None and given["use_cache"]:
        given["past_key_values"] = MlaCache(model.config)
    given["attention_mask"] = {"indexed_attention": _visible_to_model(given)}
    return (), given


def _visible_to_model(given: dict[str, Any]) -> KeyIntervals:
    mask, cache = given["attention_mask"], given["past_key_values"]
    if isinstance(mask, dict):
        mask = mask["indexed_attention"]
    if mask is not None and mask.ndim == 4:
        return _intervals_of_mask(mask)
    tokens = given["input_ids"] if given["inputs_embeds"] is None else given["inputs_embeds"]
    n_past = 0 if cache is None else int(cache.get_seq_length())
    # Transformers looks for packed documents only where there is no cache at all.
    packing = given["position_ids"] if cache is None else None
    return visible_intervals(mask, packing, tokens.shape[0], tokens.shape[1], n_past, tokens.device)


def _intervals_of_mask(mask_B1TS: Tensor) -> KeyIntervals:
    """Intervals from a mask (bool, or 0 and a large negative number) that `generate` has built already."""
    seen_BTS = mask_B1TS[:, 0] if mask_B1TS.dtype == torch.bool else mask_B1TS[:, 0] == 0
    n_keys = seen_BTS.shape[-1]
    count_BT = seen_BTS.sum(-1)
    start_BT = seen_BTS.int().argmax(-1)
    last_BT = n_keys - 1 - seen_BTS.flip(-1).int().argmax(-1)
    if ((last_BT - start_BT + 1 != count_BT) & (count_BT > 0)).any():
        raise ConfigError(
            "attention_mask hides keys between visible ones; pass a [B, S] mask, padded on the left"
        )
    return KeyIntervals(start_BT, start_BT + count_BT, n_keys, plain=False)


def _all_mla_keys(cache: Cache | None, layer: int, states: MlaStates) -> Tensor:
    """[latent, rotary key] of all tokens as one key head: k_BSGD, G = 1. The new ones go to the cache."""
    if cache is None:
        return torch.cat((states.latent_BTL, states.rope_BTR), -1)[:, :, None]
    store = cache.layers[layer] if layer < len(cache.layers) else None
    if not hasattr(store, "update_indexer"):
        raise CacheError(
            f"{type(cache).__name__} has no room for the index keys of layer {layer}; "
            "pass fulmen.modeling.mla.cache.MlaCache(model.config), or no cache"
        )
    latent_B1SL, rope_B1SR = cache.update(states.latent_BTL[:, None], states.rope_BTR[:, None], layer)
    if isinstance(store, MlaLayer):
        return store.joint_BSD[:, :, None]
    return torch.cat((latent_B1SL, rope_B1SR), -1).transpose(1, 2)
