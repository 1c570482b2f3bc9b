"""fulmen convert --index: a converted model gets another index, and stays otherwise as it is, to the bit."""

import json

import pytest
import torch
from safetensors.torch import load_file

import fulmen
from fulmen.errors import AlreadyConvertedError, ConfigError, OutputError
from fulmen.pipeline.load import load_converted
from tests.modeling.gqa.tiny_gqa import make_dense, random_ids
from tests.pipeline.test_asker import Notes
from tests.pipeline.tiny_runs import LENGTH, convert, save_tiny, settings


@pytest.fixture(scope="module")
def one_level(tmp_path_factory, corpus_dir):
    folder = tmp_path_factory.mktemp("one")
    source = save_tiny(make_dense("llama"), folder / "dense")
    return convert(settings(source, folder / "dsa", corpus_dir, index="one-level"))


def change(source, out, corpus_dir, index, **more):
    values = {"data": str(corpus_dir), "length": LENGTH, **more}
    return fulmen.convert(source, out=out, index=index, **values).path


def test_a_coarse_level_is_added_and_taken_away(one_level, tmp_path, corpus_dir):
    two = change(one_level, tmp_path / "two", corpus_dir, "two-level")
    before, after = (load_file(folder / "model.safetensors") for folder in (one_level, two))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    added = set(after) - set(before)
    assert added
    assert all(".indexer.coarse." in name for name in added)
    assert all(after[name].abs().sum() > 0 for name in added if "rope" not in name)
    assert json.loads((two / "config.json").read_text())["dsa"]["coarse_head_dim"] == 24
    assert json.loads((two / "conversion.json").read_text())["dsa"]["coarse_head_dim"] == 24
    inherited = load_file(two / "stages/inherit.safetensors")
    assert set(inherited) == {name for name in after if ".indexer." in name}
    assert (two / "README.md").read_text() == (one_level / "README.md").read_text()
    back = change(two, tmp_path / "back", corpus_dir, "one-level")
    again = load_file(back / "model.safetensors")
    assert set(again) == set(before)
    assert (back / "config.json").read_text() == (one_level / "config.json").read_text()
    model, _ = load_converted(two)
    with torch.no_grad():
        assert model(random_ids(1, 100)).logits.isfinite().all()


INHERIT = {"stages": ("inherit",), "steps": None}
# Beyond 32 k tokens a coarse level is asked: k is 8 in `settings`.
LONG = {"head_dim": 64, "max_position_embeddings": 32 * 8 + 1}


@pytest.mark.parametrize("by_layers", [False, True])
def test_a_conversion_has_two_levels_by_default(tmp_path, corpus_dir, by_layers):
    source, said = save_tiny(make_dense("llama", **LONG), tmp_path / "dense"), Notes()
    asked = settings(source, tmp_path / "out", corpus_dir, by_layers=by_layers, **INHERIT)
    out = convert(asked, said)
    assert json.loads((out / "config.json").read_text())["dsa"]["coarse_head_dim"] == 24
    state = load_converted(out)[0].state_dict()
    assert all(x.abs().sum() > 0 for name, x in state.items() if ".coarse.w" in name)
    assert not any("one level" in note for note in said.notes)


@pytest.mark.parametrize(
    ("head_dim", "context", "levels"),
    [
        (64, 8193, "two: of more than 8,192 keys 4 coarse heads of 24 dims look at every one"),
        (64, 8192, "one: "),
        (16, 8193, "one: "),
    ],
)
def test_inspect_says_how_many_levels_there_would_be(tmp_path, head_dim, context, levels):
    source = save_tiny(make_dense("llama", head_dim=head_dim, max_position_embeddings=context), tmp_path)
    assert dict(fulmen.inspect(str(source)).facts())["index levels"].startswith(levels)


def test_a_context_in_which_no_coarse_level_is_asked_has_one(tmp_path, corpus_dir):
    dense = make_dense("llama", head_dim=64, max_position_embeddings=32 * 8)
    said = Notes()
    convert(settings(save_tiny(dense, tmp_path / "dense"), tmp_path / "out", corpus_dir, **INHERIT), said)
    (note,) = [note for note in said.notes if "one level" in note]
    assert note.endswith("asked beyond 256 tokens, which its context does not have (index decides)")


def test_heads_that_are_too_small_for_two_levels_have_one_unless_asked(tmp_path, corpus_dir, llama_dir):
    said = Notes()
    out = convert(settings(llama_dir, tmp_path / "default", corpus_dir, **INHERIT), said)
    assert "coarse_head_dim" not in json.loads((out / "config.json").read_text())["dsa"]
    (note,) = [note for note in said.notes if "one level" in note]
    assert note.startswith("Its index has one level: its heads are so small")
    for index, width in (("two-level", 24), ("one-level", None)):
        said = Notes()
        out = convert(settings(llama_dir, tmp_path / index, corpus_dir, index=index, **INHERIT), said)
        assert json.loads((out / "config.json").read_text())["dsa"].get("coarse_head_dim") == width
        assert not any("one level" in note for note in said.notes)


def test_requests_that_cannot_be_leave_nothing(one_level, tmp_path, corpus_dir):
    out = tmp_path / "out"
    with pytest.raises(AlreadyConvertedError, match="has a one-level index already; use it as it is"):
        change(one_level, out, corpus_dir, "one-level")
    with pytest.raises(ConfigError, match="topk does not apply to a converted model"):
        change(one_level, out, corpus_dir, "two-level", topk=16)
    with pytest.raises(ConfigError, match="budget does not apply to a converted model"):
        change(one_level, out, corpus_dir, "two-level", budget="2m")
    with pytest.raises(ConfigError, match="stages does not apply to a converted model"):
        change(one_level, out, corpus_dir, "two-level", stages=("inherit",))
    with pytest.raises(ConfigError, match="three"):
        change(one_level, out, corpus_dir, "three")
    with pytest.raises(AlreadyConvertedError):
        change(one_level, out, corpus_dir, None)
    assert not list(tmp_path.iterdir())
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(OutputError):
        change(one_level, out, corpus_dir, "two-level")
    assert [path.name for path in out.iterdir()] == ["config.json"]
