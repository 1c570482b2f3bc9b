"""Converted models in vLLM, with an index-key cache beside keys and values.

vLLM finds `register` by the entry-point group `vllm.general_plugins` and calls it in each of its processes.
What is registered are the names of the families' serving classes; those of vLLM's own need no plugin. No
model code is imported, of vLLM or Transformers, until a converted model is loaded.
"""

from typing import TYPE_CHECKING

from fulmen.errors import UnsupportedModelError
from fulmen.modeling.families import family_names, vision_names
from fulmen.serving.vllm_plugin.lifeline import end_with_parent

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MODELS = "fulmen.serving.vllm_plugin.models"
# Of these vLLM has no class whose layers fulmen can change; mostly it would run Transformers' dense code.
NOT_IN_VLLM = ("hunyuan_v1_dense", "ministral", "olmo2", "olmo3", "seed_oss", "smollm3", "starcoder2")
# Stock classes with layers of linear attention.
HYBRIDS = ("Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM")
# What MLA models become, and what serves it on a CPU.
MLA_ARCHITECTURE, MLA_ON_CPU = "DeepseekV32ForCausalLM", "fulmen.serving.vllm_plugin.mla:MlaDsaForCausalLM"
# What Transformers' MLA classes may have, and vLLM's, which would leave it out, have not.
NOT_IN_VLLMS_MLA = ("attention_bias", "tie_word_embeddings")


def served_classes() -> dict[str, str]:
    """Names of the classes in `MODELS`, each with that of the stock class that it goes before."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = set(family_names()) & MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - set(NOT_IN_VLLM)
    stock = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] for name in sorted(named))
    return {name.replace("ForCausalLM", "DsaForCausalLM"): name for name in stock}


def served_with_images() -> dict[str, str]:
    """Names of the classes in `MODELS` of models that read images, each with their dense `model_type`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    stock = {MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name]: name for name in vision_names()}
    return {
        name.replace("ForConditionalGeneration", "DsaForConditionalGeneration"): stock[name] for name in stock
    }


def require_in_vllm(config: "PreTrainedConfig") -> None:
    """Raise UnsupportedModelError for a converted model, or a part of it, that vLLM has no code for."""
    if config.model_type.removesuffix("_dsa") in NOT_IN_VLLM:
        raise UnsupportedModelError(
            f"model_type {config.model_type!r} cannot be served: vLLM has no fitting class for it; "
            "use `fulmen chat` or Transformers"
        )
    if hasattr(config, "index_topk"):
        for part in NOT_IN_VLLMS_MLA:
            if getattr(config, part, False):
                raise UnsupportedModelError(
                    f"{part}=True cannot be served: vLLM's {config.model_type!r} knows no such part; "
                    "use `fulmen chat` or Transformers"
                )


def register() -> None:
    """Make fulmen's model types known to Transformers and its architectures to vLLM. May be called again."""
    end_with_parent()
    # Importing fulmen, as finding this function did, has told Transformers.
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        ModelRegistry.register_model(MLA_ARCHITECTURE, MLA_ON_CPU)
    known = ModelRegistry.get_supported_archs()
    for architecture in (*served_classes(), *served_with_images()):
        if architecture not in known:
            ModelRegistry.register_model(architecture, f"{MODELS}:{architecture}")
    for architecture, stock in served_classes().items():
        if stock in HYBRIDS and stock in MODELS_CONFIG_MAP:
            # Precision of states, and positions of a text.
            MODELS_CONFIG_MAP[architecture] = MODELS_CONFIG_MAP[stock]
