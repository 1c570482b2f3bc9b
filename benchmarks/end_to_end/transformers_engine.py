"""Transformers: a dense model by SDPA and its own cache, a converted one by fulmen's attention and cache."""

import time
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import Cache

import fulmen  # noqa: F401  registers the model types
from fulmen.modeling.gqa.cache import DsaCache
from fulmen.ops.common.index_keys import pack_index_keys

# Decoding goes on after the last token of a filled cache, from any token.
TOKEN = 1000


class Engine:
    """Settings: `model`, `dtype`, `threads`."""

    versions = {name: version(name) for name in ("fulmen", "torch", "transformers")}  # noqa: RUF012

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["threads"])
        torch.set_grad_enabled(False)
        dtype = getattr(torch, settings["dtype"])
        self.model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype).eval()
        self.config = self.model.config
        self.cache: Cache | None = None

    def answer(self, prompt: list[int], new_tokens: int) -> list[int]:
        """The greedy answer."""
        cache = self._new_cache(len(prompt) + new_tokens)
        tokens = [self._next(torch.tensor([prompt]), cache)]
        while len(tokens) < new_tokens:
            tokens.append(self._next(tokens[-1], cache))
        return [int(token) for token in tokens]

    def prefill(self, prompt: list[int]) -> float:
        """Seconds until the first token of the answer."""
        begun = time.perf_counter()
        self._next(torch.tensor([prompt]), self._new_cache(len(prompt)))
        return time.perf_counter() - begun

    def fill(self, prompt: list[int]) -> None:
        """Random keys, values and index keys for as many tokens as the prompt has."""
        config, length = self.config, len(prompt)
        self.cache = self._new_cache(length + 256)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (1, length, config.num_key_value_heads, width)
        for layer in range(config.num_hidden_layers):
            k_BGSD, v_BGSD = (
                torch.empty(shape, dtype=self.model.dtype).normal_().transpose(1, 2) for _ in range(2)
            )
            self.cache.update(k_BGSD, v_BGSD, layer)
            if hasattr(self.cache.layers[layer], "update_indexer"):
                dsa = config.dsa
                keys_BSIE = torch.randn(1, length, dsa["index_n_kv_heads"], dsa["index_head_dim"])
                self.cache.layers[layer].update_indexer(pack_index_keys(keys_BSIE).flatten(2))

    def decode(self, new_tokens: int) -> float:
        """Seconds of a token after the filled cache."""
        assert self.cache is not None, "fill the cache first"
        token = self._next(torch.tensor([[TOKEN]]), self.cache)
        begun = time.perf_counter()
        for _ in range(new_tokens):
            token = self._next(token, self.cache)
        seconds = time.perf_counter() - begun
        self.cache.crop(-1 - new_tokens)
        return seconds / new_tokens

    def release(self) -> None:
        """Give back the cache's memory."""
        self.cache = None

    def _new_cache(self, tokens: int) -> Cache:
        return (
            DsaCache(self.config, tokens) if hasattr(self.config, "dsa") else DynamicCache(config=self.config)
        )

    def _next(self, ids_BT: Tensor, cache: Cache) -> Tensor:
        """The likeliest next token, `[1, 1]`."""
        logits_BTV = self.model(ids_BT, past_key_values=cache, logits_to_keep=1).logits
        return logits_BTV[:, -1:].argmax(-1)
