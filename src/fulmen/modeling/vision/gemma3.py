"""Gemma 3: the tokens of an image see all of that image, those behind them too, in every layer.

What such a token sees is one run of keys all the same, and the indexer chooses among them as ever: a token
of an image keeps k of the past and its own image, any other k of the past.
"""

from typing import Any

from torch import Tensor
from transformers import Gemma3ForConditionalGeneration

from fulmen.modeling.families.gemma3_text import Gemma3DsaModel
from fulmen.modeling.intervals import KeyIntervals, intervals_with_images, visible_intervals
from fulmen.modeling.whole.classes import DsaWholeModelMixin, whole_classes
from fulmen.modeling.whole.family import whole_family


class Gemma3DsaModelWithImages(Gemma3DsaModel):  # type: ignore[misc, valid-type]
    """Gemma 3's DSA model; its mask is what `Gemma3WholeMixin` makes of it, or that of a text."""

    @staticmethod
    def visible(
        attention_mask: dict[str, Tensor | None] | Tensor | None, position_ids: Tensor | None, **sizes: Any
    ) -> KeyIntervals:
        """As `visible_intervals`, with the images that the tokens are of."""
        if not isinstance(attention_mask, dict):
            return visible_intervals(attention_mask, position_ids, **sizes)
        seen = visible_intervals(attention_mask["tokens"], position_ids, **sizes)
        kinds_BT = attention_mask["kinds"]
        return seen if kinds_BT is None else intervals_with_images(seen, kinds_BT == 1)


class Gemma3WholeMixin(DsaWholeModelMixin):
    """Hands the mask to the language model as it is, where the stock model makes a matrix of it."""

    def forward(
        self,
        *args: Any,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock model. token_type_ids [B, T]: 1 for a token of an image. Raises as `DsaModelMixin`."""
        mask = {"tokens": attention_mask, "kinds": token_type_ids}
        return super().forward(*args, attention_mask=mask, **kwargs)


Gemma3WholeDsaConfig, Gemma3WholeDsaModel, Gemma3DsaForConditionalGeneration = whole_classes(
    __name__, Gemma3ForConditionalGeneration, Gemma3DsaModelWithImages, model_mixin=Gemma3WholeMixin
)
FAMILY = whole_family(Gemma3DsaForConditionalGeneration)
