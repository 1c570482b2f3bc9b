"""Gemma 2: every other layer slides and stays so; the logits of all are capped (arXiv 2408.00118)."""

from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2Model, PreTrainedConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention

from fulmen.errors import UnsupportedModelError
from fulmen.modeling.family import layers_by_type
from fulmen.modeling.gqa.attention import DsaAttentionMixin, project_heads
from fulmen.modeling.gqa.family import gqa_family
from fulmen.modeling.gqa.model import DsaGenerationMixin, DsaModelMixin


def gemma2_full_layers(config: PreTrainedConfig) -> list[int]:
    """`layers_by_type`. Raises UnsupportedModelError for attention that is not causal."""
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedModelError(
            f"model_type {config.model_type!r} with use_bidirectional_attention=True is not supported; "
            "only causal attention is, as all Gemma 2 language models have it"
        )
    return layers_by_type(config)


class Gemma2DsaConfig(Gemma2Config):
    """A Gemma 2 config with `dsa`, the dict of a `fulmen.config.DsaConfig`."""

    model_type = "gemma2_dsa"
    dsa: dict | None = None


class Gemma2DsaAttention(DsaAttentionMixin, Gemma2Attention):  # type: ignore[misc]
    """Its logits are capped; the layer norms the output."""

    project = project_heads
    output_norm_name = "post_attention_layernorm"

    def output_weight(self) -> Tensor:
        """With the norm's gain; what the norm divides by is one number a token."""
        gain_C1 = 1 + self.output_norm.weight.float()[:, None]
        return (gain_C1 * self.o_proj.weight).to(self.o_proj.weight.dtype)


class Gemma2DsaModel(DsaModelMixin, Gemma2Model):
    """Gemma2Model with an indexer in its converted layers."""

    config_class = Gemma2DsaConfig
    attention_class = Gemma2DsaAttention


class Gemma2DsaForCausalLM(DsaGenerationMixin, Gemma2ForCausalLM):  # type: ignore[misc]
    """Gemma2ForCausalLM with an indexer in its converted layers."""

    config_class = Gemma2DsaConfig
    model_class = Gemma2DsaModel


FAMILY = gqa_family(Gemma2DsaForCausalLM, gemma2_full_layers)
