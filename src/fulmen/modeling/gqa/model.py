"""What turns a stock Transformers model into a DSA model: mixins that go before the stock classes."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from fulmen.config import DsaConfig
from fulmen.errors import CacheError, ConfigError, UnsupportedModelError
from fulmen.modeling.forward_checks import require_no_attention_weights, require_no_dropout
from fulmen.modeling.gqa.attention import ATTENTION_NAME
from fulmen.modeling.gqa.cache import DsaCache, require_index_key_layers
from fulmen.modeling.gqa.coarse import CoarseIndexer
from fulmen.modeling.gqa.indexer import GqaIndexer, IndexProjection
from fulmen.modeling.intervals import visible_intervals
from fulmen.modeling.lengths import PREFILL_CHUNK
from fulmen.modeling.linear_layers import linear_layers, read_documents_apart
from fulmen.modeling.rope_tables import rope_for_length
from fulmen.modeling.windows import full_layers


def accept_any_config(config: PreTrainedConfig) -> None:
    """Whatever the stock classes do with it, the DSA classes do too."""


def require_causal(config: PreTrainedConfig) -> None:
    """Raise UnsupportedModelError for attention that sees later tokens, which some Gemma models have."""
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedModelError(
            f"model_type {config.model_type!r} with use_bidirectional_attention=True is not supported; "
            "only causal attention is"
        )


class DsaPreTrainedMixin:
    """What base model and language model share."""

    config: Any
    post_init: Callable[[], None]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, GqaIndexer):
            module.reset_rope_pairs()
        elif isinstance(module, CoarseIndexer):
            module.reset(self.config.get_text_config().initializer_range)
        elif isinstance(module, IndexProjection):
            module.reset_parameters(self.config.get_text_config().initializer_range)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """As the stock class: Transformers reads the source of a class's module to find out."""
        stock: Any = cls.__bases__[-1]
        can: bool = stock._can_set_experts_implementation()
        return can

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """A DSA model has one attention. Raises ConfigError for any other."""
        _require_own_attention(attn_implementation)


class DsaModelMixin(DsaPreTrainedMixin):
    """Goes before a stock base model: swaps the attention of converted layers, makes intervals and caches."""

    attention_class: ClassVar[type[nn.Module]]
    require: ClassVar[Callable[[Any], None]]
    layers: nn.ModuleList
    training: bool
    gradient_checkpointing: bool

    def __init__(self, config: PreTrainedConfig) -> None:
        type(self).require(config)
        dsa = require_dsa(config)
        _set_own_attention(config)
        super().__init__(config)  # type: ignore[call-arg]
        for layer in dsa.layers:
            attention: Any = self.attention_class(config, layer)
            attention.join(self.layers[layer])
        for layer in linear_layers(config):
            read_documents_apart(self.layers[layer].linear_attn)  # type: ignore[arg-type]
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock model. Makes a DsaCache if one is wanted and none given; in training only if asked to.

        Raises:
            CacheError: `past_key_values` has no room for index keys.
            ConfigError: an attention mask that is not one run of ones per row; attention dropout in training;
                attention weights asked for.
        """
        require_no_attention_weights(kwargs.get("output_attentions"), self.config.output_attentions)
        require_no_dropout(self.config, training=self.training)
        use_cache = self._wants_cache(use_cache)
        if use_cache and past_key_values is None:
            past_key_values = DsaCache(self.config)
        if past_key_values is not None:
            require_index_key_layers(past_key_values, self.config)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        assert tokens is not None, "input_ids or inputs_embeds"
        visible = self.visible(
            attention_mask,
            # Transformers looks for packed documents only where there is no cache at all.
            position_ids if past_key_values is None else None,
            batch=tokens.shape[0],
            n_queries=tokens.shape[1],
            n_past=0 if past_key_values is None else past_key_values.get_seq_length(),
            device=tokens.device,
        )
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            # For layers with linear attention; all others have the intervals.
            attention_mask=attention_mask if linear_layers(self.config) else None,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            visible=visible,
            **kwargs,
        )

    # What each query sees, which models that read images may have a say in.
    visible = staticmethod(visible_intervals)

    def _wants_cache(self, use_cache: bool | None) -> bool:
        if self.training and (use_cache is None or self.gradient_checkpointing):
            return False
        return bool(self.config.use_cache if use_cache is None else use_cache)


# "GenerationMixin" in this name tells Transformers' loader of remote code that `generate` is in its place.
class DsaGenerationMixin(DsaPreTrainedMixin):
    """Goes before a stock language model, alone or with a vision tower: holds the DSA base model and gives
    `generate` the right cache.
    """

    model_class: ClassVar[type[nn.Module]]
    generation_config: GenerationConfig

    def __init__(self, config: PreTrainedConfig) -> None:
        text: Any = config.get_text_config()
        _set_own_attention(text)
        # The stock class keeps what it needs of the config; its dense model costs nothing there.
        with torch.device("meta"):
            super().__init__(config)  # type: ignore[call-arg]
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Any:
        """As Transformers' `generate`, with a DsaCache of the right size and a long prompt read in chunks.

        A model that reads images reads its prompt at once. However it is read, a prompt has one rotary table:
        that of its full length.

        Raises CacheError if `cache_implementation` asks for another cache, ConfigError for attention weights.
        """

        def setting(name: str) -> Any:
            sources = (kwargs.get(name), getattr(generation_config, name, None))
            chosen = next((value for value in sources if value is not None), None)
            return getattr(self.generation_config, name, None) if chosen is None else chosen

        require_no_attention_weights(setting("output_attentions"))
        if (wanted := setting("cache_implementation")) is not None:
            raise CacheError(f"cache_implementation={wanted!r} has no room for index keys; leave it out")
        if setting("use_cache") is not False and kwargs.get("past_key_values") is None:
            prompt_length = _prompt_length(inputs, kwargs)
            max_new_tokens, max_length = setting("max_new_tokens"), setting("max_length")
            planned = prompt_length + max_new_tokens if max_new_tokens is not None else max_length
            text = self.config.get_text_config()
            kwargs["past_key_values"] = DsaCache(text, _tokens_at_once(planned, text))
            is_long = prompt_length > PREFILL_CHUNK and kwargs.get("inputs_embeds") is None
            is_long &= text is self.config
            if is_long and setting("prefill_chunk_size") is None:
                generation_config = _with_prefill_chunk(generation_config, kwargs)
        return super().generate(inputs, generation_config=generation_config, **kwargs)  # type: ignore[misc]

    def _prefill(
        self, input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict, **kwargs: Any
    ) -> Any:
        """Transformers' own step of `generate` that reads the prompt, at once or in chunks."""
        read: Callable[..., Any] = super()._prefill  # type: ignore[misc]
        if generation_config.prefill_chunk_size is None:
            return read(input_ids, generation_config, model_kwargs, **kwargs)
        with rope_for_length(self, _longest_row(input_ids, model_kwargs)):  # type: ignore[arg-type]
            return read(input_ids, generation_config, model_kwargs, **kwargs)


