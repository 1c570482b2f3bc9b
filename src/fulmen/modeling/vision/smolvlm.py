"""SmolVLM and SmolVLM2: a SigLIP tower, whose tokens a Llama reads as its own."""

from transformers import SmolVLMForConditionalGeneration

from fulmen.modeling.families.llama import LlamaDsaModel
from fulmen.modeling.whole.classes import whole_classes
from fulmen.modeling.whole.family import whole_family

SmolVLMWholeDsaConfig, SmolVLMWholeDsaModel, SmolVLMDsaForConditionalGeneration = whole_classes(
    __name__, SmolVLMForConditionalGeneration, LlamaDsaModel, text_name="text_model"
)
FAMILY = whole_family(SmolVLMDsaForConditionalGeneration)
