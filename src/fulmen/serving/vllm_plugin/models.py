"""vLLM's own models with the attention of their converted layers swapped (`fulmen.modeling.gqa.model`)."""

from collections.abc import Iterable
from typing import Any

import vllm
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.gemma2 import Gemma2ForCausalLM
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM
from vllm.model_executor.models.gpt_oss import GptOssForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import PPMissingLayer, maybe_prefix

from fulmen.config import DsaConfig
from fulmen.errors import ConfigError
from fulmen.modeling.gqa.model import require_dsa
from fulmen.serving.vllm_plugin.attention import DsaAttention
from fulmen.serving.vllm_plugin.rope import require_same_rope, scale_longrope
from fulmen.serving.vllm_plugin.weights import HeadWatch

# The interfaces used here are internal to vLLM and change between its versions.
VLLM_SERIES = "0.32."


class DsaServingMixin:
    """Goes before a vLLM language model: gives its converted layers an indexer and sparse attention."""

    model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        dsa, config = _require_servable(vllm_config), vllm_config.model_config
        scale_longrope(config.hf_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        for layer in dsa.layers:
            block = self.model.layers[layer]
            if not isinstance(block, PPMissingLayer):
                require_same_rope(block.self_attn.rotary_emb, config.hf_config, config.max_model_len)
                name = f"{maybe_prefix(prefix, 'model')}.layers.{layer}.self_attn"
                block.self_attn = DsaAttention(block.self_attn, layer, dsa, vllm_config, name)
        self._head_watch = HeadWatch()
        if hasattr(self, "logits_processor"):  # the last rank of a pipeline
            self.logits_processor.register_forward_pre_hook(self._head_watch.before_use)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """All weights, or those of a running model that are to be replaced."""
        loaded = self._load(weights)
        self._head_watch.loaded()
        return loaded

    def _load(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return super().load_weights(weights)  # type: ignore[misc]


class Gemma2DsaForCausalLM(DsaServingMixin, Gemma2ForCausalLM):
    """`fulmen.modeling.families.gemma2` in vLLM."""


class Gemma3DsaForCausalLM(DsaServingMixin, Gemma3ForCausalLM):
    """`fulmen.modeling.families.gemma3_text` in vLLM."""


class GptOssDsaForCausalLM(DsaServingMixin, GptOssForCausalLM):
    """`fulmen.modeling.families.gpt_oss` is not served yet: vLLM names its layers' parts otherwise."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        raise ConfigError(
            "model_type 'gpt_oss_dsa' is not served by vLLM yet; run it by `generate` of Transformers"
        )


class LlamaDsaForCausalLM(DsaServingMixin, LlamaForCausalLM):
    """`fulmen.modeling.families.llama` in vLLM."""


class MistralDsaForCausalLM(DsaServingMixin, MistralForCausalLM):
    """`fulmen.modeling.families.mistral` in vLLM."""

    def _load(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        # MistralForCausalLM takes any `wq` for one of Mistral's own file format; the indexer has one.
        return LlamaForCausalLM.load_weights(self, weights)


class Qwen2DsaForCausalLM(DsaServingMixin, Qwen2ForCausalLM):
    """`fulmen.modeling.families.qwen2` in vLLM."""


class Qwen3DsaForCausalLM(DsaServingMixin, Qwen3ForCausalLM):
    """`fulmen.modeling.families.qwen3` in vLLM."""


def _require_servable(vllm_config: VllmConfig) -> DsaConfig:
    """The model's DSA part. Raises ConfigError where vLLM's version or settings do not fit it."""
    if not vllm.__version__.startswith(VLLM_SERIES):
        raise ConfigError(f"vllm {vllm.__version__} is not supported; install vllm {VLLM_SERIES}0")
    cache_dtype = vllm_config.cache_config.cache_dtype
    if cache_dtype not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"kv_cache_dtype={cache_dtype!r} is not supported with DSA; use 'auto'")
    if str(vllm_config.model_config.dtype) not in ("torch.float32", "torch.bfloat16"):
        raise ConfigError(
            f"dtype={vllm_config.model_config.dtype} is not supported with DSA; use bfloat16 or float32"
        )
    if vllm_config.parallel_config.decode_context_parallel_size > 1:
        raise ConfigError("decode_context_parallel_size above 1 is not supported with DSA; use 1")
    return require_dsa(vllm_config.model_config.hf_config)
