"""What is timed on a GPU: one layer's decoding and prefill, a training step, a whole model; beside dense."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.gpu.shapes import ModelShape, decode_floor, decoding_step
from fulmen.ops.attention.sparse import sparse_attention
from fulmen.ops.dispatch import pin_backend
from fulmen.ops.paged.requests import attend_requests

ROUNDS, WARM_UP = 10, 3
Calls = dict[str, Callable[[], Any]]
# Queries that a server reads of a prompt in one step.
CHUNK = 8192


def milliseconds(calls: Calls, device: str, rounds: int = ROUNDS) -> dict[str, float]:
    """Median of each call, call after call in each round; the first rounds do not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + WARM_UP):
        for name, run in calls.items():
            _wait(device)
            begin = time.perf_counter()
            run()
            _wait(device)
            if number >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(found) for name, found in times.items()}


def decode(shape: ModelShape, device: str, batch: int, length: int) -> dict[str, Any]:
    """One token of each request, one layer; DSA by a CUDA graph, as a server would, and dense likewise."""
    layer, requests, q_THD, index = decoding_step(shape, batch, length, device)
    out_THD = torch.empty_like(q_THD)
    sizes = (batch, shape.key_heads, length, shape.width)
    k_BGSD, v_BGSD = (torch.randn(sizes, device=device, dtype=q_THD.dtype) for _ in range(2))
    q_BHTD = q_THD[:, :, None]

    def dsa() -> None:
        attend_requests(layer, requests, q_THD, index, out_THD)

    calls = {"dsa": dsa, "dense, SDPA": lambda: sdpa(q_BHTD, k_BGSD, v_BGSD, enable_gqa=True)}
    with pin_backend("triton"):
        found = milliseconds({name: _captured(run, device) for name, run in calls.items()}, device)
    return {"ms": found, "floor bytes": batch * decode_floor(shape, length)}


def prefill(shape: ModelShape, device: str, length: int, chunk: int = CHUNK) -> dict[str, Any]:
    """All of a text, one layer, DSA by chunks of queries over the paged cache."""
    steps = [decoding_step(shape, 1, length, device, min(chunk, length))]
    layer, requests, q_THD, index = steps[0]
    out_THD, count = torch.empty_like(q_THD), len(q_THD)

    def dsa() -> None:
        for stop in range(count, length + 1, count):
            requests.length_B.fill_(stop)
            attend_requests(layer, requests, q_THD, index, out_THD)

    qkv = [
        torch.randn(1, heads, length, shape.width, device=device, dtype=q_THD.dtype)
        for heads in (shape.heads, shape.key_heads, shape.key_heads)
    ]
    calls: Calls = {"dsa": dsa, "dense, SDPA": lambda: sdpa(*qkv, is_causal=True, enable_gqa=True)}
    with pin_backend("triton"):
        return {"ms": milliseconds(calls, device, rounds=3)}


def training(shape: ModelShape, device: str, length: int) -> dict[str, Any]:
    """Forward and backward of a layer's attention over a text of `length`."""
    q_BTHD, k_BSGD, v_BSGD = (
        torch.randn(1, length, heads, shape.width, device=device, dtype=torch.bfloat16).requires_grad_()
        for heads in (shape.heads, shape.key_heads, shape.key_heads)
    )
    topk = min(shape.topk, length)
    last_T1 = torch.arange(length, device=device)[:, None]
    recent_TK = last_T1 - torch.arange(topk, device=device).flip(0)
    topk_BTK = torch.where(recent_TK < 0, -1, recent_TK)[None].int()

    def dsa() -> None:
        sparse_attention(q_BTHD, k_BSGD, v_BSGD, topk_BTK, shape.width**-0.5)[0].sum().backward()

    def dense() -> None:
        heads_first = (x.transpose(1, 2) for x in (q_BTHD, k_BSGD, v_BSGD))
        sdpa(*heads_first, is_causal=True, enable_gqa=True).sum().backward()

    with pin_backend("triton"):
        return {"ms": milliseconds({"dsa": dsa, "dense, SDPA": dense}, device, rounds=3)}


def generate(device: str, length: int, new_tokens: int, changes: dict[str, int]) -> dict[str, Any]:
    """SmolLM2-135M's shape with random weights and indexers, by Transformers; first that it is the dense one.

    changes: of the config, to make it smaller.
    """
    from transformers import LlamaConfig

    from fulmen.modeling.families import family_for
    from fulmen.modeling.index_shape import default_dsa

    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192}
    config = LlamaConfig(**{**shape, **heads, "tie_word_embeddings": True, "pad_token_id": 0, **changes})
    family = family_for(config)
    torch.manual_seed(0)
    with torch.device(device):
        dense = family.source_class(config).bfloat16().eval()
        ids_1T = torch.randint(1, config.vocab_size, (1, length))
    converted = family.from_dense(dense, default_dsa(config, topk=length + new_tokens)).to(device)
    settings: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        logits = [model(ids_1T, logits_to_keep=1).logits.float() for model in (dense, converted)]
    found: dict[str, Any] = {
        "largest difference of logits, k >= length": float((logits[0] - logits[1]).abs().max())
    }
    family.set_topk(converted, max(length // 8, 1))
    calls: Calls = {
        "dsa": lambda: converted.generate(ids_1T, **settings),
        "dense": lambda: dense.generate(ids_1T, **settings),
    }
    return {**found, "ms": milliseconds(calls, device, rounds=1)}


def _captured(run: Callable[[], Any], device: str) -> Callable[[], Any]:
    """The call as a CUDA graph, where there are some: without the time of Python."""
    if device == "cpu":
        return run
    for _ in range(2):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
