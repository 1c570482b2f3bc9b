"""Turn a DeepSeek-V2 or V3 model or its like (MLA, dense attention) into a stock `deepseek_v32` model.

The result has an indexer, and the source's backbone, weight for weight, under Transformers' own class and
names: it saves, loads and runs without fulmen (of tokens with equal scores it then keeps any, where fulmen
keeps the most recent). With `topk` at least as long as the text its logits are the source's. The indexer is
random; `fulmen.modeling.mla.inherit` builds it from the attention's own heads.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM, PretrainedConfig, PreTrainedModel

from fulmen.config import require_positive_int
from fulmen.errors import AlreadyConvertedError, ConfigError, UnsupportedModelError
from fulmen.modeling.family import has_own_head

# GLM-4.7-Flash has DeepSeek-V3's layers; Kimi K2's config is read as DeepSeek-V3's (`registration.py`).
MLA_SOURCE_TYPES = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_k2")
MLA_DSA_TYPES = ("deepseek_v32", "glm_moe_dsa")

_V32_CONFIG_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "n_shared_experts",
    "n_routed_experts",
    "routed_scaling_factor",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_rope_head_dim",
    "v_head_dim",
    "qk_nope_head_dim",
    "n_group",
    "topk_group",
    "num_experts_per_tok",
    "norm_topk_prob",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_bias",
    "attention_dropout",
)

# How Transformers' class routes. Its config does not say so, and vLLM and SGLang go by these words: without
# them they route by softmax and have no place for the correction bias.
V32_ROUTING: dict[str, Any] = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}

# Where the query has no low-rank step, q_a_layernorm only has to undo q_a_proj's division by the input norm's
# weight. Its epsilon (1e-6) would shift the result; inputs 2^5 times larger make that 5e-10, and fit fp16.
_UNIT_SCALE = 32.0
_SMALLEST_NORM_WEIGHT = 1e-6


def convert_mla(
    model: PreTrainedModel, *, topk: int, index_n_heads: int, index_head_dim: int
) -> DeepseekV32ForCausalLM:
    """A stock DeepSeek-V3.2 model (arXiv 2512.02556, section 2): the backbone of `model`, a random indexer.

    Args:
        model: a DeepseekV2ForCausalLM (all MLPs dense), DeepseekV3ForCausalLM or Glm4MoeLiteForCausalLM. It
            is left as it is; the result shares its weights wherever they stay the same.
        topk: tokens that each query keeps (`index_topk`).
        index_n_heads: index query heads J.
        index_head_dim: width E of an index head; its first `qk_rope_head_dim` dims are rotary.

    Without `q_lora_rank` (V2-Lite, Moonlight) the query's low-rank step becomes the input norm itself:
    q_a_proj = diag(1/w), q_a_layernorm.weight = w, `q_lora_rank` = hidden size. Beyond rounding, that
    reproduces the input x up to a factor sqrt(1 + rms_norm_eps / mean(h^2)) for a residual stream h.

    Raises:
        AlreadyConvertedError: the model has an indexer.
        UnsupportedModelError: a part that stock deepseek_v32 cannot express; the message names key and value.
        ConfigError: an index setting that cannot be.
    """
    config = require_mla_config(model.config, topk, index_n_heads, index_head_dim)
    _require_plain_weights(model)
    config.tie_word_embeddings = model.config.tie_word_embeddings and not has_own_head(model)
    state = _v32_backbone(model)
    dtype = state["model.embed_tokens.weight"].dtype
    device = state["model.embed_tokens.weight"].device
    with torch.device("meta"):
        converted = DeepseekV32ForCausalLM(config)
    state |= _random_indexer(converted, config.initializer_range, dtype, device)
    converted.load_state_dict(state, strict=True, assign=True)
    converted.tie_weights()
    # The rotary table is no weight, so it does not come with the state.
    converted.model.rotary_emb = type(converted.model.rotary_emb)(config).to(device)
    converted.generation_config = copy.deepcopy(model.generation_config)
    return converted.train(model.training)


def require_mla_config(
    config: PretrainedConfig, topk: int, index_n_heads: int, index_head_dim: int
) -> DeepseekV32Config:
    """The config that `convert_mla` would make. Raises as that does, but for what the weights tell."""
    _require_expressible(config)
    return _v32_config(config, topk, index_n_heads, index_head_dim)


def _require_expressible(config: PretrainedConfig) -> None:
    if config.model_type in MLA_DSA_TYPES:
        raise AlreadyConvertedError(
            f"model_type={config.model_type!r} has an indexer already; use it, or go on with fulmen train"
        )
    if config.model_type not in MLA_SOURCE_TYPES:
        _refuse("model_type", config.model_type, f"convert one of {', '.join(MLA_SOURCE_TYPES)}")
    n_moe = config.num_hidden_layers - _dense_mlps_first(config)
    if config.model_type == "deepseek_v2" and n_moe > 0:
        _refuse(
            "first_k_dense_replace",
            config.first_k_dense_replace,
            f"the other {n_moe} layers route experts by softmax (V2), deepseek_v32 only by sigmoid; "
            "convert a V2 model with dense MLPs, or a V3 model",
        )
    if getattr(config, "mlp_bias", False):
        _refuse("mlp_bias", True, "deepseek_v32 has MLPs without bias only")
    if config.num_key_value_heads != config.num_attention_heads:
        _refuse("num_key_value_heads", config.num_key_value_heads, "MLA has one per attention head")

    if (share := config.rope_parameters.get("partial_rotary_factor", 1.0)) != 1.0:
        _refuse("partial_rotary_factor", share, "deepseek_v32 turns all of qk_rope_head_dim")


def _dense_mlps_first(config: PretrainedConfig) -> int:
    """How many layers come before those with experts. Raises UnsupportedModelError for another order."""
    layers: int = config.num_hidden_layers
    kinds = getattr(config, "mlp_layer_types", None)
    if kinds is None:
        return min(config.first_k_dense_replace, layers)
    count = kinds.index("sparse") if "sparse" in kinds else layers
    if "dense" in kinds[count:]:
        _refuse("mlp_layer_types", kinds, "deepseek_v32 has its dense MLPs in the first layers")
    return count


def _require_plain_weights(model: PreTrainedModel) -> None:
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            _refuse(f"dtype of {name}", tensor.dtype, "load the model dequantised, in bf16 or fp32")


def _refuse(key: str, value: object, remedy: str) -> None:
    raise UnsupportedModelError(f"{key}={value!r} cannot become deepseek_v32: {remedy}")


def _v32_config(
    source: PretrainedConfig, topk: int, index_n_heads: int, index_head_dim: int
) -> DeepseekV32Config:
    require_positive_int("topk", topk)
    require_positive_int("index_n_heads", index_n_heads)
    require_positive_int("index_head_dim", index_head_dim)
    if index_head_dim < source.qk_rope_head_dim:
        raise ConfigError(
            f"index_head_dim={index_head_dim} is below qk_rope_head_dim={source.qk_rope_head_dim}; "
            "use at least that"
        )
    values: dict[str, Any] = {key: getattr(source, key) for key in _V32_CONFIG_KEYS}
    values["rope_parameters"] = dict(source.rope_parameters)
    values["q_lora_rank"] = source.q_lora_rank or source.hidden_size
    n_dense = _dense_mlps_first(source)
    if n_dense == source.num_hidden_layers:
        # No layer routes: V2 leaves the routing keys empty, which deepseek_v32 does not allow.
        unused = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "norm_topk_prob": True}
        values |= {key: value for key, value in unused.items() if values[key] is None}
    for key, value in values.items():
        if value is None and not key.endswith("_token_id"):
            _refuse(key, value, "set it in the source's config")
    if source._attn_implementation in ("eager", "sdpa"):
        values["attn_implementation"] = source._attn_implementation
    return DeepseekV32Config(
        **values,
        **V32_ROUTING,
        first_k_dense_replace=n_dense,
        index_topk=topk,
        index_n_heads=index_n_heads,
        index_head_dim=index_head_dim,
        dtype=source.dtype,
    )


def _v32_backbone(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every weight of the source under its V3.2 name."""
    state = dict(model.state_dict())
    for layer in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        if model.config.q_lora_rank is None:
            _add_unit_query_norm(state, prefix, model.config.attention_bias)
        if not getattr(model.config, "rope_interleave", True):
            _interleave_rotary_rows(state, prefix, model.config)
    return state


