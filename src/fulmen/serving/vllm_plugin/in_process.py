"""vLLM in a process that has other work as well: all that a rollout engine asks of its interfaces."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

from fulmen.serving.vllm_plugin.routing import RoutingRecord, numbers_of_expert_layers
from fulmen.serving.vllm_plugin.selections import stacked, told_selections
from fulmen.serving.vllm_plugin.weights import pack_experts_anew, pack_head


def start(place: Path, has_experts: bool, **settings: Any) -> LLM:
    """vLLM for the model at a place; settings are those of `vllm.LLM` that depend on the caller."""
    on_gpu = torch.cuda.is_available()
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        # Processes that train together have an engine each.
        settings["distributed_executor_backend"] = "external_launcher"
    return LLM(
        str(place),
        logprobs_mode="processed_logprobs",
        max_logprobs=-1,
        # In bfloat16 logits of 20 would be an eighth apart.
        hf_overrides={"head_dtype": "float32"},
        skip_tokenizer_init=True,
        enforce_eager=not on_gpu,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        enable_return_routed_experts=has_experts and on_gpu,
        # What comes from a cache is not in a record of experts.
        enable_prefix_caching=not has_experts or on_gpu,
        **settings,
    )


def ask(llm: LLM, prompts: Sequence[Sequence[int]], params: Sequence[dict[str, Any]]) -> list[Any]:
    """vLLM's answers to prompts (token ids), each with its own settings of sampling."""
    # What was cached before would be read in other pieces, and rounded otherwise.
    llm.reset_prefix_cache()
    inputs: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    return llm.generate(
        inputs,
        [SamplingParams(**one, flat_logprobs=True, detokenize=False) for one in params],
        use_tqdm=False,
    )


def reload(llm: LLM, weights: Iterator[tuple[str, Tensor]]) -> None:
    """Give a running model these weights, and what is made of them."""
    try:
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    except Exception:
        # Without its end vLLM's reload leaves a model that no further one can mend.
        llm.collective_rpc(_end_reload)
        raise
    llm.apply_model(pack_head)
    llm.reset_prefix_cache()


def watch_experts(llm: LLM) -> tuple[RoutingRecord | None, list[int]]:
    """What records experts where vLLM does not, and the layers that have some."""
    llm.apply_model(pack_experts_anew)
    (layers,) = llm.apply_model(numbers_of_expert_layers)
    if torch.cuda.is_available():
        return None, layers
    (record,) = llm.collective_rpc(lambda worker: RoutingRecord(worker.model_runner))
    return record, layers


def selections(llm: LLM, tokens: Sequence[int]) -> dict[int, Tensor]:
    """As `VllmRollouts.selections`."""
    (model,) = llm.apply_model(lambda model: model)
    with told_selections(model) as told:
        ask(llm, [tokens], [{"max_tokens": 1}])
    return {layer: stacked(parts) for layer, parts in told.items()}


def _end_reload(worker: Any) -> None:
    """Give a model whose reload broke off its tensors back, with whatever is in them."""
    finalize_layerwise_reload(worker.model_runner.get_model(), worker.model_config)
