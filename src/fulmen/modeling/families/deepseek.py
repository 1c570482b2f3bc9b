"""DeepSeek-V2 and V3: multi-head latent attention, whose DSA form is Transformers' own `deepseek_v32`."""

from dataclasses import dataclass

from transformers import DeepseekV32ForCausalLM, PreTrainedConfig, PreTrainedModel

from fulmen.config import DsaConfig
from fulmen.errors import ConfigError
from fulmen.modeling.families.base import Family, all_layers
from fulmen.modeling.mla.convert import MLA_DSA_TYPES, MLA_SOURCE_TYPES, convert_mla, require_mla_config


@dataclass(frozen=True)
class MlaFamily(Family):
    """A family whose DSA class is stock: one index key head, no shift, an indexer in every layer."""

    def require_convertible(self, config: PreTrainedConfig, dsa: DsaConfig) -> None:
        """Raises ConfigError where the stock format has no room for `dsa`, and as `require_mla_config`."""
        if dsa.index_n_kv_heads != 1:
            raise ConfigError(f"index_n_kv_heads={dsa.index_n_kv_heads} is not in deepseek_v32; use 1")
        if list(dsa.layers) != self.full_attention_layers(config):
            raise ConfigError(
                f"layers={list(dsa.layers)} is not in deepseek_v32; convert all {config.num_hidden_layers}"
            )
        require_mla_config(config, dsa.topk, dsa.index_n_heads, dsa.index_head_dim)

    def from_dense(self, dense: PreTrainedModel, dsa: DsaConfig) -> DeepseekV32ForCausalLM:
        """`convert_mla`. Raises as `require_convertible`."""
        self.require_convertible(dense.config, dsa)
        return convert_mla(
            dense, topk=dsa.topk, index_n_heads=dsa.index_n_heads, index_head_dim=dsa.index_head_dim
        )


FAMILY = MlaFamily(source_types=MLA_SOURCE_TYPES, dsa_types=MLA_DSA_TYPES, full_attention_layers=all_layers)
