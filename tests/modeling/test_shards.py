"""A model's files as they lie: looked at by their headers, read in blocks, linked beside what is new."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils.logging import disable_progress_bar

from fulmen import CheckpointError
from fulmen.modeling import shards as module
from fulmen.modeling.shards import Shards
from fulmen.modeling.weight_files import INDEX_FILE
from tests.modeling.gqa.tiny_gqa import make_dense
from tests.modeling.tiny_source import EMBEDDING, HEAD, WEIGHTS, edit_weights, save_source

disable_progress_bar()


@pytest.fixture(scope="module")
def parts_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    make_dense("llama").save_pretrained(folder, max_shard_size="60KB")
    return folder


@pytest.fixture
def broken(parts_dir, tmp_path):
    return shutil.copytree(parts_dir, tmp_path / "parts")


def test_tensors_blocks_and_comparisons_are_what_the_files_hold(parts_dir, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 1000)
    shards, expected = Shards(parts_dir), make_dense("llama").state_dict()
    assert len(shards.files) > 2
    assert shards.shapes == {name: tuple(x.shape) for name, x in expected.items()}
    assert shards.kinds == ["F32"]
    found = shards.tensors(expected)
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    blocks = list(shards.blocks(EMBEDDING))
    assert len(blocks) > 20
    assert torch.equal(torch.cat(blocks), expected[EMBEDDING])
    assert shards.are_equal(HEAD, HEAD)
    assert not shards.are_equal(HEAD, EMBEDDING)
    assert not shards.are_equal(HEAD, "model.norm.weight")


@pytest.mark.parametrize("linked", [True, False])
def test_links_or_copies_beside_one_more_file(linked, parts_dir, tmp_path, monkeypatch):
    if not linked:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    save_file({"more.indexer.x": torch.ones(3)}, tmp_path / "more")
    out = tmp_path / "out"
    out.mkdir()
    source = Shards(parts_dir)
    source.put_into(out, tmp_path / "more")
    for file in source.files:
        assert (out / file.name).read_bytes() == file.read_bytes()
        assert (out / file.name).samefile(file) is linked
    assert Shards(out).shapes == {**source.shapes, "more.indexer.x": (3,)}
    assert source.bytes_to_copy(parts_dir) == 0


def test_one_file_gets_a_name_that_does_not_hide_the_index(tmp_path):
    source = save_source(tmp_path / "source")
    save_file({"x": torch.ones(3)}, tmp_path / "more")
    out = tmp_path / "out"
    out.mkdir()
    Shards(source).put_into(out, tmp_path / "more")
    assert not (out / WEIGHTS).exists()
    assert Shards(out).shapes.keys() == {*load_file(source / WEIGHTS), "x"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_weight_that_is_not_finite_is_named(value, tmp_path):
    folder, name = save_source(tmp_path / "source"), "model.layers.1.mlp.up_proj.weight"
    weight = load_file(folder / WEIGHTS)[name]
    weight[3, 5] = value
    edit_weights(folder, {name: weight, "steps": torch.tensor(3)})
    shards = Shards(folder)
    shards.require_finite(shards.held.keys() - {name})
    with pytest.raises(CheckpointError, match=f"NaN or infinite values in {name}"):
        shards.require_finite(shards.held)


def test_a_part_that_is_missing_or_cut_short(broken):
    part = sorted(broken.glob("*.safetensors"))[1]
    whole = part.read_bytes()
    part.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=part.name):
        Shards(broken)
    part.unlink()
    with pytest.raises(CheckpointError, match=f"lacks 1 of .* the first {part.name}"):
        Shards(broken)


def test_an_index_of_weights_that_are_not_there(broken):
    index = broken / INDEX_FILE
    values = json.loads(index.read_text())
    file = values["weight_map"]["model.norm.weight"]
    values["weight_map"]["model.norm.scale"] = file
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=rf"lists 1 weights .* the first model\.norm\.scale in {file}"):
        Shards(broken)
