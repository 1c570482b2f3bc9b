"""Conversions of models that are larger than the memory: the same as in memory, and killed at every layer."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import fulmen
from fulmen import CheckpointError, ConfigError, UnsupportedModelError
from fulmen.modeling.weight_files import INDEX_FILE
from fulmen.pipeline.layer_store import LayerStore
from fulmen.pipeline.reporter import SilentReporter
from tests.data.byte_tokenizer import byte_tokenizer
from tests.modeling.gqa.tiny_gqa import make_dense
from tests.modeling.mla.tiny_mla import make_mla
from tests.modeling.tiny_source import WEIGHTS, edit_json, edit_weights
from tests.pipeline.tiny_runs import (
    LENGTH,
    SIGNALLED_AT,
    VOCAB,
    convert,
    run_convert,
    save_tiny,
    settings,
    tiny_tokenizer,
)

ALONE = {"stages": ("inherit",), "steps": None}
NO_ROOM = {"topk": 8, "length": LENGTH}


@pytest.fixture(scope="module")
def parts_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    make_dense("llama").save_pretrained(folder, max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(parts_dir, corpus_dir, tmp_path_factory):
    """The same in memory."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return convert(settings(parts_dir, out, corpus_dir, by_layers=False, **ALONE))


def little_memory(monkeypatch, n_bytes=2**20):
    monkeypatch.setattr("fulmen.pipeline.conversion_plan.available_bytes", lambda device: n_bytes)


def assert_same(one, other):
    states = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    configs = [json.loads((folder / "config.json").read_text()) for folder in (one, other)]
    assert configs[0] == configs[1]


class Notes(SilentReporter):
    def __init__(self):
        self.lines, self.began = [], {}

    def note(self, text):
        self.lines.append(text)

    def stage(self, name, counted=True):
        self.name = name
        return super().stage(name, counted)

    def advance(self, done, total, detail=""):
        self.began.setdefault(self.name, done)


def test_equals_the_conversion_in_memory_and_leaves_the_files_alone(parts_dir, whole, corpus_dir, tmp_path):
    parts = {file: file.read_bytes() for file in parts_dir.glob("*.safetensors")}
    out = convert(settings(parts_dir, tmp_path / "out", corpus_dir, by_layers=True, **ALONE))
    assert_same(out, whole)
    for file, content in parts.items():
        assert file.read_bytes() == (out / file.name).read_bytes() == content
        assert file.samefile(out / file.name)
    indexers = load_file(out / "model-indexers.safetensors")
    assert indexers.keys() == load_file(out / "stages/inherit.safetensors").keys()
    assert all(".indexer." in name for name in indexers)
    listed = json.loads((out / INDEX_FILE).read_text())["weight_map"]
    assert {listed[name] for name in indexers} == {"model-indexers.safetensors"}
    record, in_memory = (json.loads((folder / "conversion.json").read_text()) for folder in (out, whole))
    assert record["by_layers"] is True
    assert record["left_out"] == {}
    assert record["stages_done"] == in_memory["stages_done"]
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    modes = {path.stat().st_mode & 0o777 for path in (out / INDEX_FILE, out / "model-indexers.safetensors")}
    assert modes == {0o666 & ~_umask()}


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_split_of_k_is_tried_out_too(tmp_path):
    """With texts that are long enough for questions."""
    source = tmp_path / "source"
    make_dense("llama", vocab_size=259).save_pretrained(source)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    tokenizer.save_pretrained(source)
    data = tmp_path / "text.txt"
    data.write_text("\n".join(f"line {n} of a long text" for n in range(9000)))
    asked = {"topk": 16, "length": 512, "data": data, "stages": "inherit"}
    runs = [fulmen.convert(source, out=tmp_path / str(by), by_layers=by, **asked) for by in (True, False)]
    assert "splits" in runs[0].record["stages_done"]
    assert runs[0].record["stages_done"] == runs[1].record["stages_done"]
    assert_same(*(run.path for run in runs))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("name", ["save_indexer", "save_found", "save_states", "join"])
def test_stopped_at_every_layer_it_goes_on_there(name, parts_dir, whole, corpus_dir, tmp_path, monkeypatch):
    asked = settings(parts_dir, tmp_path / "out", corpus_dir, by_layers=True, **ALONE)
    real, begun = getattr(LayerStore, name), []

    def write_once(store, *given):
        """What is written is whole, and then it ends."""
        real(store, *given)
        raise Killed

    monkeypatch.setattr(LayerStore, name, write_once)
    for _ in range(6 if name == "save_states" else 2):
        notes = Notes()
        with pytest.raises(Killed):
            convert(asked, notes)
        begun.append((notes.began.get("Share k"), notes.began.get("Inherit")))
    shared = [(0, None), (1, None), (2, None), (3, 0), (None, 1), (None, 2)]
    at = {"save_indexer": [(0, 0), (None, 0)], "save_found": shared[:1] * 2, "join": [(0, 0), (None, 3)]}
    assert begun == {"save_states": shared, **at}[name]
    monkeypatch.setattr(LayerStore, name, real)
    assert_same(convert(asked), whole)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.skipif(os.name != "posix", reason="kills itself by a signal")
