"""Models that read images, from end to end: converted as a whole, their texts evaluated, the rest refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import fulmen
from fulmen.errors import AlreadyConvertedError, CheckpointError, ConfigError, UnsupportedModelError
from fulmen.pipeline.model_config import require_language_model_alone
from fulmen.pipeline.settings import EvalSettings
from fulmen.pipeline.train_settings import TrainSettings
from tests.modeling.whole.tiny_whole import make_whole, prompt
from tests.pipeline.tiny_runs import convert, evaluate, save_tiny, settings, train


def save_whole(name: str, folder, **changes):
    """A tiny model with its tokenizer and a processor's file."""
    dense = make_whole(name, **changes)
    save_tiny(dense, folder)
    (folder / "preprocessor_config.json").write_text('{"size": {"longest_edge": 28}}')
    return dense


def weights_in(folder) -> dict[str, torch.Tensor]:
    return {key: x for file in folder.glob("model*.safetensors") for key, x in load_file(file).items()}


@pytest.mark.parametrize("name", ["idefics3", "qwen2_5_vl"])
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


def test_layer_by_layer_its_texts_are_evaluated_and_the_rest_is_refused(tmp_path, corpus_dir):
    dense = save_whole("gemma3", tmp_path / "dense")
    asked = settings(tmp_path / "dense", tmp_path / "out", corpus_dir, steps=None, by_layers=True)
    out = convert(asked)
    model, inputs = fulmen.load(out)[0], prompt("gemma3")
    fulmen.set_topk(model, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, dense(**inputs).logits, atol=2e-5, rtol=1e-4)
    report = evaluate(EvalSettings(out, data=(str(corpus_dir),), length=64, quick=True))
    assert report.variants["dsa"]
    described = [fulmen.inspect(folder) for folder in (tmp_path / "dense", out)]
    assert [one.converted for one in described] == [False, True]
    assert described[0].architecture == "Gemma3ForConditionalGeneration"
    assert described[1].architecture == "Gemma3DsaForConditionalGeneration"
    for folder in (tmp_path / "dense", out):
        with pytest.raises(UnsupportedModelError, match="reads images: serve takes language models alone"):
            require_language_model_alone(folder, "serve")
    with pytest.raises(UnsupportedModelError, match="reads images: train takes"):
        train(TrainSettings(out, tmp_path / "trained", data=(str(corpus_dir),)))
    with pytest.raises(AlreadyConvertedError, match="'gemma3_text_dsa' has DSA already"):
        convert(settings(out, tmp_path / "again", corpus_dir))


def test_what_cannot_be_is_said_before_the_work(tmp_path, corpus_dir):
    save_whole("smolvlm", tmp_path / "dense")
    for changes in ({"dtype": "bfloat16"}, {"stages": ("inherit", "warmup", "sparse")}):
        with pytest.raises(ConfigError, match="leave out dtype and the stage sparse"):
            convert(settings(tmp_path / "dense", tmp_path / "out", corpus_dir, **changes))
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    name = next(key for key in weights if "vision_model" in key)
    del weights[name]
    save_file(weights, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks 1 weights, the first {name}"):
        convert(settings(tmp_path / "dense", tmp_path / "out", corpus_dir))
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    config["text_config"]["model_type"] = "qwen3"
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="'smolvlm' around a language model of type 'qwen3'"):
        fulmen.inspect(tmp_path / "dense")
