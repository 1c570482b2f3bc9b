"""Conversions of quantized models: the files stay as they are, the indexers are those of what they mean."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fulmen
from fulmen import CheckpointError, UnsupportedModelError
from fulmen.modeling.checkpoint import dense_view
from tests.modeling.gqa.tiny_gqa import make_dense, random_ids
from tests.modeling.quantization.tiny_quantized import save_quantized
from tests.modeling.tiny_source import WEIGHTS, edit_json, edit_weights
from tests.pipeline.tiny_runs import LENGTH, VOCAB, save_tiny, tiny_tokenizer

ASKED = {"topk": 8, "length": LENGTH, "stages": "inherit"}


def save_both(folder, name):
    """The quantized model, and the one that its weights mean."""
    source = folder / "quantized"
    meant = save_quantized(source, name, make_dense("llama", torch.bfloat16, vocab_size=VOCAB))
    tiny_tokenizer().save_pretrained(source)
    return source, save_tiny(meant, folder / "meant"), meant


@pytest.mark.parametrize("name", ["fp8", "w8a8", "awq"])
def test_stays_quantized_beside_the_indexers_of_what_it_means(name, corpus_dir, tmp_path):
    source, meant_dir, meant = save_both(tmp_path, name)
    made = fulmen.convert(source, out=tmp_path / "out", data=corpus_dir, topk=8, length=LENGTH)
    assert made.record["by_layers"] is True
    assert made.record["stages"] == ["inherit"]
    assert (made.path / "model-dense.safetensors").samefile(source / WEIGHTS)
    other = fulmen.convert(meant_dir, out=tmp_path / "other", data=corpus_dir, by_layers=True, **ASKED)
    indexers, expected = (load_file(one.path / "model-indexers.safetensors") for one in (made, other))
    assert indexers.keys() == expected.keys()
    assert all(torch.equal(indexers[key], expected[key]) for key in expected)
    kept, had = (
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (made.path, source)
    )
    key = "ignore" if name == "w8a8" else "modules_to_not_convert"
    assert {**kept, key: had.get(key)} == {**had, key: had.get(key)}
    assert {f"model.layers.{layer}.self_attn.indexer" for layer in range(3)} | {"lm_head"} == set(kept[key])
    (model, _), (same, _) = fulmen.load(made), fulmen.load(other)
    ids = random_ids(1, 40)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, same(ids).logits)
        assert torch.equal(dense_view(made.path)(ids).logits, meant(ids).logits)
        if name == "fp8":  # what Transformers reads by itself
            assert torch.equal(AutoModelForCausalLM.from_pretrained(made.path)(ids).logits, same(ids).logits)


def test_what_trains_is_dequantized(corpus_dir, tmp_path):
    source, _, _ = save_both(tmp_path, "gptq")
    said = fulmen.inspect(source)
    assert said.quantized == ["gptq, 4 bits"]
    assert said.plan.stays_quantized
    asked = {"topk": 8, "length": LENGTH, "steps": 1}
    made = fulmen.convert(source, out=tmp_path / "out", data=corpus_dir, **asked)
    assert made.record["by_layers"] is False
    assert "quantization_config" not in json.loads((made.path / "config.json").read_text())


class TestRefusedBeforeAnyWork:
    def refusal(self, source, tmp_path, error=CheckpointError):
        """There is nothing in the data, which would be said if it was read."""
        (tmp_path / "empty.txt").touch()
        with pytest.raises(error) as info:
            fulmen.convert(source, out=tmp_path / "out", data=tmp_path / "empty.txt", **ASKED)
        assert "\n" not in str(info.value)
        return str(info.value)

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"quant_method": "bitsandbytes"}, "is quantized (bitsandbytes), which cannot be read here"),
            (
                {"quant_method": "gptq", "bits": 3},
                "is quantized (gptq) with bits=3, where 2, 4, 8 can be read",
            ),
            (
                {"quant_method": "awq", "bits": 4, "version": "gemv"},
                "version='gemv', where 'gemm' can be read",
            ),
        ],
    )
    def test_a_format_that_cannot_be_read(self, settings, words, tmp_path):
        source = save_tiny(make_dense("llama", vocab_size=VOCAB), tmp_path / "source")
        edit_json(source / "config.json", quantization_config=settings)
        said = self.refusal(source, tmp_path, UnsupportedModelError)
        assert words in said
        assert "convert the unquantized weights" in said

    def test_parts_that_do_not_fit(self, tmp_path):
        source, _, _ = save_both(tmp_path, "w4a16")
        name = "model.layers.1.mlp.up_proj.weight_scale"
        edit_weights(source, {name: torch.ones(96, 5)})
        assert f"{name} of the shape [96, 5]" in self.refusal(source, tmp_path)
        edit_weights(source, {name: None})
        assert f"lacks {name}" in self.refusal(source, tmp_path)
