"""Models with layers of linear attention (`fulmen.modeling.linear_layers`): those stay vLLM's own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from fulmen.errors import ConfigError
from fulmen.serving.vllm_plugin.attention import DsaAttention


class GatedDsaAttention(DsaAttention):
    """As vLLM's attention of Qwen3-Next, whose projection gives a gate of the output beside each query."""

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """As the other."""
        both, _ = self.qkv_proj(hidden_states)
        keys_values = 2 * self.kv_heads * self.head_dim
        q_and_gate, kv_TX = both.split((both.shape[1] - keys_values, keys_values), -1)
        q_THD, gate_THD = q_and_gate.unflatten(-1, (self.heads, 2, self.head_dim)).unbind(2)
        out_TX = self.heads_output(torch.cat((q_THD.flatten(1), kv_TX), -1), hidden_states, positions)
        return self.o_proj(out_TX * gate_THD.flatten(1).sigmoid())[0]


@contextmanager
def named_as_stock(config: Any) -> Iterator[None]:
    """While vLLM makes its layers: some ask for the model type, which they know by the dense model's name."""
    own = config.model_type
    config.model_type = own.removesuffix("_dsa")
    try:
        yield
    finally:
        config.model_type = own


def compute_float32(vllm_config: VllmConfig) -> None:
    """Let vLLM's layers with linear attention compute in float32 on a CPU, too; once a model of them is made.

    Raises ConfigError for a model in float32 with drafts, which Transformers' functions cannot take back.
    """
    if not current_platform.is_cpu() or vllm_config.model_config.dtype != torch.float32:
        return
    if vllm_config.speculative_config is not None:
        raise ConfigError(
            "speculative_config is not supported with dtype=float32 where layers have linear attention; "
            "use bfloat16, or leave it out"
        )
    from fulmen.serving.vllm_plugin.linear_float32 import take_its_place

    take_its_place()