def test_killed_in_the_middle_of_a_layer(parts_dir, whole, corpus_dir, tmp_path):
    out, asked = tmp_path / "out", ("--stages", "inherit", "--by-layers")
    moment = ("SIGKILL", "fulmen.modeling.shards", "save_tensors", "3")
    process = run_convert(parts_dir, out, corpus_dir, *asked, before=moment, code=SIGNALLED_AT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL, errors
    assert not out.exists()
    convert(settings(parts_dir, out, corpus_dir, by_layers=True, **ALONE))
    assert_same(out, whole)


class TestWithoutRoom:
    def test_it_is_by_layers_and_says_what_is_left_out(self, parts_dir, corpus_dir, tmp_path, monkeypatch):
        little_memory(monkeypatch)
        notes = Notes()
        made = fulmen.convert(parts_dir, out=tmp_path / "out", data=corpus_dir, reporter=notes, **NO_ROOM)
        assert made.record["by_layers"] is True
        assert made.record["stages"] == ["inherit"]
        assert made.record["left_out"] == {"warmup": "it trains a model that is in memory as a whole"}
        assert any("has no room in memory: one layer at a time" in line for line in notes.lines)
        assert any("Left out: warmup" in line for line in notes.lines)
        assert "Nothing was trained" in (made.path / "README.md").read_text()
        model, tokenizer = fulmen.load(made)
        prompt = tokenizer("w3 w4 w5", return_tensors="pt").input_ids
        assert model.generate(prompt, max_new_tokens=2, do_sample=False).shape == (1, 5)
        assert AutoTokenizer.from_pretrained(made.path).vocab_size == VOCAB

    def test_a_run_that_goes_on_does_not_change_its_mind(self, parts_dir, corpus_dir, tmp_path, monkeypatch):
        asked = {"out": tmp_path / "out", "data": corpus_dir, **NO_ROOM}
        with monkeypatch.context() as patch:
            little_memory(patch)
            patch.setattr(LayerStore, "join", lambda *_: (_ for _ in ()).throw(Killed))
            with pytest.raises(Killed):
                fulmen.convert(parts_dir, **asked)
        assert fulmen.convert(parts_dir, **asked).record["by_layers"] is True

    def test_what_trains_is_asked_for_and_runs_in_memory(self, parts_dir, corpus_dir, tmp_path, monkeypatch):
        little_memory(monkeypatch)
        made = fulmen.convert(parts_dir, out=tmp_path / "out", data=corpus_dir, steps=1, **NO_ROOM)
        assert made.record["by_layers"] is False
        assert made.record["stages"] == ["inherit", "warmup"]


class TestRefused:
    def refusal(self, source, corpus_dir, tmp_path, error=CheckpointError, **changes):
        asked = {"data": corpus_dir, "by_layers": True, **NO_ROOM, **changes}
        with pytest.raises(error) as info:
            fulmen.convert(source, out=tmp_path / "out", **asked)
        assert {path.name for path in tmp_path.iterdir()} <= {"source"}
        return str(info.value)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            (
                {"stages": "inherit,warmup"},
                "stages=inherit,warmup train a model that is in memory as a whole",
            ),
            ({"steps": 3}, "stages=inherit,warmup train a model"),
            ({"dtype": "float16"}, "dtype=float16 does not apply by layers"),
            ({"by_layers": 3}, "by_layers=3 cannot be"),
        ],
    )
    def test_arguments(self, changes, words, parts_dir, corpus_dir, tmp_path):
        assert words in self.refusal(parts_dir, corpus_dir, tmp_path, ConfigError, **changes)

    def test_sources_without_layers_in_files(self, corpus_dir, tmp_path):
        dense, tokenizer = make_dense("llama"), tiny_tokenizer()
        said = self.refusal(dense, corpus_dir, tmp_path, UnsupportedModelError, tokenizer=tokenizer)
        assert "is in memory as a whole; leave by_layers out" in said
        source = save_tiny(make_mla("v3", vocab_size=VOCAB, q_lora_rank=None), tmp_path / "source")
        said = self.refusal(source, corpus_dir, tmp_path, UnsupportedModelError)
        assert "'deepseek_v3' cannot be converted layer by layer" in said

    def test_weights_that_are_not_finite(self, corpus_dir, tmp_path):
        source, name = (
            save_tiny(make_dense("llama"), tmp_path / "source"),
            "model.layers.2.mlp.up_proj.weight",
        )
        edit_weights(source, {name: load_file(source / WEIGHTS)[name].fill_(torch.nan)})
        with pytest.raises(CheckpointError, match=f"NaN or infinite values in {name}"):
            convert(settings(source, tmp_path / "out", corpus_dir, by_layers=True, **ALONE))

    def test_a_tokenizer_larger_than_the_embedding(self, corpus_dir, tmp_path):
        source = save_tiny(make_dense("llama", vocab_size=90), tmp_path / "source")
        assert "its embedding ends at 89" in self.refusal(source, corpus_dir, tmp_path)

    def test_a_config_of_another_model(self, corpus_dir, tmp_path):
        source = save_tiny(make_dense("llama"), tmp_path / "source")
        edit_json(source / "config.json", intermediate_size=48)
        said = self.refusal(source, corpus_dir, tmp_path)
        assert "9 weights of another shape than config.json says" in said
