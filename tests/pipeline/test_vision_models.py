"""Models that read images, from end to end: converted as a whole, their texts evaluated, the rest refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import fulmen
from fulmen.errors import AlreadyConvertedError, CheckpointError, ConfigError, UnsupportedModelError
from fulmen.modeling.checkpoint import find_source
from fulmen.pipeline.model_config import require_language_model_alone, require_no_dense_whole
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


def trained(source, out, corpus_dir, **changes):
    """By two steps that change something."""
    options = {"steps": 2, "learning_rate": 1e-2, "indexer_learning_rate": 1e-2, **changes.pop("options", {})}
    asked = {"data": (str(corpus_dir),), "length": 64, "options": options, **changes}
    return train(TrainSettings(source, out, **asked))


@pytest.mark.parametrize("lora", [None, 2], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_its_language_model_is_trained_on_texts_and_the_rest_stays(name, lora, tmp_path, corpus_dir):
    save_whole(name, tmp_path / "dense")
    out = convert(settings(tmp_path / "dense", tmp_path / "out", corpus_dir, stages=("inherit",), steps=None))
    done = trained(out, tmp_path / "trained", corpus_dir, options={} if lora is None else {"lora": lora})
    before, after = weights_in(out), weights_in(done)
    assert before.keys() == after.keys()
    changed = {key for key, x in before.items() if not torch.equal(after[key], x)}
    assert any(".mlp." in key for key in changed)
    assert any(".indexer." in key for key in changed)
    assert not any("vis" in key or "projector" in key for key in changed)
    record = json.loads((done / "conversion.json").read_text())
    assert record["stages"] == ["inherit", "sparse"]
    assert (done / "preprocessor_config.json").is_file()
    # With pixels: at k of the prompt's length it is the dense model with the weights that it now has.
    model, inputs = fulmen.load(done)[0], prompt(name)
    stock = make_whole(name)
    names = stock.state_dict().keys()
    stock.load_state_dict({key: x for key, x in model.state_dict().items() if key in names})
    with torch.no_grad():
        sparse = model(**inputs).logits
        fulmen.set_topk(model, 64)
        expected = stock(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(sparse, expected, atol=1e-3)
    asked = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **asked), stock.generate(**inputs, **asked))


def test_all_stages_of_a_conversion(tmp_path, corpus_dir):
    """SmolVLM, whose head is its embedding, which is trained."""
    save_whole("smolvlm", tmp_path / "dense")
    stages = {"stages": ("inherit", "warmup", "sparse"), "sparse_steps": 2}
    out = convert(settings(tmp_path / "dense", tmp_path / "out", corpus_dir, **stages))
    before, after = weights_in(tmp_path / "dense"), weights_in(out)
    assert all(".self_attn.indexer." in key for key in after.keys() - before.keys())
    model, inputs = AutoModelForImageTextToText.from_pretrained(out).eval(), prompt("smolvlm")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with torch.no_grad():
        other = {**inputs, "pixel_values": -inputs["pixel_values"]}
        assert not torch.allclose(model(**inputs).logits, model(**other).logits, atol=1e-2)
    # And on from there: a warm-up changes the indexers alone.
    again = weights_in(trained(out, tmp_path / "again", corpus_dir, stages=("warmup",)))
    changed = {key for key, x in after.items() if not torch.equal(again[key], x)}
    assert all(".indexer." in key for key in changed)


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
        with pytest.raises(UnsupportedModelError, match="reads images: rl takes language models alone"):
            require_language_model_alone(folder, "rl")
    with pytest.raises(UnsupportedModelError, match="reads images: it is served, with texts, once"):
        require_no_dense_whole(find_source(tmp_path / "dense"))
    require_no_dense_whole(find_source(out))
    with pytest.raises(AlreadyConvertedError, match="'gemma3_text_dsa' has DSA already"):
        convert(settings(out, tmp_path / "again", corpus_dir))


def test_what_cannot_be_is_said_before_the_work(tmp_path, corpus_dir):
    save_whole("smolvlm", tmp_path / "dense")
    with pytest.raises(ConfigError, match="its weights keep their types; leave out dtype"):
        convert(settings(tmp_path / "dense", tmp_path / "out", corpus_dir, dtype="bfloat16"))
    file = tmp_path / "dense" / "config.json"
    whole = file.read_text()
    for place in ("", "text_config"):
        config = json.loads(whole)
        quantized = config[place] if place else config
        quantized["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        file.write_text(json.dumps(config))
        with pytest.raises(UnsupportedModelError, match="quantized weights is not supported, as it reads"):
            convert(settings(tmp_path / "dense", tmp_path / "out", corpus_dir))
    file.write_text(whole)
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    sound = weights["model.connector.modality_projection.proj.weight"].clone()
    weights["model.connector.modality_projection.proj.weight"][0, 0] = torch.nan
    save_file(weights, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"NaN or infinite values in model.connector"):
        convert(settings(tmp_path / "dense", tmp_path / "out", corpus_dir))
    weights["model.connector.modality_projection.proj.weight"] = sound
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
