"""PEFT's defaults on converted models: as for the dense family, and every adapter learns."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.fork_server import Forked
from tests.modeling.gqa.tiny_gqa import CONFIGS, FAMILIES, make_dense, make_dsa, random_ids

peft = pytest.importorskip("peft")

LORA_TARGETS = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
METHODS = {
    "lora": lambda **more: peft.LoraConfig(task_type="CAUSAL_LM", r=4, **more),
    "ia3": lambda **more: peft.IA3Config(task_type="CAUSAL_LM", **more),
    "adalora": lambda **more: peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=10, **more),
    "vera": lambda **more: peft.VeraConfig(task_type="CAUSAL_LM", r=4, **more),
}


TARGETS = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING


def adapted(name, config):
    return peft.get_peft_model(make_dsa(make_dense(name), topk=6).train(), config)


def train_step(model):
    ids = random_ids(2, 20)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def without_gradient(model):
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("name", [name for name in FAMILIES if CONFIGS[name][0] in TARGETS])
def test_the_defaults_are_the_dense_models(name):
    dense = peft.get_peft_model(make_dense(name), METHODS["lora"]())
    model = adapted(name, METHODS["lora"]())
    own = [name for name, p in model.named_parameters() if p.requires_grad]
    assert own == [name for name, p in dense.named_parameters() if p.requires_grad]
    first = train_step(model)
    assert not without_gradient(model)
    assert train_step(model) < first


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_defaults(method):
    model = adapted("llama", METHODS[method]())
    train_step(model)
    assert not without_gradient(model)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_all_linear_means_all_that_learn(name):
    model = adapted(name, METHODS["lora"](target_modules="all-linear"))
    train_step(model)
    own = [name for name, p in model.named_parameters() if p.requires_grad]
    assert not without_gradient(model)
    assert not any(".indexer." in name for name in own)
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(own) == 2 * 3 * len(kinds)


def test_a_named_indexer_is_refused():
    with pytest.raises(ValueError, match=r"IndexProjection.* is not supported"):
        adapted("llama", METHODS["lora"](target_modules=["wq"]))


def test_an_adapter_is_saved_loaded_merged_and_generates(tmp_path):
    dsa = make_dsa(make_dense("llama"), topk=6)
    dsa.save_pretrained(tmp_path / "model")
    model = peft.get_peft_model(dsa.train(), METHODS["lora"](target_modules="all-linear"))
    for _ in range(3):
        train_step(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids, settings = random_ids(1, 20), {"max_new_tokens": 6, "do_sample": False}
    before = fresh(ids).logits
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    with torch.no_grad():
        expected, written = model(ids).logits, model.generate(input_ids=ids, **settings)
        torch.testing.assert_close(loaded(ids).logits, expected, **CLOSE)
        assert (expected - before).abs().max() > 0.1
        assert torch.equal(loaded.generate(input_ids=ids, **settings), written)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, **CLOSE)
        assert torch.equal(merged.generate(ids, **settings), written)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(again(ids).logits, merged(ids).logits)


def test_peft_may_be_imported_first():
    types = sorted({f"{model_type}_dsa" for model_type, _ in CONFIGS.values() if model_type in TARGETS})
    code = (
        "import peft, fulmen, peft.utils.constants as tables\n"
        "print(sorted(t for t in tables.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING if '_dsa' in t))"
    )
    program = Forked(code)
    printed, errors = program.communicate()
    assert program.returncode == 0, errors
    assert printed.splitlines()[-1] == str(types)
