"""DeepSeek-V2 and V3: multi-head latent attention, whose DSA form is Transformers' own `deepseek_v32`."""

from dataclasses import dataclass

from transformers import DeepseekV32ForCausalLM, PreTrainedModel

from fulmen.config import DsaConfig
from fulmen.errors import ConfigError
from fulmen.modeling.families.base import Family, all_layers
from fulmen.modeling.mla_convert import MLA_DSA_TYPES, MLA_SOURCE_TYPES, convert_mla


@dataclass(frozen=True)
class MlaFamily(Family):
    """A family whose DSA class is stock: one index key head, no shift, an indexer in every layer."""

    def from_dense(self, dense: PreTrainedModel, dsa: DsaConfig) -> DeepseekV32ForCausalLM:
        """`convert_mla`. Raises ConfigError where the stock format has no room for `dsa`."""
        if dsa.index_n_kv_heads != 1:
            raise ConfigError(f"index_n_kv_heads={dsa.index_n_kv_heads} is not in deepseek_v32; use 1")
        if list(dsa.layers) != self.full_attention_layers(dense.config):
            raise ConfigError(
                f"layers={list(dsa.layers)} is not in deepseek_v32; "
                f"convert all {dense.config.num_hidden_layers}"
            )
        return convert_mla(
            dense, topk=dsa.topk, index_n_heads=dsa.index_n_heads, index_head_dim=dsa.index_head_dim
        )


FAMILY = MlaFamily(source_types=MLA_SOURCE_TYPES, dsa_types=MLA_DSA_TYPES, full_attention_layers=all_layers)