def require_dsa(config: PreTrainedConfig) -> DsaConfig:
    """The DSA part of a config. Raises ConfigError if it is missing or does not fit the rest."""
    if not getattr(config, "dsa", None):
        raise ConfigError(f"config of {config.model_type!r} has no key 'dsa'; make one by converting a model")
    dsa = DsaConfig.from_dict(config.dsa)
    if list(dsa.layers) != sorted(set(dsa.layers) & set(range(config.num_hidden_layers))):
        raise ConfigError(
            f"dsa layers {list(dsa.layers)} do not fit num_hidden_layers={config.num_hidden_layers}; "
            f"list some of 0 to {config.num_hidden_layers - 1}, ascending"
        )
    if linear := sorted(set(dsa.layers) & set(linear_layers(config))):
        raise ConfigError(f"dsa layers {linear} have linear attention; list full-attention layers only")
    if sliding := sorted(set(dsa.layers) - set(full_layers(config))):
        raise ConfigError(f"dsa layers {sliding} have a sliding window; list full-attention layers only")
    return dsa


def set_topk_ratios(model: PreTrainedModel, ratios: Sequence[float]) -> None:
    """Let the converted layers of a GQA DSA model share the budget so (`DsaConfig.topk_shares`).

    Raises ConfigError if the ratios cannot be.
    """
    dsa = DsaConfig.from_dict({**model.config.dsa, "topk_shares": tuple(ratios)})
    model.config.dsa = dsa.to_dict()


def _set_own_attention(config: PreTrainedConfig) -> None:
    # A config changes to "eager" by itself when it is asked for the weights.
    require_no_attention_weights(config.output_attentions)
    _require_own_attention(config._attn_implementation or ATTENTION_NAME)
    config._attn_implementation = ATTENTION_NAME


def _require_own_attention(name: str | dict) -> None:
    if name != ATTENTION_NAME:
        raise ConfigError(
            f"attn_implementation={name!r} cannot be set; DSA models run {ATTENTION_NAME!r}, leave it out"
        )


def _tokens_at_once(planned: float | None, config: PreTrainedConfig) -> int | None:
    """Tokens to make room for at once: some files allow any length, which no memory holds; a cache grows."""
    context = getattr(config, "max_position_embeddings", None) or PREFILL_CHUNK
    return None if planned is None else int(min(planned, context))


def _prompt_length(inputs: Tensor | None, kwargs: dict[str, Any]) -> int:
    prompts = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    return max((prompt.shape[1] for prompt in prompts if prompt is not None), default=1)


def _longest_row(input_ids: Tensor, model_kwargs: dict[str, Any]) -> int:
    """Tokens of the longest row, padding not counted: its last position, and one."""
    if (position_ids := model_kwargs.get("position_ids")) is not None:
        return int(position_ids.max()) + 1
    if (mask_BS := model_kwargs.get("attention_mask")) is not None:
        return int(mask_BS.sum(-1).max())
    return input_ids.shape[1]


def _with_prefill_chunk(
    generation_config: GenerationConfig | None, kwargs: dict[str, Any]
) -> GenerationConfig | None:
    """Ask for chunks in the place the caller uses; Transformers deprecates the use of both."""
    if generation_config is None:
        kwargs["prefill_chunk_size"] = PREFILL_CHUNK
        return None
    chunked = copy.deepcopy(generation_config)
    chunked.prefill_chunk_size = PREFILL_CHUNK
    return chunked
