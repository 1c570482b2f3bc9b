"""A Qwen2 whose tokens have three positions, of time, height and width: the language model of Qwen2-VL.

Each of the three turns some of the rotary pairs (`mrope_section`), in one table for all layers; an index pair
takes its angle from that table, as ever. Of a text the three are alike, so that by itself this is a Qwen2.
"""

from typing import Any

from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

from fulmen.modeling.families.qwen2 import Qwen2DsaModel
from fulmen.modeling.intervals import KeyIntervals, visible_intervals


class ThreePartRotaryEmbedding(Qwen2_5_VLRotaryEmbedding):
    """The stock table, of positions [B, T], [3, B, T], or [4, B, T] whose first is the place in the text."""

    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        return super().forward(x, position_ids[-3:] if position_ids.ndim == 3 else position_ids)


class ThreePartQwen2DsaModel(Qwen2DsaModel):  # type: ignore[misc, valid-type]
    """Qwen2's DSA model with positions in three parts."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.rotary_emb = ThreePartRotaryEmbedding(config)

    @staticmethod
    def visible(attention_mask: Tensor | None, position_ids: Tensor | None, **sizes: Any) -> KeyIntervals:
        """As `visible_intervals`; positions in images say nothing of packed documents, as in Transformers."""
        if position_ids is not None and position_ids.ndim == 3:
            position_ids = position_ids[0] if len(position_ids) == 4 else None
        return visible_intervals(attention_mask, position_ids, **sizes)
