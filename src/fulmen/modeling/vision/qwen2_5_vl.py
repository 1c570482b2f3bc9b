"""Qwen2.5-VL: its language model is a Qwen2 with positions in three parts."""

from transformers import Qwen2_5_VLForConditionalGeneration

from fulmen.modeling.whole.classes import whole_classes
from fulmen.modeling.whole.family import whole_family
from fulmen.modeling.whole.three_part_positions import ThreePartQwen2DsaModel

Qwen2_5_VLWholeDsaConfig, Qwen2_5_VLWholeDsaModel, Qwen2_5_VLDsaForConditionalGeneration = whole_classes(
    __name__, Qwen2_5_VLForConditionalGeneration, ThreePartQwen2DsaModel
)
FAMILY = whole_family(Qwen2_5_VLDsaForConditionalGeneration, inner_types=("qwen2_5_vl_text",))
