"""Chats as token ids, and the ids that end and pad them: the same for fine-tuning and for rewards."""

from collections.abc import Mapping, Sequence
from typing import Any

Messages = Sequence[Mapping[str, Any]]


def prompt_ids(tokenizer: Any, messages: Messages) -> list[int]:
    """Token ids of chat messages and what opens the reply, in the chat template; else as plain text."""
    if getattr(tokenizer, "chat_template", None):
        encoded = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )
    else:
        encoded = tokenizer("\n".join(str(message["content"]) for message in messages) + "\n")
    return list(encoded["input_ids"])


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end a reply: what the model's settings say, and the tokenizer's end of text."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    ids = [own] if isinstance(own, int) else list(own or [])
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return list(dict.fromkeys(ids))


def pad_of(model: Any, tokenizer: Any) -> int:
    """An id for padding, which no layer ever sees."""
    asked = (tokenizer.pad_token_id, *ends_of(model, tokenizer), 0)
    return next(one for one in asked if one is not None)
