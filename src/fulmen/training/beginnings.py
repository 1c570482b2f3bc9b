"""What sequences begin with alike is read once, with gradients: later tokens find it in a cache.

Replies of a group have one prompt, and prompts of a task one template: that is most of their tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fulmen.modeling.experts import experts_of
from fulmen.modeling.families import family_names
from fulmen.modeling.lengths import PREFILL_CHUNK
from fulmen.modeling.linear_layers import linear_layers
from fulmen.modeling.rope_tables import rope_for_length

# A pass of its own costs as much as so many tokens, as it reads all weights once more (135M parameters in
# float32 on one core: 230 ms, and 6 ms a token).
LEAST_SAVED = 40


def can_share(model: PreTrainedModel) -> bool:
    """Whether later tokens find in a cache all that they need of earlier ones, gradients included.

    They do not where layers are computed again (checkpointing has no cache), where experts are told for whole
    sequences, where linear attention has states, and where indexers learn: their keys are stored rounded.
    """
    config = model.config.get_text_config()
    is_known = config.model_type.removesuffix("_dsa") in family_names() and not linear_layers(config)
    if not is_known or model.is_gradient_checkpointing or experts_of(config) is not None:
        return False
    return not any(p.requires_grad for name, p in model.named_parameters() if ".indexer." in name)


def common_beginning(ids_BS: Tensor, most: int) -> int:
    """How many tokens all rows begin with alike, `most` at most."""
    is_same_S = (ids_BS[:, :most] == ids_BS[:1, :most]).all(0)
    return int(is_same_S.long().cumprod(0).sum())


def hidden_states(model: PreTrainedModel, ids_BS: Tensor, wanted: int) -> tuple[Tensor, int]:
    """What the head reads of rows padded on the right, from a position on, `wanted` at the latest.

    Returns:
        hidden_BTC, with gradients, and the position where it begins: a beginning that the rows have in common
        is computed once, and left out.
    """
    base: Any = model.base_model
    shared = common_beginning(ids_BS, wanted) if len(ids_BS) > 1 and can_share(model) else 0
    if (len(ids_BS) - 1) * shared < LEAST_SAVED:
        return base(input_ids=ids_BS, use_cache=False)[0], 0
    with rope_for_length(base, ids_BS.shape[1]):
        cache = base(input_ids=ids_BS[:1, :shared], use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(ids_BS))
        return base(input_ids=ids_BS[:, shared:], past_key_values=cache, use_cache=True)[0], shared


@torch.no_grad()
def prompts_cache(
    model: PreTrainedModel, ids_BS: Tensor, mask_BS: Tensor, asked_B: Sequence[int]
) -> Any | None:
    """A cache of all but the last token of prompts padded on the left, each prompt read once.

    asked_B: which prompt stands in each row.

    Returns None where no prompt stands twice, or where the model reads it by itself.
    """
    firsts = {prompt: asked_B.index(prompt) for prompt in dict.fromkeys(asked_B)}
    is_long = ids_BS.shape[1] > PREFILL_CHUNK
    if len(firsts) == len(asked_B) or ids_BS.shape[1] == 1 or is_long or not can_share(model):
        return None
    rows = list(firsts.values())
    read_BS = mask_BS[rows, :-1]
    base: Any = model.base_model
    with rope_for_length(base, int(mask_BS.sum(-1).max())):
        cache = base(
            input_ids=ids_BS[rows, :-1],
            attention_mask=read_BS,
            position_ids=(read_BS.cumsum(-1) - 1).clamp(min=0),
            use_cache=True,
        ).past_key_values
    numbers = {prompt: number for number, prompt in enumerate(firsts)}
    cache.batch_select_indices(torch.tensor([numbers[prompt] for prompt in asked_B], device=ids_BS.device))
    return cache
