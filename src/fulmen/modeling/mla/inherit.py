"""Build the indexer of a DeepSeek-V3.2 model from its own attention heads, in closed form.

A head's logit is q_rope . k_rope + q_latent . c: its rotary query against the shared rotary key, and its
query absorbed into the latent space against the token's normalised latent c. The stock index key is
LayerNorm(wk x) with E dims, of which this file makes:

- the first R: the attention's own rotary key, reordered for the indexer's half-split RoPE;
- E - R - 1 more: the directions of the latent that carry most of the heads' logits (reduced-rank regression);
- the last: constantly 1 (LayerNorm weight 0, bias 1), so that a query can subtract a threshold from its
  scores: the shift that the stock format lacks. Its row of `wk` is free, and steadies LayerNorm's divisor.

An index head's query is that of one attention head, or the mean of several alike, in units of their logits.
Its threshold is mean + 1 standard deviation of those logits, by regression on the low-rank query.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DeepseekV32ForCausalLM, PreTrainedModel
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Attention

from fulmen.errors import ConfigError, UnsupportedModelError
from fulmen.modeling.intervals import KeyIntervals
from fulmen.modeling.mla.attention import (
    Rotary,
    fulmen_attention,
    half_split_pairs,
    mla_index_inputs,
    mla_loss_inputs,
    mla_up_projections,
)
from fulmen.modeling.mla.fit import (
    group_alike,
    reduced_rank_directions,
    ridge_regression,
    ridge_solution,
    steadying_factor,
)
from fulmen.modeling.selectors import DenseSelector, use_selector
from fulmen.ops.losses.indexer import indexer_loss

_RIDGE = 1e-3
_SCALE_ROWS = 32
_SCALE_STEPS = 10
_LOG2_SCALES = (-10.0, 6.0)


class InheritedMlaLayer(NamedTuple):
    """How well one layer's indexer fits its attention on the calibration text.

    layer: its index in the model.
    key_fit: share of the latent logits' variance that the index keys carry, 0 to 1.
    gate_positive: share of tokens whose head weights came out positive; the others rank their keys upside
        down. Below 0.9 or so the indexer needs its warm-up before use.
    kl: KL(p || softmax(I)) in nats, the warm-up loss before its first step.
    """

    layer: int
    key_fit: float
    gate_positive: float
    kl: float


@torch.no_grad()
def inherit_mla(
    model: PreTrainedModel,
    input_ids_BT: Tensor,
    on_layer: Callable[[InheritedMlaLayer], None] = lambda _: None,
) -> list[InheritedMlaLayer]:
    """Set every indexer of `model` from its attention and calibration text; nothing else changes.

    The model reads the text once; each layer's indexer is built as the layer's attention is about to run.

    Args:
        model: a DeepseekV32ForCausalLM, such as `convert_mla` returns.
        input_ids_BT: int64 token ids without padding, together some thousand.
        on_layer: called after each layer, for progress.

    Returns:
        One InheritedMlaLayer per layer that ran.

    Raises:
        UnsupportedModelError: another architecture.
        ConfigError: index_head_dim below qk_rope_head_dim + 2, or no calibration tokens.
    """
    if not isinstance(model, DeepseekV32ForCausalLM):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a DeepseekV32ForCausalLM; convert it first"
        )
    config = model.config
    if config.index_head_dim < config.qk_rope_head_dim + 2:
        raise ConfigError(
            f"index_head_dim={config.index_head_dim} leaves no room beside "
            f"qk_rope_head_dim={config.qk_rope_head_dim}; use at least 2 more"
        )
    if not input_ids_BT.numel():
        raise ConfigError("input_ids_BT holds no calibration tokens; give a [B, T] tensor of token ids")
    reports: list[InheritedMlaLayer] = []

    def build(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = (kwargs["hidden_states"], kwargs["position_embeddings"], kwargs["attention_mask"])
        reports.append(_inherit_layer(attention, *inputs))
        on_layer(reports[-1])

    with fulmen_attention(model), use_selector(model, DenseSelector()), ExitStack() as hooks:
        for layer in model.model.layers:
            hook = layer.self_attn.register_forward_pre_hook(build, with_kwargs=True)
            hooks.callback(hook.remove)
        model.model(input_ids_BT, use_cache=False)
    return reports


class _TokenTable(NamedTuple):
    """One layer's calibration tokens, all sequences below one another, float64.

    raw_NL is the latent before its norm, latent_NL after it; rope_NR the rotary key before RoPE, half-split.
    """

    x_NC: Tensor
    q_resid_NC: Tensor
    raw_NL: Tensor
    latent_NL: Tensor
    rope_NR: Tensor


class _IndexQueries(NamedTuple):
    """For each index head the map from q_resid to its query against [latent, rope], in units of logits.

    level_J: where its threshold lies, in standard deviations above the mean logit.
    """

    maps_JDC: Tensor
    level_J: Tensor


def _inherit_layer(
    attention: DeepseekV32Attention, x_BTC: Tensor, rotary: Rotary, visible: KeyIntervals
) -> InheritedMlaLayer:
    table = _token_table(attention, x_BTC)
    queries = _index_queries(attention, table)
    one_C = ridge_regression(table.x_NC, torch.ones_like(table.x_NC[:, :1]), _RIDGE)[:, 0]
    query_weight_LL = _latent_query_weight(queries, table)
    _set_index_keys(attention, table, query_weight_LL, one_C)
    key_fit = _set_index_queries(attention, table, queries, query_weight_LL)
    _set_thresholds(attention, x_BTC, rotary, queries.level_J)
    kl = _set_head_weights(attention, one_C, x_BTC, rotary, visible)
    gate_positive = float((table.x_NC @ one_C > 0).double().mean())
    return InheritedMlaLayer(attention.layer_idx, key_fit, gate_positive, kl)


def _token_table(attention: DeepseekV32Attention, x_BTC: Tensor) -> _TokenTable:
    x_NC = x_BTC.flatten(0, 1)
    raw_NL, rope_NR = attention.kv_a_proj_with_mqa(x_NC).split(
        [attention.kv_lora_rank, attention.qk_rope_head_dim], -1
    )
    columns = (
        x_NC,
        attention.q_a_layernorm(attention.q_a_proj(x_NC)),
        raw_NL,
        attention.kv_a_layernorm(raw_NL),
        half_split_pairs(rope_NR),
    )
    return _TokenTable(*(column.double() for column in columns))


def _index_queries(attention: DeepseekV32Attention, table: _TokenTable) -> _IndexQueries:
    """One index head per head; fewer: means of heads alike; more: repeats with higher thresholds."""
    nope, heads, n_index = attention.qk_nope_head_dim, attention.num_heads, attention.indexer.n_heads
    key_up_HNL, _ = mla_up_projections(attention)
    q_up_HXC = attention.q_b_proj.weight.double().unflatten(0, (heads, -1))
    latent_HLC = torch.einsum("hnl,hnc->hlc", key_up_HNL.double(), q_up_HXC[:, :nope])
    rope_HRC = half_split_pairs(q_up_HXC[:, nope:].mT).mT
    maps_HDC = torch.cat([latent_HLC, rope_HRC], 1) * attention.scaling
    if n_index < heads:
        keys_ND = torch.cat([table.latent_NL - table.latent_NL.mean(0), table.rope_NR], -1)
        seen_HDC = torch.einsum(
            "de,hec,cb->hdb", _second_moment(keys_ND), maps_HDC, _second_moment(table.q_resid_NC)
        )
        groups = group_alike(torch.einsum("hdc,gdc->hg", maps_HDC, seen_HDC), n_index)
    else:
        groups = [[index % heads] for index in range(n_index)]
    maps_JDC = torch.stack([maps_HDC[group].mean(0) for group in groups])
    return _IndexQueries(maps_JDC, 1 + torch.arange(n_index, device=maps_JDC.device) // heads)


def _second_moment(samples_NX: Tensor) -> Tensor:
    return samples_NX.T @ samples_NX / len(samples_NX)


def _latent_query_weight(queries: _IndexQueries, table: _TokenTable) -> Tensor:
    """Second moment of the queries against the latent: how much an error in each of its directions costs."""
    maps_JLC = queries.maps_JDC[:, : table.latent_NL.shape[1]]
    return torch.einsum("jlc,cb,jmb->lm", maps_JLC, _second_moment(table.q_resid_NC), maps_JLC)


def _set_index_keys(
    attention: DeepseekV32Attention, table: _TokenTable, query_weight_LL: Tensor, one_C: Tensor
) -> None:
    indexer = attention.indexer
    width, rope = indexer.head_dim, indexer.qk_rope_head_dim
    indexer.wk.weight.copy_(_key_rows(attention, table, query_weight_LL, one_C))
    keys_NE = table.x_NC @ indexer.wk.weight.double().T
    normed_NE = nn.functional.layer_norm(keys_NE, (width,), eps=indexer.k_norm.eps)
    spread_NE = normed_NE - normed_NE.mean(0)
    # Rotary dims: back to the true rotary key. The others: centred; the query side fits what they mean.
    slope_E = torch.ones(width).to(spread_NE)
    power_R = spread_NE[:, :rope].square().sum(0).clamp_min(torch.finfo(torch.float32).tiny)
    slope_E[:rope] = (spread_NE[:, :rope] * table.rope_NR).sum(0) / power_R
    shift_E = -slope_E * normed_NE.mean(0)
    shift_E[:rope] += table.rope_NR.mean(0)
    slope_E[-1], shift_E[-1] = 0, 1
    indexer.k_norm.weight.copy_(slope_E)
    indexer.k_norm.bias.copy_(shift_E)


def _key_rows(
    attention: DeepseekV32Attention, table: _TokenTable, query_weight_LL: Tensor, one_C: Tensor
) -> Tensor:
    """`wk` as rows_EC: rotary key, latent directions (each of unit power), and what steadies their power."""
    width, rope = attention.indexer.head_dim, attention.qk_rope_head_dim
    down_LC, rope_RC = attention.kv_a_proj_with_mqa.weight.double().split([attention.kv_lora_rank, rope])
    directions_KL = reduced_rank_directions(table.raw_NL, table.latent_NL, query_weight_LL, width - rope - 1)
    rows_EC = torch.zeros(width, len(one_C)).to(one_C)
    rows_EC[:rope] = half_split_pairs(rope_RC.T).T / table.rope_NR.square().mean().sqrt()
    rows_EC[rope : rope + len(directions_KL)] = directions_KL @ down_LC
    power_N = (table.x_NC @ rows_EC.T).square().sum(-1)
    ones_N = (table.x_NC @ one_C).square()
    rows_EC[-1] = one_C * math.sqrt(steadying_factor(power_N, ones_N))
    return rows_EC


def _set_index_queries(
    attention: DeepseekV32Attention, table: _TokenTable, queries: _IndexQueries, query_weight_LL: Tensor
) -> float:
    """wq_b without thresholds; returns the share of the latent logits' variance that index keys explain."""
    indexer = attention.indexer
    rope, n_latent = indexer.qk_rope_head_dim, table.latent_NL.shape[1]
    keys_NK = indexer.k_norm(indexer.wk(table.x_NC.to(indexer.wk.weight.dtype))).double()[:, rope:-1]
    latent_NL = table.latent_NL - table.latent_NL.mean(0)
    read_KL = ridge_regression(keys_NK, latent_NL, _RIDGE**2)
    latent_JLC, rope_JRC = queries.maps_JDC.split([n_latent, rope], 1)
    nothing_J1C = torch.zeros_like(rope_JRC[:, :1])
    rows_JEC = torch.cat([rope_JRC, read_KL @ latent_JLC, nothing_J1C], 1) * math.sqrt(indexer.head_dim)
    indexer.wq_b.weight.copy_(rows_JEC.flatten(0, 1))
    missed_NL = latent_NL - keys_NK @ read_KL
    missed, total = ((_second_moment(part) * query_weight_LL).sum() for part in (missed_NL, latent_NL))
    return float(1 - missed / total)


