"""What a run of reinforcement learning will take, said before any weight is read."""

import re
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from fulmen.errors import ConfigError
from fulmen.pipeline.answers import AT_ONCE
from fulmen.training.beginnings import has_whole_cache
from fulmen.training.rl.settings import Domain, RlSettings
from fulmen.training.sparse.lora import TARGETS

GB = 1e9
# Weights are held in float32; gradients and two averages beside those that change.
FLOAT_BYTES, STATES = 4, 3
# Numbers that a layer keeps for the backward pass: so many times a token's hidden size, and its MLP's width.
HIDDEN_TIMES, MLP_TIMES = 18, 5
# Copies of the logits of a step of writing: the model's, in float32, sorted, as probabilities.
LOGIT_COPIES = 5
# Of a forward and backward pass: more are hardly faster.
PASS_TOKENS = 2048


@dataclass(frozen=True)
class RlPlan:
    """Memory in bytes, estimated, and what is free.

    Attributes:
        parameters, trained: of the model, and those that change.
        weights: of the policy. optimizer: gradients and averages of what is trained.
        reference: a copy of the model, where adapters cannot be switched off instead.
        activations: of a forward and backward pass. engine: of what writes the replies, in this process.
        length: tokens of the longest prompt looked at and its reply.
    """

    parameters: int
    trained: int
    weights: int
    optimizer: int
    reference: int
    activations: int
    engine: int
    length: int
    free: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.optimizer + self.reference + self.activations + self.engine

    def lines(self, settings: RlSettings, domains: list[Domain]) -> list[str]:
        """The plan in words."""
        names = ", ".join(f"{domain.task.name} (KL {domain.kl:g})" for domain in domains)
        how = "all weights" if settings.lora is None else f"LoRA of rank {settings.lora}"
        return [
            f"Plan: {settings.steps} steps of {settings.prompts} prompts x {settings.group} replies of up to "
            f"{settings.max_new_tokens} tokens; tasks: {names}",
            f"Trains {self.trained:,} of {self.parameters:,} parameters ({how}), "
            f"indexers {settings.indexer}; learning rate {settings.rate:g}, top-p {settings.top_p:g}, "
            f"top-k {settings.top_k}",
            f"Memory: weights {_gb(self.weights)}, optimizer {_gb(self.optimizer)}, reference "
            f"{_gb(self.reference)}, activations {_gb(self.activations)}, engine {_gb(self.engine)}; "
            f"together {_gb(self.total)} of {_gb(self.free)} free",
        ]

    def require_room(self) -> None:
        """Raise ConfigError if it is more than is free."""
        if self.total > self.free:
            raise ConfigError(
                f"micro_batch and the model need about {_gb(self.total)}, and {_gb(self.free)} are free; use "
                "a smaller micro_batch, checkpointing, LoRA in place of full, or a smaller model",
                arguments=["micro_batch", "checkpointing", "full"],
            )


def fitting_micro_batch(config: PreTrainedConfig, settings: RlSettings, prompt: int, n_processes: int) -> int:
    """Replies in one pass that are no more than PASS_TOKENS with their prompts; the default of `settings` at
    least. prompt: tokens of the longest.
    """
    each = settings.replies // n_processes
    fitting = [
        number
        for number in range(1, min(each, AT_ONCE) + 1)
        if each % number == 0 and _pass_tokens(config, settings, number, prompt) <= PASS_TOKENS
    ]
    return max([settings.at_once, *fitting])


def _pass_tokens(config: PreTrainedConfig, settings: RlSettings, replies: int, prompt: int) -> int:
    """Of so many replies, with a prompt each, or one for a group."""
    is_shared = has_whole_cache(config) and not settings.checkpointing and settings.indexer == "frozen"
    prompts = -(-replies // settings.group) if is_shared else replies
    return replies * settings.max_new_tokens + prompts * prompt


def plan_rl(
    config: PreTrainedConfig,
    settings: RlSettings,
    prompt: int,
    free: int,
    *,
    is_engine_apart: bool,
) -> RlPlan:
    """The plan for a model with this config.

    Args:
        prompt: tokens of the longest prompt.
        free: bytes of memory. is_engine_apart: whether the engine has weights of its own.

    Raises ConfigError if prompt and reply do not fit the model's context.
    """
    text, length = config.get_text_config(), prompt + settings.max_new_tokens
    context = getattr(text, "max_position_embeddings", None)
    if context is not None and length > context:
        raise ConfigError(
            f"max_new_tokens={settings.max_new_tokens} after a prompt of {prompt} tokens is beyond the "
            f"model's context of {context}; use fewer, or shorter problems",
            arguments=["max_new_tokens"],
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = _trained(model, settings)
    size = 2 if settings.bf16 else 4
    is_apart = settings.lora is None or settings.indexer == "trained"
    return RlPlan(
        parameters=parameters,
        trained=trained,
        weights=parameters * FLOAT_BYTES,
        optimizer=trained * STATES * FLOAT_BYTES,
        reference=parameters * FLOAT_BYTES if is_apart else 0,
        activations=_activations(
            text, _pass_tokens(config, settings, settings.at_once, prompt), size, settings.checkpointing
        ),
        engine=_generate_bytes(text, settings, length, size) + is_engine_apart * parameters * size,
        length=length,
        free=free,
    )


def _trained(model: nn.Module, settings: RlSettings) -> int:
    indexers = sum(p.numel() for name, p in model.named_parameters() if ".indexer." in name)
    own = indexers if settings.indexer == "trained" else 0
    if settings.lora is None:
        return sum(p.numel() for p in model.parameters()) - indexers + own
    maps = (
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(TARGETS, name)
    )
    return own + sum(settings.lora * (one.in_features + one.out_features) for one in maps)


def _activations(text: PreTrainedConfig, tokens: int, size: int, checkpointing: bool) -> int:
    layers = text.num_hidden_layers
    wide = getattr(text, "intermediate_size", 4 * text.hidden_size)
    layer = tokens * size * (HIDDEN_TIMES * text.hidden_size + MLP_TIMES * wide)
    kept = tokens * size * text.hidden_size if checkpointing else layer
    return int(layer + layers * kept)


def _generate_bytes(text: PreTrainedConfig, settings: RlSettings, length: int, size: int) -> int:
    replies = min(settings.replies, AT_ONCE)
    heads = getattr(text, "num_key_value_heads", text.num_attention_heads) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache: int = 2 * heads * width * text.num_hidden_layers * length * size
    logits: int = LOGIT_COPIES * 4 * text.vocab_size
    return replies * (cache + logits)


def _gb(count: int) -> str:
    return f"{count / GB:.1f} GB"
