"""What a rollout engine is given, looked at before any work: its model, its weights, and what it is asked."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from fulmen.errors import ConfigError
from fulmen.modeling.generation_settings import read_generation_config
from fulmen.modeling.rollouts import Sampling
from fulmen.modeling.weight_files import weight_files

HEAD, EXPERTS = "lm_head.weight", ".experts."


def require_length(config: PreTrainedConfig, max_model_len: int) -> None:
    """Raise ConfigError unless a model takes texts of so many tokens."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or max_model_len
    if not 2 <= max_model_len <= context:
        raise ConfigError(f"max_model_len={max_model_len} cannot be; use 2 to {context}, the model's context")


def require_sampling(sampling: Sampling) -> None:
    """Raise ConfigError for sampling that cannot be, or whose kept tokens have no limit."""
    if sampling.temperature <= 0:
        raise ConfigError(f"temperature={sampling.temperature} has no distribution; use one above 0")
    if not 0 < sampling.top_p <= 1:
        raise ConfigError(f"top_p={sampling.top_p} cannot be; use a number above 0, at most 1")
    if sampling.top_k < 0:
        raise ConfigError(f"top_k={sampling.top_k} cannot be; use 0 for all tokens, or a number of them")
    if sampling.top_p < 1 and not sampling.top_k:
        raise ConfigError(
            f"top_p={sampling.top_p} without top_k may keep any number of tokens; set top_k, as 64"
        )
    for name in ("per_prompt", "max_new_tokens"):
        if getattr(sampling, name) < 1:
            raise ConfigError(f"{name}={getattr(sampling, name)} cannot be; use 1 or more")


def require_prompts(prompts: Sequence[Sequence[int]], new: int, max_model_len: int, vocab_size: int) -> None:
    """Raise ConfigError for a prompt that is empty, leaves no room for its reply, or has unknown tokens."""
    for number, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= max_model_len - new:
            raise ConfigError(
                f"prompt {number} has {len(prompt)} tokens and max_new_tokens={new}; together they may have "
                f"max_model_len={max_model_len}, and a prompt 1 or more"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ConfigError(
                f"prompt {number} has tokens from {min(prompt)} to {max(prompt)}; "
                f"the model knows 0 to {vocab_size - 1}"
            )


def stop_tokens(place: Path, config: PreTrainedConfig) -> list[int]:
    """Tokens that end a reply: those of the model's generation settings, else of its config."""
    text = config.get_text_config()
    settings = read_generation_config(str(place), text.vocab_size)
    found = (getattr(holder, "eos_token_id", None) for holder in (settings, text))
    stops = next((stop for stop in found if stop is not None), ())
    return [stops] if isinstance(stops, int) else list(stops)


def weight_shapes(place: Path, is_tied: bool) -> dict[str, tuple[int, ...]]:
    """What an update must have. Experts, one tensor in memory and many in files, are left to vLLM."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(place):
        with safe_open(file, "pt") as opened:
            names = [name for name in opened.keys() if EXPERTS not in name]  # noqa: SIM118
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in names}
    if is_tied:
        shapes.pop(HEAD, None)
    return shapes


def checked_weights(
    weights: Iterable[tuple[str, Tensor]], expected: Mapping[str, tuple[int, ...]], is_tied: bool
) -> Iterator[tuple[str, Tensor]]:
    """The same weights without gradients, as they come.

    Raises ConfigError: one that is not expected, or of another shape; at the end, one that did not come.
    """
    left = dict(expected)
    for name, weight in weights:
        if EXPERTS not in name and not (is_tied and name == HEAD):
            _require_expected(name, tuple(weight.shape), expected)
            left.pop(name, None)
        yield name, weight.detach()
    if left:
        raise ConfigError(
            f"{len(left)} weights of the engine's model are missing, the first {min(left)}; pass the whole "
            "state_dict()"
        )


def rounded_biases(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The same weights, biases of stock layers in the model's dtype.

    Some that vLLM keeps in float32 it rounds first when it starts, and not when it is given them later.
    """
    for name, weight in weights:
        yield name, weight.to(dtype) if name.endswith(".bias") and ".indexer." not in name else weight


def _require_expected(name: str, shape: tuple[int, ...], expected: Mapping[str, tuple[int, ...]]) -> None:
    if name not in expected:
        raise ConfigError(
            f"weight {name!r} is not in the engine's model; pass the state_dict() of a model like that, with "
            "adapters merged"
        )
    if shape != expected[name]:
        raise ConfigError(
            f"weight {name!r} has shape {shape}, in the engine's model {expected[name]}; pass the "
            "state_dict() of a model like that"
        )