def _add_unit_query_norm(state: dict[str, Tensor], prefix: str, bias: bool) -> None:
    norm_key = f"{prefix}input_layernorm.weight"
    weight = state[norm_key]
    inverse = (_UNIT_SCALE / weight.double()).to(weight.dtype)
    lost = (weight.abs() < _SMALLEST_NORM_WEIGHT * weight.abs().max()) | ~inverse.isfinite()
    if lost.any():
        _refuse(
            "q_lora_rank",
            None,
            f"{norm_key} has {int(lost.sum())} weights near zero, so its input cannot be recovered; "
            "use a model with q_lora_rank",
        )
    attention = f"{prefix}self_attn."
    state[f"{attention}q_a_proj.weight"] = torch.diag(inverse)
    if bias:
        state[f"{attention}q_a_proj.bias"] = torch.zeros_like(weight)
    # A copy, or the two norms would train as one.
    state[f"{attention}q_a_layernorm.weight"] = weight.clone()
    state[f"{attention}q_b_proj.weight"] = state.pop(f"{attention}q_proj.weight")


def _interleave_rotary_rows(state: dict[str, Tensor], prefix: str, config: PretrainedConfig) -> None:
    """Reorder the rotary rows of queries and keys from pairs (p, p + R/2) to neighbours (2p, 2p + 1)."""
    rope = config.qk_rope_head_dim
    order = torch.arange(rope).view(2, rope // 2).T.reshape(-1)
    attention = f"{prefix}self_attn."
    queries_HXC = state[f"{attention}q_b_proj.weight"].unflatten(0, (config.num_attention_heads, -1))
    nope_HNC, rotary_HRC = queries_HXC.split([config.qk_nope_head_dim, rope], 1)
    state[f"{attention}q_b_proj.weight"] = torch.cat([nope_HNC, rotary_HRC[:, order]], 1).flatten(0, 1)
    for kind in ("weight", "bias"):
        if (keys := state.get(f"{attention}kv_a_proj_with_mqa.{kind}")) is not None:
            latent, rotary = keys.split([config.kv_lora_rank, rope])
            state[f"{attention}kv_a_proj_with_mqa.{kind}"] = torch.cat([latent, rotary[order]])


def _random_indexer(
    model: DeepseekV32ForCausalLM, std: float, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    state = {}
    for name, parameter in model.named_parameters():
        if ".indexer." not in name:
            continue
        # Stock keeps the head weights in fp32 whatever the model's dtype.
        kind = torch.promote_types(dtype, torch.float32) if "weights_proj" in name else dtype
        if "k_norm" in name:
            fill = float(name.endswith("weight"))
            state[name] = torch.full(parameter.shape, fill, dtype=kind, device=device)
        else:
            state[name] = torch.randn(parameter.shape, device=device).mul_(std).to(kind)
    return state
