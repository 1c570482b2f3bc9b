"""Problems as token ids, and the same problems again where a run goes on."""

from collections.abc import Sequence
from typing import Any

from fulmen.errors import ConfigError
from fulmen.tasks.base import Problem
from fulmen.training.rl.settings import Domain


def training_rows(domains: Sequence[Domain], count: int) -> dict[str, list[Any]]:
    """Which problem each prompt of a run is: the tasks in turn, each one's problems from 0 on."""
    names = [domains[number % len(domains)].task.name for number in range(count)]
    return {"task": names, "index": [number // len(domains) for number in range(count)]}


def prompt_tokens(tokenizer: Any, problem: Problem) -> list[int]:
    """Token ids of a problem's messages, in the chat template; without one their plain text.

    Raises ConfigError if there are none.
    """
    if getattr(tokenizer, "chat_template", None):
        messages = [dict(message) for message in problem.messages]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        ids = list(encoded["input_ids"])
    else:
        text = "\n".join(str(message["content"]) for message in problem.messages) + "\n"
        ids = list(tokenizer(text)["input_ids"])
    if not ids:
        raise ConfigError(f"problem {problem.index} of task {problem.task} has no tokens; give it a message")
    return ids


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end a reply: what the model's settings say, and the tokenizer's end of text."""
    own = model.generation_config.eos_token_id
    ids = [own] if isinstance(own, int) else list(own or [])
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return list(dict.fromkeys(ids))


def pad_of(model: Any, tokenizer: Any) -> int:
    """An id for padding, which no layer ever sees."""
    asked = (tokenizer.pad_token_id, *ends_of(model, tokenizer), 0)
    return next(one for one in asked if one is not None)
