"""What an engine takes beside the trainer whose memory it shares, known before it starts."""

from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path

import psutil
import torch
from safetensors import safe_open
from transformers import PreTrainedConfig

from fulmen.config import DsaConfig
from fulmen.errors import ConfigError, EngineError
from fulmen.modeling.cost import token_bytes
from fulmen.modeling.families import dsa_of, has_dsa
from fulmen.modeling.weight_files import weight_files

GIB = 2**30
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
# The cache has room for so many replies of full length with their prompts.
FULL_REPLIES = 16
# vLLM's own code and tables, and what a step takes for a while.
OVERHEAD_BYTES = GIB
_NO_DSA = DsaConfig(1, 1, 1, 2, ())


@dataclass(frozen=True)
class RolloutMemory:
    """The plan of an engine's memory, in bytes.

    Attributes:
        weights_bytes: of its own copy of the model; a head that is the embedding is packed, and counts twice.
        cache_bytes: of keys, values and index keys.
        free_bytes, total_bytes: of the machine, or of the GPU if there is one.
    """

    weights_bytes: int
    cache_bytes: int
    free_bytes: int
    total_bytes: int

    @property
    def needed_bytes(self) -> int:
        """All that the engine takes."""
        return self.weights_bytes + self.cache_bytes + OVERHEAD_BYTES

    @property
    def share(self) -> float:
        """Of all there is, as vLLM wants it said."""
        return min(1.0, self.needed_bytes / self.total_bytes)

    def __str__(self) -> str:
        sizes = (self.weights_bytes, self.cache_bytes, OVERHEAD_BYTES, self.free_bytes)
        weights, cache, overhead, free = (f"{size / GIB:.1f}" for size in sizes)
        return f"weights {weights} + cache {cache} + overhead {overhead} of {free} GiB free"

    def require_room(self) -> None:
        """Raise EngineError if there is less memory than the engine takes."""
        if self.needed_bytes > self.free_bytes:
            raise EngineError(
                f"the rollout engine does not fit beside the trainer ({self}); lower memory_gib or "
                "max_model_len, or use dtype 'bfloat16'"
            )


def plan_memory(
    place: Path, config: PreTrainedConfig, max_model_len: int, memory_gib: float | None, dtype: str
) -> RolloutMemory:
    """The memory of an engine for the model at `place`.

    Raises ConfigError: an unknown dtype, or a cache that does not hold one text of `max_model_len` tokens.
    """
    if dtype not in ITEM_BYTES:
        raise ConfigError(f"dtype={dtype!r} is not supported; use one of {', '.join(ITEM_BYTES)}")
    size = ITEM_BYTES[dtype]
    kept = token_bytes(config, dsa_of(config) if has_dsa(config) else _NO_DSA, size)
    text_bytes = max_model_len * sum(kept)
    cache_bytes = FULL_REPLIES * text_bytes if memory_gib is None else int(memory_gib * GIB)
    if cache_bytes < text_bytes:
        raise ConfigError(
            f"memory_gib={memory_gib} does not hold one text of max_model_len={max_model_len} tokens; "
            f"use {ceil(100 * text_bytes / GIB) / 100} or more"
        )
    free, total = _memory()
    return RolloutMemory(_numbers(place, config) * size, cache_bytes, free, total)


def _numbers(place: Path, config: PreTrainedConfig) -> int:
    """How many numbers the model's weights have, by the headers of its files."""
    count = 0
    for file in weight_files(place):
        with safe_open(file, "pt") as opened:
            count += sum(prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    head = config.get_text_config()
    return count + (head.vocab_size * head.hidden_size if head.tie_word_embeddings else 0)


def _memory() -> tuple[int, int]:
    """Free and all, in bytes."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return int(free), int(total)
    memory = psutil.virtual_memory()
    return int(memory.available), int(memory.total)
