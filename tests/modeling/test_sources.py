"""Model directories that are broken in the ways of the world: one line that names it, before any work."""

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fulmen import CheckpointError, UnsupportedModelError
from fulmen.errors import FulmenError
from fulmen.modeling.checkpoint import find_source, load_dense, load_directory
from tests.modeling.gqa.tiny_gqa import VOCAB
from tests.modeling.tiny_source import WEIGHTS, edit_json, make_tokenizer, save_source

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole_dir(tmp_path_factory):
    return save_source(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def source(whole_dir, tmp_path):
    return Path(shutil.copytree(whole_dir, tmp_path / "source"))


@pytest.fixture
def sharded(source):
    """Two parts and an index."""
    held = load_file(source / WEIGHTS)
    names = sorted(held)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for part, inside in parts.items():
        save_file({name: held[name] for name in inside}, source / part, {"format": "pt"})
    (source / WEIGHTS).unlink()
    weight_map = {name: part for part, inside in parts.items() for name in inside}
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return source


def message_of(place) -> str:
    with pytest.raises(CheckpointError) as info:
        load_dense(place)
    message = str(info.value)
    assert "\n" not in message
    assert str(place) in message
    return message


class TestParts:
    def test_all_there(self, sharded):
        load_dense(sharded)

    def test_one_missing(self, sharded):
        (sharded / "model-00002-of-00002.safetensors").unlink()
        message = message_of(sharded)
        assert "lacks 1 of 2 parts, the first model-00002-of-00002.safetensors" in message

    def test_one_cut_short(self, sharded):
        part = sharded / "model-00002-of-00002.safetensors"
        os.truncate(part, part.stat().st_size - 1)
        assert "model-00002-of-00002.safetensors" in message_of(sharded)

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
    def test_an_index_of_nothing(self, sharded, text):
        (sharded / INDEX).write_text(text)
        message_of(sharded)

    def test_an_index_that_leads_elsewhere(self, sharded, whole_dir):
        values = json.loads((sharded / INDEX).read_text())
        elsewhere = f"../../{whole_dir.parent.name}/model/{WEIGHTS}"
        values["weight_map"] = dict.fromkeys(values["weight_map"], elsewhere)
        (sharded / INDEX).write_text(json.dumps(values))
        assert "lacks 1 of 1 parts" in message_of(sharded)


class TestFilesOfOtherKinds:
    @pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
    def test_pickles_are_not_opened(self, source, name):
        """Opening this one would leave a file behind."""
        (source / WEIGHTS).unlink()

        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(source / "opened"),)

        torch.save({"model.norm.weight": Evil()}, source / name)
        message = message_of(source)
        assert f"pickles only, as {name}" in message
        assert not (source / "opened").exists()

    def test_pickles_beside_the_weights_do_no_harm(self, source):
        torch.save({}, source / "pytorch_model.bin")
        load_dense(source)

    def test_an_adapter(self, source):
        (source / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
        assert "merge it" in message_of(source)  # beside a model, which Transformers would lay it over
        for file in ("config.json", WEIGHTS):
            (source / file).unlink()
        assert "merge it" in message_of(source)

    def test_a_gguf_file_beside_a_config(self, source):
        (source / WEIGHTS).unlink()
        (source / "small.gguf").write_bytes(b"GGUF")
        assert "name the file small.gguf in it" in message_of(source)

    @pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer.json", "generation_config.json"])
    def test_an_empty_file(self, source, name):
        (source / name).write_bytes(b"")
        message_of(source)

    def test_a_folder_in_the_place_of_a_file(self, source):
        (source / WEIGHTS).unlink()
        (source / WEIGHTS).mkdir()
        message_of(source)

    def test_code_of_its_own_is_not_run_and_that_is_said(self, source, caplog):
        (source / "modeling_own.py").write_text(f"import os; os.mkdir({str(source / 'run')!r})")
        auto_map = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
        edit_json(source / "config.json", auto_map=auto_map)
        with caplog.at_level(logging.WARNING):
            load_dense(source)
        assert ["brings code of its own" in message for message in caplog.messages] == [True]
        assert not (source / "run").exists()

    def test_a_tokenizer_with_code_of_its_own(self, source):
        edit_json(
            source / "tokenizer_config.json",
            auto_map={"AutoTokenizer": ["own.Tokenizer", None]},
            tokenizer_class="OwnTokenizer",
        )
        message_of(source)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes somebody else")
@pytest.mark.parametrize("closed", ["", "config.json", WEIGHTS, "tokenizer.json"])
def test_what_may_not_be_read(source, closed):
    """In a process of its own, which is nobody: root may read everything."""
    os.chmod(source / closed, 0)
    # However deep pytest's own folders lie, which nobody else may enter.
    for parent in source.parents:
        if Path(tempfile.gettempdir()) in parent.parents:
            parent.chmod(0o755)
    read_end, write_end = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.setuid(65534)
            load_dense(source)
        except BaseException as error:
            os.write(write_end, repr(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    said = os.read(read_end, 10_000).decode()
    assert said.startswith(f"CheckpointError('{source / closed}")
    assert "cannot be read (Permission denied)" in said


class TestValuesThatContradictEachOther:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"num_key_value_heads": 3}, "num_attention_heads=4 is no multiple of num_key_value_heads=3"),
            ({"num_attention_heads": 5}, "hidden"),
            ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
            ({"pad_token_id": VOCAB}, f"pad_token_id={VOCAB} is not in the vocabulary of {VOCAB}"),
            ({"bos_token_id": 5000}, "bos_token_id=5000"),
            ({"eos_token_id": [1, 5000]}, "eos_token_id=5000"),
            ({"hidden_size": "wide"}, "hidden_size"),
            ({"num_hidden_layers": 0}, "num_hidden_layers"),
            ({"rope_scaling": {"rope_type": "spiral"}}, "spiral"),
            ({"hidden_act": "snail"}, "snail"),
        ],
    )
    def test_are_named_before_the_weights_are_read(self, source, changes, words):
        edit_json(source / "config.json", **changes)
        save_file({"nothing": torch.zeros(1)}, source / WEIGHTS, {"format": "pt"})
        assert words in message_of(source)


