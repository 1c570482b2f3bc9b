"""Qwen2-VL: its language model is a Qwen2 with positions in three parts."""

from transformers import Qwen2VLForConditionalGeneration

from fulmen.modeling.whole.classes import whole_classes
from fulmen.modeling.whole.family import whole_family
from fulmen.modeling.whole.three_part_positions import ThreePartQwen2DsaModel

Qwen2VLWholeDsaConfig, Qwen2VLWholeDsaModel, Qwen2VLDsaForConditionalGeneration = whole_classes(
    __name__, Qwen2VLForConditionalGeneration, ThreePartQwen2DsaModel
)
FAMILY = whole_family(Qwen2VLDsaForConditionalGeneration, inner_types=("qwen2_vl_text",))
