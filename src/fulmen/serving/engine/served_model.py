"""What a server has to know of a model before the engine runs: read from its directory, no weights loaded."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from fulmen.config import DsaConfig
from fulmen.errors import CheckpointError, ConfigError, UnsupportedModelError
from fulmen.modeling.cache import CacheBytes
from fulmen.modeling.config_checks import read_own_config
from fulmen.modeling.cost import attention_cost, index_key_bytes, token_bytes
from fulmen.modeling.families import dsa_of, family_like
from fulmen.modeling.linear_layers import linear_layers
from fulmen.modeling.vision import vision_family_for
from fulmen.modeling.weight_files import PICKLES, require_sound_files
from fulmen.modeling.windows import layer_windows
from fulmen.serving.vllm_plugin import require_in_vllm

DEFAULT_CONTEXT = 8192
# What a dense model's cache is measured with: no layer has index keys.
_NO_DSA = DsaConfig(1, 1, 1, 2, ())
# How chats are written: in DeepSeek-V3.2's encoding, or by the tokenizer's template.
V32, TEMPLATE = "deepseek-v3.2", "template"
_USER_TOKEN = "<｜User｜>"


class FillInTheMiddle(NamedTuple):
    """The tokens around prompt and suffix: `before` prompt `between` suffix `after`."""

    before: str
    between: str
    after: str

    def render(self, prompt: str, suffix: str) -> str:
        """The text that the model completes."""
        return f"{self.before}{prompt}{self.between}{suffix}{self.after}"


# In the order in which the models' own documentation lays them out.
KNOWN_FIM = (
    FillInTheMiddle("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    FillInTheMiddle("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    FillInTheMiddle("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    FillInTheMiddle("[PREFIX]", "[SUFFIX]", "[MIDDLE]"),
)


@dataclass(frozen=True)
class ServedModel:
    """A model as a server sees it.

    Attributes:
        place: its directory.
        name: what clients call it: the directory's name.
        config: of the model.
        dsa: None for a dense model.
        context: tokens of prompt and answer together.
        chat_template: the tokenizer's, or "" if it has none.
        special_tokens: the tokenizer's added tokens.
        chat_encoding: V32, where chats are written in DeepSeek-V3.2's encoding whatever the template; or "".
        reads_images: whether it is the language model of one that does; it is served by itself.
    """

    place: Path
    name: str
    config: PreTrainedConfig
    dsa: DsaConfig | None
    context: int
    chat_template: str
    special_tokens: frozenset[str]
    chat_encoding: str = ""
    reads_images: bool = False

    @cached_property
    def token_bytes(self) -> CacheBytes:
        """What the cache keeps per token, in bfloat16."""
        if self.dsa is None:
            return CacheBytes(token_bytes(self.config, _NO_DSA).kv, 0)
        return token_bytes(self.config, self.dsa)

    @cached_property
    def index_key_bytes(self) -> int:
        """The indexer's keys of one token in one converted layer."""
        return 0 if self.dsa is None else index_key_bytes(self.config, self.dsa)

    @cached_property
    def coarse_key_bytes(self) -> int:
        """Its coarse key; 0 where the index has one level."""
        return 0 if self.dsa is None else family_like(self.config).coarse_key_bytes(self.dsa)

    @cached_property
    def layer_kv_bytes(self) -> int:
        """Keys and values of one token in one layer."""
        return 2 * attention_cost(self.config).token_width

    @cached_property
    def windows(self) -> dict[int, int | None]:
        """For each layer that keeps keys the number of tokens that its queries see; None: all."""
        states = linear_layers(self.config)
        return {layer: seen for layer, seen in enumerate(layer_windows(self.config)) if layer not in states}

    @property
    def is_float16(self) -> bool:
        """Whether its config says that its weights are."""
        return str(self.config.get_text_config().dtype).removeprefix("torch.") == "float16"

    @property
    def speaks_v32(self) -> bool:
        """Whether chats are written in DeepSeek-V3.2's encoding: such models come without a template."""
        return (
            self.config.model_type == "deepseek_v32"
            and not self.chat_template
            and _USER_TOKEN in self.special_tokens
        )

    @property
    def fim(self) -> FillInTheMiddle | None:
        """How the model fills in the middle; None if its tokenizer has no tokens for it."""
        return next((known for known in KNOWN_FIM if self.special_tokens >= set(known)), None)


def served_model(place: Path, config: PreTrainedConfig, chat_encoding: str | None = None) -> ServedModel:
    """Read what a server needs of the model at `place`.

    Args:
        chat_encoding: V32 or TEMPLATE; None: what the config says under `chat_encoding`, else TEMPLATE.

    Raises:
        ConfigError: another chat encoding.
        CheckpointError: the directory has no tokenizer.json, which the engine needs, or its weights are
            pickles, an adapter, or cut short.
        UnsupportedModelError: a converted model that vLLM has no class for.
    """
    require_in_vllm(config)
    if any(file.suffix in (*PICKLES, ".safetensors") for file in place.iterdir()):
        require_sound_files(place)
    tokenizer = _read_json(place / "tokenizer.json")
    if tokenizer is None:
        raise CheckpointError(f"{place} has no tokenizer.json; save the model's tokenizer beside it")
    try:
        dsa = dsa_of(config)
    except UnsupportedModelError:
        dsa = None
    context = getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    added = frozenset(str(token.get("content")) for token in tokenizer.get("added_tokens", []))
    encoding = _chat_encoding(chat_encoding or getattr(config, "chat_encoding", None) or TEMPLATE)
    name, template = place.resolve().name, _chat_template(place)
    reads_images = vision_family_for(read_own_config(str(place))) is not None
    return ServedModel(place, name, config, dsa, context, template, added, encoding, reads_images)


def _chat_encoding(name: str) -> str:
    if name not in (V32, TEMPLATE):
        raise ConfigError(
            f"chat_encoding={name!r:.80} cannot be; use {V32} or {TEMPLATE}", arguments=["chat_encoding"]
        )
    return V32 if name == V32 else ""


def _chat_template(place: Path) -> str:
    file = place / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    # The last is a processor's, as older models that read images have it.
    files = (_read_json(place / name) or {} for name in ("tokenizer_config.json", "chat_template.json"))
    template = next((one for file in files if (one := file.get("chat_template"))), "")
    return template if isinstance(template, str) else json.dumps(template)


def _read_json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is no JSON ({error}); get it anew") from error
