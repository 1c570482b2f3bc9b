"""Sparse attention inside a Transformers attention module; dense attention for the layers that stay dense.

All layers of a DSA model run under the attention name "fulmen". It has no mask function on purpose:
Transformers then builds no mask, and the layers get intervals (`fulmen.modeling.intervals`) instead.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fulmen.config import DEFAULT_CANDIDATE_FACTOR, DsaConfig, candidates_left, scaled_topk
from fulmen.modeling.gqa.cache import DsaCache
from fulmen.modeling.gqa.indexer import GqaIndexer, rotary_width
from fulmen.modeling.intervals import KeyIntervals, narrowed_intervals
from fulmen.modeling.selectors import (
    CoarseInputs,
    IndexerSelector,
    SelectionInputs,
    Selector,
    asks_coarse,
    keep_short_pasts,
)
from fulmen.ops.attention.dense import dense_attention
from fulmen.ops.attention.sparse import sparse_attention
from fulmen.ops.common.index_keys import is_packed, pack_index_keys, round_index_keys
from fulmen.ops.common.rope import apply_rope

ATTENTION_NAME = "fulmen"
Projection = Callable[[Any, Tensor], tuple[Tensor, ...]]
RotaryTable = tuple[Tensor, Tensor]


class Heads(NamedTuple):
    """What an attention computes with.

    Attributes:
        q_BTHD, k_BTGD, v_BTGD: queries, keys and values; the former two before `rotary`.
        rotary: cos_BTR and sin_BTR that turn queries and keys, and the indexer's.
        gate_BTN: what the outputs of all heads are multiplied with; None: nothing.
    """

    q_BTHD: Tensor
    k_BTGD: Tensor
    v_BTGD: Tensor
    rotary: RotaryTable
    gate_BTN: Tensor | None = None


Preparation = Callable[[Any, Heads, Tensor | None], Heads]


def project_heads(attention: Any, x_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q_BTHD, k_BTGD, v_BTGD of a Llama-like attention, biases included, before RoPE."""
    heads = (*x_BTC.shape[:-1], -1, attention.head_dim)
    return (
        attention.q_proj(x_BTC).view(heads),
        attention.k_proj(x_BTC).view(heads),
        attention.v_proj(x_BTC).view(heads),
    )


