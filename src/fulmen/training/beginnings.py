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


def has_whole_cache(config: Any) -> bool:
    """Whether a cache carries all that later tokens need of earlier ones, gradients included.

    It does not where experts are told for whole sequences and where linear attention has states.
    """
    text = config.get_text_config()
    is_known = text.model_type.removesuffix("_dsa") in family_names()
    return is_known and not linear_layers(text) and experts_of(text) is None


def can_share(model: PreTrainedModel) -> bool:
    """Whether a model, as it is trained, has a cache that carries all.

    Not where layers are computed again (checkpointing has no cache), and where indexers learn: their keys are
    stored rounded.
    """
    if not has_whole_cache(model.config) or model.is_gradient_checkpointing:
        return False
    return not any(p.requires_grad for name, p in model.named_parameters() if ".indexer." in name)


def common_beginning(ids_BS: Tensor, most: int) -> int:
    """How many tokens all rows begin with alike, `most` at most."""
    is_same_S = (ids_BS[:, :most] == ids_BS[:1, :most]).all(0)
    return int(is_same_S.long().cumprod(0).sum())


def hidden_states(
    model: PreTrainedModel, ids_BS: Tensor, wanted_B: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """What the head reads of rows padded on the right, of each from a position on, `wanted_B` at the latest.

    Args:
        count: tokens from `wanted_B` on that are wanted of a row, at most.

    Returns:
        hidden_BTC, with gradients, and begins_B, where each row's begins. Replies to one prompt share a pass
        over it, or all rows one over what they begin with: whatever saves more.
    """
    if len(ids_BS) > 1 and can_share(model):
        asked_B = _alike(ids_BS, wanted_B)
        shared = common_beginning(ids_BS, int(wanted_B.min()))
        by_prompts = int(wanted_B.sum() - wanted_B[_firsts(asked_B)].sum())
        by_beginning = (len(ids_BS) - 1) * shared
        if max(by_prompts, by_beginning) >= LEAST_SAVED:
            if by_prompts > by_beginning:
                return _behind_prompts(model, ids_BS, wanted_B, asked_B, count), wanted_B
            return _behind_beginning(model, ids_BS, shared), torch.full_like(wanted_B, shared)
    return model.base_model(input_ids=ids_BS, use_cache=False)[0], torch.zeros_like(wanted_B)


def _alike(ids_BS: Tensor, wanted_B: Tensor) -> list[int]:
    """Of each row, the number of its prompt: the tokens before the first that is wanted."""
    rows = zip(ids_BS.tolist(), wanted_B.tolist(), strict=True)
    prompts = [tuple(row[:wanted]) for row, wanted in rows]
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    return [numbers[prompt] for prompt in prompts]


def _firsts(asked_B: Sequence[int]) -> list[int]:
    """Of each prompt, the first row that has it."""
    return [asked_B.index(number) for number in range(max(asked_B) + 1)]


def _behind_beginning(model: PreTrainedModel, ids_BS: Tensor, shared: int) -> Tensor:
    base: Any = model.base_model
    with rope_for_length(base, ids_BS.shape[1]):
        cache = base(input_ids=ids_BS[:1, :shared], use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(ids_BS))
        return base(input_ids=ids_BS[:, shared:], past_key_values=cache, use_cache=True)[0]


def _behind_prompts(
    model: PreTrainedModel, ids_BS: Tensor, wanted_B: Tensor, asked_B: Sequence[int], count: int
) -> Tensor:
    """Each prompt once, padded on the left; then `count` tokens behind it in each row, padded right."""
    base: Any = model.base_model
    firsts = _firsts(asked_B)
    width, longest = int(wanted_B.max()), ids_BS.shape[1]
    places_PW = torch.arange(width, device=ids_BS.device) + (wanted_B[firsts] - width)[:, None]
    # Prompts may differ in length by far more than a reply has tokens.
    count = min(count, longest - int(wanted_B.min()))
    places_BT = torch.arange(count, device=ids_BS.device) + wanted_B[:, None]
    read_PW = (places_PW >= 0).long()
    with rope_for_length(base, longest):
        cache = base(
            input_ids=ids_BS[firsts].gather(1, places_PW.clamp(min=0)),
            attention_mask=read_PW,
            position_ids=places_PW.clamp(min=0),
            use_cache=True,
        ).past_key_values
        cache.batch_select_indices(torch.tensor(asked_B, device=ids_BS.device))
        return base(
            input_ids=ids_BS.gather(1, places_BT.clamp(max=longest - 1)),
            attention_mask=torch.cat([read_PW[list(asked_B)], torch.ones_like(places_BT)], dim=1),
            position_ids=places_BT.clamp(max=longest - 1),
            past_key_values=cache,
            use_cache=True,
        )[0]


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
