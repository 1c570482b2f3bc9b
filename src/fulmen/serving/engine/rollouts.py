"""vLLM as the engine of reinforcement learning, in the process that trains.

On a CPU its layers, its sampler and this plugin are deterministic: the same call gives the same rollouts.
"""

import gc
import random
import weakref
from collections.abc import Iterable, Sequence
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fulmen.errors import ConfigError, EngineError, FulmenError, one_line
from fulmen.modeling.config_checks import read_own_config
from fulmen.modeling.experts import experts_of
from fulmen.modeling.rollouts import Rollout, Sampling
from fulmen.modeling.weight_files import require_sound_files
from fulmen.serving.engine.guest import as_guest
from fulmen.serving.engine.rollout_inputs import (
    checked_weights,
    require_length,
    require_prompts,
    require_sampling,
    rounded_biases,
    stop_tokens,
    weight_shapes,
)
from fulmen.serving.engine.rollout_memory import RolloutMemory, plan_memory
from fulmen.serving.engine.settings import require_vllm
from fulmen.serving.vllm_plugin import require_in_vllm

# Tokens tied with the last one of top-k are kept, too; so many more than k are asked for.
TIES = 32


class VllmRollouts:
    """A `fulmen.modeling.rollouts.RolloutEngine`: a model of fulmen's or a dense one, run by vLLM.

    Args:
        model_dir: of the model; its weights count until the first `update`.
        max_model_len: tokens of a prompt and its reply.
        memory_gib: of the cache of keys and values. Default: room for `FULL_REPLIES` of full length.
        dtype: of weights and computation, "float32" or "bfloat16". Default: the trainer's, float32.
        seed: of what vLLM itself draws; replies have the streams of `Sampling.seed`.

    Raises:
        ConfigError: a length or dtype that cannot be, or a model whose settings do not fit vLLM.
        CheckpointError: a model that cannot be read.
        UnsupportedModelError: a converted model that vLLM has no class for.
        EngineError: vLLM is not installed, there is no room for it, or it does not start.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        max_model_len: int,
        memory_gib: float | None = None,
        dtype: str = "float32",
        seed: int = 0,
    ) -> None:
        place = Path(model_dir)
        config = read_own_config(str(place))
        require_length(config, max_model_len)
        require_in_vllm(config)
        require_sound_files(place)
        require_vllm()
        self.memory: RolloutMemory = plan_memory(place, config, max_model_len, memory_gib, dtype)
        self.memory.require_room()
        self.max_model_len, self._vocab_size = max_model_len, config.get_text_config().vocab_size
        self._stops = stop_tokens(place, config)
        self._has_experts = experts_of(config) is not None
        self._is_tied = bool(config.get_text_config().tie_word_embeddings)
        self._expected = weight_shapes(place, self._is_tied)
        self._is_whole = True
        self._dtype = getattr(torch, dtype)
        in_group = torch.distributed.is_initialized()
        self._routing: Any = None
        self._expert_layers: list[int] = []
        self._llm: Any = self._start(place, seed)
        # At the latest when this object or the process ends, and before vLLM itself would.
        self._shut_down = weakref.finalize(self, _shut_down, self._llm.llm_engine.engine_core, in_group)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Rollout]:
        """As `RolloutEngine.generate`.

        Raises ConfigError: sampling that cannot be, kept tokens without a limit, an empty prompt or one that
        leaves no room for its reply.
        """
        self._require_ready()
        require_sampling(sampling)
        require_prompts(prompts, sampling.max_new_tokens, self.max_model_len, self._vocab_size)
        asked = [(prompt, reply) for prompt in range(len(prompts)) for reply in range(sampling.per_prompt)]
        with as_guest():
            params = [self._params(sampling, *which) for which in asked]
            answers = _vllm().ask(self._llm, [prompts[prompt] for prompt, _ in asked], params)
        experts = self._experts(answers)
        return [
            _rollout(prompt, answer.outputs[0], experts.get(answer.request_id), bool(sampling.top_k))
            for (prompt, _), answer in zip(asked, answers, strict=True)
        ]

    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """As `RolloutEngine.update`; experts may be one tensor or many, a tied head may be left out.

        Raises:
            ConfigError: weights that are not the model's, or not all. The engine then has some of both, and
                answers nothing until an update succeeds.
            EngineError: vLLM cannot take weights while it runs this model.
        """
        if self._llm is None:
            raise ConfigError("the engine is closed; start another")
        self._is_whole = False
        checked = checked_weights(weights, self._expected, self._is_tied)
        with as_guest():
            try:
                _vllm().reload(self._llm, rounded_biases(checked, self._dtype))
            except FulmenError:
                raise
            except Exception as error:
                raise EngineError(
                    f"vLLM cannot take these weights ({one_line(error)}); start another engine with them"
                ) from error
        self._is_whole = True

    def selections(self, tokens: Sequence[int]) -> dict[int, Tensor]:
        """Which keys the model selects when it reads a text; empty for a dense model.

        Returns:
            For each converted layer `topk_TK`, int32: positions, ascending, then -1, of the queries that see
            more keys than the model's k, in their order.

        Raises ConfigError: no tokens, or more than fit.
        """
        self._require_ready()
        require_prompts([tokens], 1, self.max_model_len, self._vocab_size)
        with as_guest():
            return _vllm().selections(self._llm, tokens)

    def close(self) -> None:
        """As `RolloutEngine.close`; further calls do nothing."""
        self._llm = None
        self._shut_down()

    def _start(self, place: Path, seed: int) -> Any:
        settings: dict[str, Any] = {
            "max_model_len": self.max_model_len,
            "dtype": self._dtype,
            "seed": seed,
            "kv_cache_memory_bytes": self.memory.cache_bytes,
            "gpu_memory_utilization": self.memory.share,
        }
        with as_guest():
            try:
                llm = _vllm().start(place, self._has_experts, **settings)
            except Exception as error:
                raise EngineError(
                    f"vLLM does not start for {place} ({one_line(error)}); see the reason there"
                ) from error
            if self._has_experts:
                self._routing, self._expert_layers = _vllm().watch_experts(llm)
        return llm

    def _params(self, sampling: Sampling, prompt: int, reply: int) -> dict[str, Any]:
        """vLLM's settings for one reply."""
        return {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": sampling.max_new_tokens,
            "logprobs": min(sampling.top_k + TIES, self._vocab_size) if sampling.top_k else 0,
            "seed": random.Random(f"{sampling.seed} {prompt} {reply}").getrandbits(31),
            "stop_token_ids": self._stops,
        }

    def _experts(self, answers: Sequence[Any]) -> dict[str, Any]:
        """The experts of each answer, by its request; empty for a model without."""
        if self._routing is not None:
            # vLLM adds letters to the names of requests.
            return {name.rpartition("-")[0]: experts for name, experts in self._routing.take().items()}
        if not self._has_experts:
            return {}
        layers = self._expert_layers
        return {one.request_id: one.outputs[0].routed_experts[:, layers].tolist() for one in answers}

    def _require_ready(self) -> None:
        """Raise ConfigError for an engine that cannot answer."""
        if self._llm is None:
            raise ConfigError("the engine is closed; start another")
        if not self._is_whole:
            raise ConfigError("an update of the engine failed and its weights are mixed; update it with all")


def _vllm() -> Any:
    """What vLLM can do; imported where it is needed, as a guest."""
    from fulmen.serving.vllm_plugin import in_process

    return in_process


def _shut_down(core: Any, in_group: bool) -> None:
    """Give back an engine's memory, threads and process group."""
    with as_guest():
        if in_group:
            # vLLM would end the trainer's process group, too.
            core.engine_core.model_executor.shutdown()
        else:
            core.shutdown()
        gc.collect()


def _rollout(prompt: int, output: Any, experts: Any, is_limited: bool) -> Rollout:
    """vLLM's answer as a rollout; the sampled token is the first that is told of each position."""
    told = output.logprobs
    tokens = tuple(output.token_ids)
    kept = tuple(
        tuple(
            dict.fromkeys(
                token
                for token, logprob in zip(told.token_ids[start:end], told.logprobs[start:end], strict=True)
                if logprob > -inf
            )
        )
        for start, end in zip(told.start_indices, told.end_indices, strict=True)
    )
    logprobs = tuple(told.logprobs[start] for start in told.start_indices)
    ended = output.finish_reason == "stop"
    return Rollout(prompt, tokens, logprobs, kept if is_limited else None, ended, experts)