def project_normed_heads(attention: Any, x_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same for an attention with query and key norms per head (Qwen3)."""
    q_BTHD, k_BTGD, v_BTGD = project_heads(attention, x_BTC)
    return attention.q_norm(q_BTHD), attention.k_norm(k_BTGD), v_BTGD


def project_heads_normed_if_asked(attention: Any, x_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same where the config says whether there are norms (GLM-4.5)."""
    project = project_normed_heads if attention.config.use_qk_norm else project_heads
    return project(attention, x_BTC)


def project_wholly_normed_heads(attention: Any, x_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with one norm over all query heads and one over all key heads (OLMo 2)."""
    q_BTHD, k_BTGD, v_BTGD = project_heads(attention, x_BTC)
    q_BTX, k_BTX = attention.q_norm(q_BTHD.flatten(2)), attention.k_norm(k_BTGD.flatten(2))
    return q_BTX.view(q_BTHD.shape), k_BTX.view(k_BTGD.shape), v_BTGD


def project_fused_heads(attention: Any, x_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same where one projection gives queries, keys and values (Phi-3)."""
    heads, key_heads = attention.config.num_attention_heads, attention.config.num_key_value_heads
    qkv_BTXD = attention.qkv_proj(x_BTC).unflatten(-1, (-1, attention.head_dim))
    q_BTHD, k_BTGD, v_BTGD = qkv_BTXD.split((heads, key_heads, key_heads), 2)
    return q_BTHD, k_BTGD, v_BTGD


def project_interleaved_heads(attention: Any, x_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same where RoPE turns dims 2p and 2p + 1 as a pair (GLM-4): in an order that has them R/2 apart.

    Logits do not depend on the order, as it is the same for queries and keys.
    """
    q_BTHD, k_BTGD, v_BTGD = project_heads(attention, x_BTC)
    order_D = pairs_apart(attention.head_dim, rotary_width(attention.config))
    return q_BTHD[..., order_D], k_BTGD[..., order_D], v_BTGD


def project_gated_heads(attention: Any, x_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `project_normed_heads`, where each query has its gate beside it (Qwen3-Next); and gate_BTN."""
    heads = (*x_BTC.shape[:-1], -1, attention.head_dim)
    q_BTHD, gate_BTHD = attention.q_proj(x_BTC).unflatten(-1, (-1, 2 * attention.head_dim)).chunk(2, -1)
    k_BTGD, v_BTGD = attention.k_proj(x_BTC).view(heads), attention.v_proj(x_BTC).view(heads)
    return attention.q_norm(q_BTHD), attention.k_norm(k_BTGD), v_BTGD, gate_BTHD.flatten(2).sigmoid()


def pairs_apart(width: int, rotary: int) -> list[int]:
    """Dims of a head, those rotated first: the first of each neighbouring pair, then the second ones."""
    return [*range(0, rotary, 2), *range(1, rotary, 2), *range(rotary, width)]


def take_heads(attention: Any, heads: Heads, position_BT: Tensor | None) -> Heads:
    """Nothing but RoPE lies between a projection and the logits."""
    return heads


def scale_queries(attention: Any, heads: Heads, position_BT: Tensor | None) -> Heads:
    """Queries times 1 + beta log(1 + floor(t / L)), L the context before it was made longer (Llama 4)."""
    assert position_BT is not None, "the decoder layer passes its positions on"
    rope = attention.config.rope_parameters
    stretched_BT = torch.floor(position_BT / rope["original_max_position_embeddings"])
    scale_BT = 1 + rope["llama_4_scaling_beta"] * torch.log1p(stretched_BT)
    return heads._replace(q_BTHD=heads.q_BTHD * scale_BT[..., None, None].to(heads.q_BTHD.dtype))


def norm_turned_heads(attention: Any, heads: Heads, position_BT: Tensor | None) -> Heads:
    """Heads that are normed after RoPE (HunYuan): turned here already, and by nothing any more.

    A gain g after a rotation R is not one before it, unless it is the same for both dims of a pair. But an
    indexer needs no RoPE of its own: what it makes of a pair is a complex multiple, and c (R k) = R (c k). So
    it reads g R k / |k|, and its logits are sums over the pairs of the model's own.
    """
    q_BTHD, k_BTGD = (apply_rope(x, *heads.rotary).to(x.dtype) for x in heads[:2])
    normed = (attention.query_layernorm(q_BTHD), attention.key_layernorm(k_BTGD))
    return Heads(*normed, heads.v_BTGD, no_rotation(heads.rotary), heads.gate_BTN)


def no_rotation(rotary: RotaryTable) -> RotaryTable:
    """A table like this one that turns nothing."""
    cos_BTR, sin_BTR = rotary
    return torch.ones_like(cos_BTR), torch.zeros_like(sin_BTR)


def turns_every_layer(config: PreTrainedConfig, layer: int) -> bool:
    """RoPE turns the heads of all layers."""
    return True


class DsaAttentionMixin:
    """Goes before a stock attention class, whose weights it keeps, and adds `indexer`.

    What differs between families is set by `fulmen.modeling.gqa.classes.dsa_classes`.
    """

    config: Any
    layer_idx: int
    scaling: float
    o_proj: Any
    project: ClassVar[Callable[..., tuple[Tensor, ...]]]
    prepare: ClassVar[Callable[..., Heads]]
    output_norm_name: ClassVar[str | None]
    turns: ClassVar[Callable[[Any, int], bool]]
    selector: Selector = IndexerSelector()

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        dsa = DsaConfig.from_dict(config.dsa)
        self.indexer = GqaIndexer(config, dsa)
        self._layer_number = dsa.layers.index(layer_idx)
        self._output_norms: tuple[nn.Module, ...] = ()  # in a tuple: not a submodule

    def join(self, decoder_layer: nn.Module) -> None:
        """Take the place of the attention in its decoder layer."""
        if self.output_norm_name is not None:
            self._output_norms = (getattr(decoder_layer, self.output_norm_name),)
        self._multiplier = getattr(decoder_layer, "residual_multiplier", 1.0)
        decoder_layer.self_attn = self  # type: ignore[assignment]

    def to_stream(self, out_BTC: Tensor) -> Tensor:
        """What the decoder layer adds to the residual stream for this output: normed, or a multiple."""
        for norm in self._output_norms:
            out_BTC = norm(out_BTC)
        return out_BTC * self._multiplier

    def heads(
        self,
        hidden_states: Tensor,
        position_embeddings: RotaryTable,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Heads:
        """Of what the attention is given."""
        q_BTHD, k_BTGD, v_BTGD, *gate = self.project(hidden_states)
        bare = Heads(q_BTHD, k_BTGD, v_BTGD, self.rotary_table(position_embeddings), *gate)
        return self.prepare(bare, position_ids)

    def rotary_table(self, position_embeddings: RotaryTable) -> RotaryTable:
        """cos_BTR and sin_BTR of this layer; a layer without RoPE has one that turns nothing."""
        cos_BTR, sin_BTR = position_embeddings
        if 2 * cos_BTR.shape[-1] == rotary_width(self.config):  # gpt-oss has each angle once
            cos_BTR, sin_BTR = (torch.cat((table, table), -1) for table in (cos_BTR, sin_BTR))
        if type(self).turns(self.config, self.layer_idx):
            return cos_BTR, sin_BTR
        return no_rotation((cos_BTR, sin_BTR))

    @property
    def softmax(self) -> tuple[float, float | None, Tensor | None]:
        """Scale, softcap and sinks_H; the stock attention has the latter two by these names, if at all."""
        return self.scaling, getattr(self, "attn_logit_softcapping", None), getattr(self, "sinks", None)

    @property
    def topk(self) -> int:
        """The model's k: up to it attention is dense. Read from its config at each forward pass."""
        return self.config.dsa["topk"]

    @property
    def layer_topk(self) -> int:
        """Keys that a query keeps of a longer past in this layer."""
        return scaled_topk(self.topk, self.config.dsa.get("topk_shares"), self._layer_number)

    @property
    def n_candidates(self) -> int:
        """Keys that this layer's coarse level leaves to the indexer, if it has one."""
        factor = self.config.dsa.get("candidate_factor", DEFAULT_CANDIDATE_FACTOR)
        return candidates_left(factor, self.layer_topk, self.topk)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: RotaryTable | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        visible: KeyIntervals | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """As the stock attention; `visible` takes the place of `attention_mask`."""
        assert visible is not None, "a DSA attention runs inside its model, which computes the intervals"
        assert position_embeddings is not None
        heads = self.heads(hidden_states, position_embeddings, kwargs.get("position_ids"))
        bare_q_BTHD, bare_k_BTGD, v_BSGV, (cos_BTR, sin_BTR), gate_BTN = heads
        rotation = self.indexer.rotation(cos_BTR, sin_BTR)
        # Detached here and below: the KL loss trains the indexer alone, the other losses all the rest.
        index_k_BSIE = self.indexer.keys(bare_k_BTGD.detach(), rotation)
        coarse = self.indexer.coarse
        coarse_k_BSX = None
        if coarse is not None:
            coarse_k_BSX = pack_index_keys(coarse.keys(bare_k_BTGD, cos_BTR, sin_BTR))
        q_BTHD, k_BSGD = (apply_rope(x, cos_BTR, sin_BTR).to(x.dtype) for x in (bare_q_BTHD, bare_k_BTGD))
        if past_key_values is not None:
            packed_BTIX = pack_index_keys(index_k_BSIE)
            k_BSGD, v_BSGV, index_k_BSIE = self._extend_cache(past_key_values, k_BSGD, v_BSGV, packed_BTIX)
            if coarse_k_BSX is not None:
                coarse_k_BSX = cast(DsaCache, past_key_values).update_coarse(coarse_k_BSX, self.layer_idx)

        out_BTHV = topk_BTK = None
        if self.selector.is_needed(k_BSGD.shape[1], self.topk):
            index_q_BTJE, w_BTJ, b_BTJ = self.indexer.queries(
                hidden_states.detach(), bare_q_BTHD.detach(), rotation
            )
            if past_key_values is None:
                # The same numbers whether or not there is a cache; those alone have a gradient.
                trained = index_k_BSIE.requires_grad
                index_k_BSIE = round_index_keys(index_k_BSIE) if trained else pack_index_keys(index_k_BSIE)
            if not is_packed(index_k_BSIE):
                index_q_BTJE = index_q_BTJE.to(index_k_BSIE.dtype)
            index_inputs = (index_q_BTJE, index_k_BSIE, w_BTJ, b_BTJ)
            intervals = (visible.start_BT, visible.stop_BT)
            scale, softcap, sinks_H = self.softmax
            inputs = SelectionInputs(
                *(*index_inputs, q_BTHD, k_BSGD, v_BSGV, *intervals, scale, self.layer_idx),
                softcap=softcap,
                sinks_H=sinks_H,
                out_gate_BTN=gate_BTN,
            )
            count = self.n_candidates
            if coarse is not None and coarse_k_BSX is not None and asks_coarse(k_BSGD.shape[1], count):
                of_token = (hidden_states.detach(), bare_q_BTHD.detach())
                coarse_q_BTMN, coarse_b_BTM = coarse.queries(*of_token, cos_BTR, sin_BTR)
                inputs = replace(
                    inputs, coarse=CoarseInputs(coarse_q_BTMN, coarse_k_BSX, coarse_b_BTM, count)
                )
            out_BTHV = self.selector.attend(inputs, self.layer_topk, self.topk)
            if out_BTHV is None:
                topk_BTK = self.selector.select(inputs, self.layer_topk)
        if topk_BTK is not None:
            topk_BTK = keep_short_pasts(topk_BTK, visible.start_BT, visible.stop_BT, self.topk)
            out_BTHV, _ = sparse_attention(q_BTHD, k_BSGD, v_BSGV, topk_BTK, *self.softmax)
        elif out_BTHV is None:
            out_BTHV = attend_to_visible(self, q_BTHD, k_BSGD, v_BSGV, visible, *self.softmax)
        out_BTN = out_BTHV.flatten(2)
        return self.o_proj(out_BTN if gate_BTN is None else out_BTN * gate_BTN), None

    def output_weight(self) -> Tensor:
        """out_weight_CN: from all heads' outputs, as `sparse_attention` gives them, to the residual stream.

        Where a norm stands between, with its gain, and up to the factor that it gives each token. A gate,
        which is another one at each token, is not in it.
        """
        weight_CN = self.o_proj.weight
        for norm in self._output_norms:
            # RMS norms all: what they make of equal numbers is their gain.
            gain_C = norm(torch.ones_like(weight_CN[:, 0], dtype=torch.float32)).float()
            weight_CN = (gain_C[:, None] * weight_CN).to(weight_CN.dtype)
        return weight_CN

    def _extend_cache(
        self, cache: Cache, k_BTGD: Tensor, v_BTGV: Tensor, packed_BTIX: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Store the new tokens; return the keys, values and packed index keys of all tokens so far."""
        k_BGSD, v_BGSV = cache.update(k_BTGD.transpose(1, 2), v_BTGV.transpose(1, 2), self.layer_idx)
        packed_BSN = cache.update_indexer(packed_BTIX.flatten(2), self.layer_idx)
        packed_BSIX = packed_BSN.unflatten(-1, packed_BTIX.shape[2:])
        return k_BGSD.transpose(1, 2), v_BGSV.transpose(1, 2), packed_BSIX


def attend_to_visible(
    attention: Any,
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    visible: KeyIntervals,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """out_BTHV over every visible key, by the dense model's own SDPA where that can express the attention."""
    n_queries, n_keys = q_BTHD.shape[1], k_BSGD.shape[1]
    # SDPA aligns causality to the first key, so it fits no chunk with a past; a single row crawls on a CPU.
    causal, single = n_queries == n_keys > 1, n_queries == 1 and q_BTHD.device.type != "cpu"
    plain = visible.plain and softcap is None and sinks_H is None
    if not (plain and (causal or single)):
        inputs = (q_BTHD, k_BSGD, v_BSGV, visible.start_BT, visible.stop_BT)
        return dense_attention(*inputs, scale, softcap, sinks_H)[0]
    q_BHTD, k_BGSD, v_BGSV = (heads.transpose(1, 2) for heads in (q_BTHD, k_BSGD, v_BSGV))
    return sdpa_attention_forward(attention, q_BHTD, k_BGSD, v_BGSV, None, scaling=scale)[0]


def fulmen_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    visible: KeyIntervals | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface for the layers of a DSA model that are not converted.

    softcap, s_aux: its names for a cap on the logits (Gemma 2) and for sinks (gpt-oss).
    """
    assert visible is not None, "a DSA model passes the intervals to all of its layers"
    # Some modules keep their window to themselves, as their mask has it (Qwen2-MoE).
    window = kwargs.get("sliding_window", getattr(module, "sliding_window", None))
    intervals = narrowed_intervals(visible, window, key.shape[2])
    q_BTHD, k_BSGD, v_BSGV = (heads.transpose(1, 2) for heads in (query, key, value))
    return attend_to_visible(module, q_BTHD, k_BSGD, v_BSGV, intervals, scaling, softcap, s_aux), None


AttentionInterface.register(ATTENTION_NAME, fulmen_attention_forward)