def _set_thresholds(attention: DeepseekV32Attention, x_BTC: Tensor, rotary: Rotary, level_J: Tensor) -> None:
    """Makes the constant key dim times its query -(mean + level * standard deviation) of the logits."""
    indexer = attention.indexer
    n_inputs, n_heads = indexer.wq_b.in_features, indexer.n_heads
    gram_CC = torch.zeros(n_inputs, n_inputs, dtype=torch.float64, device=level_J.device)
    cross_CJ = torch.zeros(n_inputs, n_heads, dtype=torch.float64, device=level_J.device)
    # The first queries see too few keys for a standard deviation.
    first = x_BTC.shape[1] // 8
    for x_TC in x_BTC:
        q_resid_1TC = attention.q_a_layernorm(attention.q_a_proj(x_TC[None]))
        index = mla_index_inputs(indexer, x_TC[None], q_resid_1TC, rotary)
        threshold_TJ = _logit_thresholds(index.q_BTJE[0].float(), index.k_BTIE[0, :, 0].float(), level_J)
        q_resid_TC = q_resid_1TC[0, first:].double()
        gram_CC += q_resid_TC.T @ q_resid_TC
        cross_CJ += q_resid_TC.T @ threshold_TJ[first:].double()
    rows_JEC = indexer.wq_b.weight.unflatten(0, (n_heads, -1))
    # A logit is q . k / sqrt(E), and the constant key is 1.
    rows_JEC[:, -1] = -math.sqrt(indexer.head_dim) * ridge_solution(gram_CC, cross_CJ, _RIDGE).T.to(rows_JEC)


