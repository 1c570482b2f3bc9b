"""Models that are broken, or unusual: a line that says so before texts are read, which takes longer."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import fulmen
from fulmen import CheckpointError, CorpusError
from fulmen.modeling.weight_files import INDEX_FILE
from fulmen.pipeline.reporter import SilentReporter
from tests.modeling.gqa.tiny_gqa import make_dense
from tests.modeling.tiny_source import EMBEDDING, HEAD, WEIGHTS, edit_json, edit_weights, make_tokenizer
from tests.pipeline.tiny_runs import VOCAB, save_tiny, tiny_tokenizer

UP_PROJ = "model.layers.1.mlp.up_proj.weight"


class Notes(SilentReporter):
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_tiny(make_dense("llama", vocab_size=VOCAB), tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture(scope="module")
def whole_parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts") / "model"
    make_dense("llama", vocab_size=VOCAB).save_pretrained(folder, max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def source(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "source")


@pytest.fixture
def parts(whole_parts, tmp_path):
    return shutil.copytree(whole_parts, tmp_path / "source")


def before_texts(source, tmp_path, reporter=None):
    """What stops a conversion whose texts are empty, which is said as soon as they are looked at."""
    (tmp_path / "empty.txt").touch()
    asked = {"out": tmp_path / "out", "data": tmp_path / "empty.txt", "topk": 8, "length": 64}
    with pytest.raises((CheckpointError, CorpusError)) as info:
        fulmen.convert(source, reporter=reporter or Notes(), **asked)
    assert "\n" not in str(info.value)
    return info.value


def refusal(source, tmp_path):
    error = before_texts(source, tmp_path)
    assert isinstance(error, CheckpointError)
    return str(error)


def notes(source, tmp_path):
    reporter = Notes()
    assert isinstance(before_texts(source, tmp_path, reporter), CorpusError)
    return " ".join(reporter.lines)


class TestParts:
    def second(self, parts):
        return sorted(parts.glob("model-*.safetensors"))[1]

    def test_missing(self, parts, tmp_path):
        self.second(parts).unlink()
        assert "lacks 1 of" in refusal(parts, tmp_path)

    def test_truncated(self, parts, tmp_path):
        content = self.second(parts).read_bytes()
        self.second(parts).write_bytes(content[:-50])
        assert self.second(parts).name in refusal(parts, tmp_path)

    def test_of_a_model_of_another_size(self, parts, tmp_path):
        file = self.second(parts)
        save_file({name: torch.ones(8, 8) for name in load_file(file)}, file, {"format": "pt"})
        assert "of another shape than config.json says" in refusal(parts, tmp_path)

    def test_of_a_model_with_other_names(self, parts, tmp_path):
        save_file({"transformer.h.0.weight": torch.ones(8)}, self.second(parts), {"format": "pt"})
        assert "get index and parts anew, of one model" in refusal(parts, tmp_path)

    def test_an_index_of_tensors_that_are_not_there(self, parts, tmp_path):
        index = json.loads((parts / INDEX_FILE).read_text())
        index["weight_map"]["model.nothing"] = self.second(parts).name
        (parts / INDEX_FILE).write_text(json.dumps(index))
        assert "lists 1 weights that are not in their parts" in refusal(parts, tmp_path)


class TestWeights:
    def test_of_two_types(self, source, tmp_path):
        edit_weights(source, {UP_PROJ: load_file(source / WEIGHTS)[UP_PROJ].half()})
        assert "several types (F16, F32)" in notes(source, tmp_path)

    def test_integers_that_no_quantization_explains(self, source, tmp_path):
        edit_weights(source, {UP_PROJ: torch.zeros(96, 64, dtype=torch.int8)})
        assert f"{UP_PROJ} in I8, and its config.json says nothing" in refusal(source, tmp_path)

    def test_tied_and_saved_twice(self, source, tmp_path):
        edit_json(source / "config.json", tie_word_embeddings=True)
        edit_weights(source, {HEAD: load_file(source / WEIGHTS)[EMBEDDING].clone()})
        assert "Head and embedding are both stored" in notes(source, tmp_path)


class TestConfigAndTokenizer:
    def test_more_tokens_than_the_embedding_has(self, source, tmp_path):
        make_tokenizer(VOCAB + 3).save_pretrained(source)
        assert f"its embedding ends at {VOCAB - 1}" in refusal(source, tmp_path)

    @pytest.mark.parametrize("key", ["rope_type", "type"])
    def test_rope_of_an_unknown_kind(self, source, tmp_path, key):
        edit_json(source / "config.json", rope_parameters={key: "spiral", "rope_theta": 10000.0})
        said = refusal(source, tmp_path)
        assert "rope_type='spiral', which Transformers does not know" in said
        assert "yarn" in said

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"hidden_size": -4}, "hidden_size=-4 cannot be"),
            ({"head_dim": 0}, "head_dim=0 cannot be"),
            ({"hidden_act": "silly"}, "hidden_act='silly' is not known"),
            ({"text_config": 5}, "text_config=5 is no config"),
            ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": "x"}}, "factor='x'"),
            ({"rope_parameters": {"rope_type": ["yarn"], "rope_theta": 1e4}}, r"rope_type=\['yarn'\]"),
            ({"rope_parameters": {"full_attention": 3}}, "full_attention=3, which is no table"),
        ],
    )
    def test_values_that_no_model_has(self, source, tmp_path, change, said):
        edit_json(source / "config.json", **change)
        assert re.search(said, refusal(source, tmp_path))
        with pytest.raises(CheckpointError, match=said):
            fulmen.inspect(source)

    def test_a_chat_template_that_is_no_jinja(self, source, tmp_path):
        edit_json(source / "tokenizer_config.json", chat_template="{{ messages")
        said = refusal(source, tmp_path)
        assert said.startswith(f"{source}: line 1 of its chat template is no Jinja")

    def test_no_chat_template(self, source, tmp_path):
        assert "no chat template" in notes(source, tmp_path)
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
        tokenizer.save_pretrained(source)
        assert "no chat template" not in notes(source, tmp_path)
