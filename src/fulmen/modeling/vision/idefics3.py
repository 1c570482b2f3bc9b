"""Idefics 3 and the first SmolVLM: a SigLIP tower, whose tokens a Llama reads as its own."""

from transformers import Idefics3ForConditionalGeneration

from fulmen.modeling.families.llama import LlamaDsaModel
from fulmen.modeling.whole.classes import whole_classes
from fulmen.modeling.whole.family import whole_family

Idefics3WholeDsaConfig, Idefics3WholeDsaModel, Idefics3DsaForConditionalGeneration = whole_classes(
    __name__, Idefics3ForConditionalGeneration, LlamaDsaModel, text_name="text_model"
)
FAMILY = whole_family(Idefics3DsaForConditionalGeneration)