def _logit_thresholds(q_TJE: Tensor, k_SE: Tensor, level_J: Tensor) -> Tensor:
    """mean + level * standard deviation of q . k / sqrt(E): the mean of the past, the deviation of all."""
    count_S1 = torch.arange(1, len(k_SE) + 1, device=k_SE.device)[:, None]
    past_mean_TE = k_SE.cumsum(0) / count_S1
    spread_SE = k_SE - k_SE.mean(0)
    mean_TJ = torch.einsum("tje,te->tj", q_TJE, past_mean_TE)
    variance_TJ = torch.einsum("tje,ef,tjf->tj", q_TJE, _second_moment(spread_SE), q_TJE)
    return (mean_TJ + level_J * variance_TJ.clamp_min(0).sqrt()) / math.sqrt(k_SE.shape[1])


def _set_head_weights(
    attention: DeepseekV32Attention, one_C: Tensor, x_BTC: Tensor, rotary: Rotary, visible: KeyIntervals
) -> float:
    """Every head weighs 1, as near as a map without bias comes to it, times the scale of least KL."""
    indexer = attention.indexer
    indexer.weights_proj.weight.copy_(one_C * math.sqrt(indexer.n_heads))
    (q_BTJE, k_BSIE, w_BTJ, _), attn_q_BTHD, attn_k_BSGD, logit_scale = mla_loss_inputs(
        attention, x_BTC, rotary
    )
    rows = torch.linspace(0, x_BTC.shape[1] - 1, min(_SCALE_ROWS, x_BTC.shape[1])).long().to(x_BTC.device)

    def mean_kl(scale: Tensor) -> Tensor:
        loss = indexer_loss(
            q_BTJE[:, rows], k_BSIE, w_BTJ[:, rows] * scale, None, attn_q_BTHD[:, rows], attn_k_BSGD,
            visible.start_BT[:, rows], visible.stop_BT[:, rows], logit_scale,
        )  # fmt: skip
        return loss.kl_BT.mean()

    low, high = _LOG2_SCALES
    for _ in range(_SCALE_STEPS):
        # The KL is convex in the scale, so the sign of its slope says where the least one lies.
        scale = torch.tensor(2 ** ((low + high) / 2), device=x_BTC.device, requires_grad=True)
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(mean_kl(scale), scale)
        low, high = ((low + high) / 2, high) if slope < 0 else (low, (low + high) / 2)
    best = 2 ** ((low + high) / 2)
    indexer.weights_proj.weight.mul_(best)
    return float(mean_kl(torch.tensor(best, device=x_BTC.device)))