@pytest.mark.parametrize(
    "text", ['"llama"', "[]", "3", "null", '{"model_type": 3}', '{"model_type": ["llama"]}']
)
def test_a_config_of_another_shape(source, text):
    (source / "config.json").write_text(text)
    with pytest.raises(FulmenError) as info:
        load_dense(source)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("value", ["gptq", {"quant_method": "gptq"}, {"bits": 4}, [4]])
def test_a_quantized_model(source, value):
    edit_json(source / "config.json", quantization_config=value)
    with pytest.raises(UnsupportedModelError, match="is quantized"):
        load_dense(source)


class TestTokenizers:
    def test_larger_than_the_embedding(self, source):
        make_tokenizer(VOCAB + 3).save_pretrained(source)
        # Said before these are read.
        save_file({"nothing": torch.zeros(1)}, source / WEIGHTS, {"format": "pt"})
        message = message_of(source)
        assert f"token 'w{VOCAB + 2}' is {VOCAB + 2}, its embedding ends at {VOCAB - 1}" in message
        with pytest.raises(CheckpointError, match="its embedding ends at"):
            load_directory(source)

    def test_with_an_added_word_beyond_the_embedding(self, source):
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["<extra>"])
        tokenizer.save_pretrained(source)
        assert "token '<extra>'" in message_of(source)

    def test_with_a_special_token_beyond_it_that_chats_are_made_of(self, source):
        tokenizer = make_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
        tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
        tokenizer.save_pretrained(source)
        assert "token '<|im_start|>'" in message_of(source)

    def test_with_a_padding_token_beyond_it_that_no_text_has(self, source, caplog):
        tokenizer = make_tokenizer()
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        tokenizer.save_pretrained(source)
        with caplog.at_level(logging.WARNING):
            load_dense(source)
        assert ["'[PAD]' have no embedding" in message for message in caplog.messages] == [True]

    def test_smaller_than_the_embedding_is_fine(self, source):
        make_tokenizer(VOCAB - 5).save_pretrained(source)
        load_dense(source)


def test_a_directory_that_is_there_is_found(source):
    assert find_source(source).place == str(source)
