"""vLLM's rotary tables beside Transformers': read, brought to agree, and refused where they do not.

vLLM keeps one table for all lengths up to `max_model_len`. Where Transformers chooses by the length of the
text, it has the one of a text of that length: LongRoPE's long factors, for short texts too.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fulmen.errors import ConfigError
from fulmen.modeling.gqa.indexer import model_head_width, rotary_width
from fulmen.modeling.rope_tables import full_attention_rope

# Their positions tell tables apart that agree at the first ones; the tables may be bfloat16.
COMPARED, CLOSE = 64, 0.02


def rotary_rows(rotary: Any, positions_T: Tensor) -> Tensor:
    """Cosines and sines `[T, R]` of vLLM's table."""
    return _table(rotary)[positions_T + _first_row(rotary)]


@cache
def no_rotation_like(rotary: Any) -> "NoRotation":
    """In place of a table of vLLM's where a layer has no RoPE; one for all layers that share the table."""
    return NoRotation(rotary)


class NoRotation(nn.Module):
    """A table of the same shape that turns nothing; all its rows are one in memory."""

    is_neox_style = True

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        rows, width = _table(rotary).shape
        still_R = torch.cat((torch.ones(width // 2), torch.zeros(width // 2)))
        self.cos_sin_cache = still_R.to(_table(rotary)).expand(rows, -1)


def scale_longrope(config: PreTrainedConfig) -> None:
    """Let vLLM scale LongRoPE's tables by Transformers' factor; vLLM's own goes by the lengths alone."""
    rope = full_attention_rope(config)
    if rope.get("rope_type") == "longrope":
        _, attention_factor = ROPE_INIT_FUNCTIONS["longrope"](_one_table(config))
        rope.update(short_mscale=attention_factor, long_mscale=attention_factor)


def name_query_scaling(config: PreTrainedConfig) -> None:
    """Say in vLLM's words that queries are scaled by their position; Transformers' it does not read."""
    rope = full_attention_rope(config)
    if (beta := rope.get("llama_4_scaling_beta")) is not None:
        context = rope["original_max_position_embeddings"]
        config.llama_4_scaling = {"beta": beta, "original_max_position_embeddings": context}


def require_same_rope(rotary: Any, config: PreTrainedConfig, length: int) -> None:
    """Raise ConfigError unless vLLM rotates a text of `length` tokens as Transformers would.

    rotary: of a layer that sees all.
    """
    with torch.device("cpu"):
        if _is_same(rotary, config, length):
            return
    kind, context = full_attention_rope(config).get("rope_type"), config.max_position_embeddings
    remedy = f"max_model_len={context} or less" if length > context else "`fulmen chat` or Transformers"
    raise ConfigError(
        f"rope_type={kind!r} with max_model_len={length} is not supported with DSA in vLLM, "
        f"which rotates otherwise; use {remedy}"
    )


def _is_same(rotary: Any, config: Any, length: int) -> bool:
    if len(_table(rotary)) - _first_row(rotary) < length:
        return False
    positions_T = torch.tensor([*range(min(COMPARED, length - 1)), length - 1])
    theirs_TR = rotary_rows(rotary, positions_T.to(_table(rotary).device)).float().cpu()
    ours = LlamaRotaryEmbedding(_one_table(config))(torch.empty(0), positions_T[None])
    # Its halves are the same; vLLM keeps one of each.
    ours_TR = torch.cat([part[0].chunk(2, -1)[0] for part in ours], -1)
    return ours_TR.shape == theirs_TR.shape and bool((theirs_TR - ours_TR).abs().max() < CLOSE)


def _one_table(config: Any) -> LlamaConfig:
    """As much of a config as a rotary table is made from: that of the layers that see all."""
    rope, width = dict(full_attention_rope(config)), model_head_width(config)
    if rope.get("rope_type", "default") == "default":
        # Llama's own way to make it knows no share of the dims, those of the other kinds do.
        width, _ = rotary_width(config), rope.pop("partial_rotary_factor", None)
    return LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        head_dim=width,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=rope,
    )


def _table(rotary: Any) -> Tensor:
    """All rows; of LongRoPE the short factors' and then the long ones'."""
    both = getattr(rotary, "long_short_cos_sin_cache", None)
    return rotary.cos_sin_cache if both is None else both


def _first_row(rotary: Any) -> int:
    """The row of position 0."""
    return rotary.original_max_position_embeddings if getattr(rotary, "use_long_rope", False) else 0
