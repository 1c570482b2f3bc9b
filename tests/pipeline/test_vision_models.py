"""Models that read images, from end to end: converted as a whole, their texts evaluated, the rest refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import fulmen
from tests.modeling.whole.tiny_whole import WHOLE, make_whole, prompt
from tests.pipeline.tiny_runs import convert, save_tiny, settings


def save_whole(name: str, folder, **changes):
    """A tiny model with its tokenizer and a processor's file."""
    dense = make_whole(name, **changes)
    save_tiny(dense, folder)
    (folder / "preprocessor_config.json").write_text('{"size": {"longest_edge": 28}}')
    return dense


def weights_in(folder) -> dict[str, torch.Tensor]:
    return {key: x for file in folder.glob("model*.safetensors") for key, x in load_file(file).items()}


@pytest.mark.parametrize("name", WHOLE)
def test_converted_it_is_the_whole_model(name, tmp_path, corpus_dir):
    dense = save_whole(name, tmp_path / "dense")
    out = convert(settings(tmp_path / "dense", tmp_path / "out", corpus_dir))
    before, after = weights_in(tmp_path / "dense"), weights_in(out)
    assert before.keys() < after.keys()
    assert all(".self_attn.indexer." in key for key in after.keys() - before.keys())
    assert all(torch.equal(after[key], x) for key, x in before.items())
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == f"{name}_dsa"
    assert config["vision_config"]["hidden_size"] == dense.config.vision_config.hidden_size
    assert config["text_config"]["dsa"]["topk"] == 8
    assert json.loads((out / "preprocessor_config.json").read_text()) == {"size": {"longest_edge": 28}}
    model, inputs = AutoModelForImageTextToText.from_pretrained(out).eval(), prompt(name)
    with torch.no_grad():
        expected, sparse = dense(**inputs).logits, model(**inputs).logits
        fulmen.set_topk(model, 64)
        torch.testing.assert_close(model(**inputs).logits, expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(sparse, expected, atol=1e-3)
    loaded, tokenizer = fulmen.load(out)
    assert type(loaded) is type(model)
    assert tokenizer("w5").input_ids == [5]
