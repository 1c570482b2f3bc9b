"""The commands on GGUF files."""

import json

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM, AutoTokenizer

from fulmen.pipeline.reporter import LineReporter
from fulmen.pipeline.settings import ConvertSettings
from tests.cli.test_commands import call, refused
from tests.modeling.gguf.tiny_gguf import write_gguf, write_split
from tests.modeling.gqa.tiny_gqa import LLAMA3_ROPE, make_dense
from tests.pipeline.tiny_runs import convert

FACTORS = torch.tensor([1.0, 1.0, 1.0, 2.0, 4.0, 4.0, 4.0, 4.0])


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"the hex {number} <|user|> she " * 60)
    return folder


def facts(path):
    """What `fulmen inspect` says, by its first word."""
    lines = call("inspect", path, env={"COLUMNS": "200"}).stdout.splitlines()
    return {line.split()[0]: " ".join(line.split()[1:]) for line in lines if line.strip()}


class TestInspect:
    def test_rope_is_the_one_that_will_be_used(self, tmp_path):
        plain = write_gguf(tmp_path / "plain.gguf", make_dense())
        assert facts(plain)["RoPE"] == "default, theta 10000"
        keys = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
        keys["llama.rope.scaling.original_context_length"] = 128
        yarn = write_gguf(tmp_path / "yarn.gguf", make_dense(), keys=keys)
        assert facts(yarn)["RoPE"] == "yarn, theta 10000, factor 4, original context 128"
        odd = write_gguf(tmp_path / "odd.gguf", make_dense(), tensors={"rope_freqs.weight": FACTORS})
        assert facts(odd)["RoPE"] == (
            "longrope, theta 10000, factor 1, original context 512, short factors 1 to 4, long factors 1 to 4"
        )
        source = make_dense("llama", rope_parameters=dict(LLAMA3_ROPE))
        stored = 1e4 ** -(torch.arange(8) / 8) / source.model.rotary_emb.inv_freq
        llama3 = write_gguf(tmp_path / "llama3.gguf", source, tensors={"rope_freqs.weight": stored})
        assert facts(llama3)["RoPE"].startswith("llama3, theta 10000, factor 4")

    def test_type_after_loading(self, tmp_path):
        quantized = write_gguf(tmp_path / "q.gguf", make_dense(), matrices=Type.Q8_0)
        assert "bfloat16, dequantized from Q8_0 (dtype decides)" in facts(quantized)["parameters"]
        values = json.loads(call("inspect", quantized, "--json").stdout)
        assert (values["dtype"], values["quantized"]) == ("bfloat16", ["Q8_0"])
        half = write_gguf(tmp_path / "h.gguf", make_dense(), matrices=Type.F16)
        assert facts(half)["parameters"].endswith("float16")

    def test_a_split_model(self, tmp_path):
        parts = write_split(tmp_path / "m", make_dense(), {"output.weight": 1}, 2)
        for source in (tmp_path, *parts):
            assert (
                json.loads(call("inspect", source, "--json").stdout)["parameters"]
                == make_dense().num_parameters()
            )
        parts[1].unlink()
        assert "m-00002-of-00002.gguf is missing" in refused("inspect", parts[0])

    def test_what_a_conversion_would_refuse(self, tmp_path):
        path = write_gguf(tmp_path / "m.gguf", make_dense(), keys={"llama.logit_scale": 0.5})
        assert "llama.logit_scale=0.5" in refused("inspect", path)
        result = call("convert", path, "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1] == refused("inspect", path)
        assert not (tmp_path / "out").exists()


class TestConvert:
    @pytest.mark.parametrize(
        ("type_", "asked", "stored"),
        [
            (Type.Q8_0, "auto", torch.bfloat16),
            (Type.Q8_0, "float32", torch.float32),
            (Type.F32, "auto", torch.float32),
            (Type.F16, "bfloat16", torch.bfloat16),
        ],
    )
    def test_weights_are_of_the_type_asked_for(self, type_, asked, stored, texts, tmp_path, capsys):
        """BOS and RoPE arrive in the result, too."""
        keys = {"tokenizer.ggml.add_bos_token": True}
        tensors = {"rope_freqs.weight": FACTORS}
        path = write_gguf(tmp_path / "m.gguf", make_dense(), keys=keys, tensors=tensors, matrices=type_)
        settings = ConvertSettings(
            str(path),
            tmp_path / "out",
            topk=8,
            stages=("inherit",),
            data=(str(texts),),
            length=64,
            dtype=asked,
        )
        out = convert(settings, LineReporter())
        said = "(Q8_0) are dequantized to " + str(stored).removeprefix("torch.")
        assert (said in " ".join(capsys.readouterr().err.split())) is (type_ == Type.Q8_0)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
        assert model.dtype == stored
        assert tokenizer("the").input_ids[0] == 1
        expected = 1e4 ** -(torch.arange(8) / 8) / FACTORS
        assert torch.allclose(model.model.rotary_emb.inv_freq, expected)
