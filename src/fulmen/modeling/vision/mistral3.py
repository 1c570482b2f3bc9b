"""Mistral Small 3.1 and 3.2: a Pixtral tower, whose tokens a Mistral reads as its own."""

from transformers import Mistral3ForConditionalGeneration

from fulmen.modeling.families.mistral import MistralDsaModel
from fulmen.modeling.whole.classes import whole_classes
from fulmen.modeling.whole.family import whole_family

Mistral3WholeDsaConfig, Mistral3WholeDsaModel, Mistral3DsaForConditionalGeneration = whole_classes(
    __name__, Mistral3ForConditionalGeneration, MistralDsaModel
)
FAMILY = whole_family(Mistral3DsaForConditionalGeneration)
