"""The language model inside of a model that reads images, from files with the names that the hub's have."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from fulmen.modeling.text_part import TextShards, filled_whole_of, load_text_part, shards_around
from fulmen.modeling.vision import import_vision, text_config_of
from tests.modeling.gqa.tiny_gqa import make_dsa, random_ids
from tests.modeling.whole.tiny_whole import make_whole, prompt

# Names in memory, and in the files of the hub.
LLAVA = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
HUB_NAMES = {
    "idefics3": {},
    "qwen2_5_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
    "gemma3": {**LLAVA, "model.vision_tower.": "vision_tower.vision_model."},
    "mistral3": {**LLAVA, "model.vision_tower.": "vision_tower."},
}


def hub_name(name: str, renames: dict[str, str]) -> str:
    found = next(((own, stored) for own, stored in renames.items() if name.startswith(own)), ("", ""))
    return found[1] + name.removeprefix(found[0])


@pytest.mark.parametrize("name", HUB_NAMES)
def test_it_is_read_and_put_back_by_the_names_in_the_files(name, tmp_path):
    dense, ids, renames = make_whole(name), random_ids(1, 9), HUB_NAMES[name]
    source, out = tmp_path / "source", tmp_path / "out"
    dense.config.save_pretrained(source)
    out.mkdir()
    state = {hub_name(key, renames): x.clone() for key, x in dense.state_dict().items()}
    if dense.config.tie_word_embeddings:
        state = {key: x for key, x in state.items() if "lm_head" not in key}
    save_file(state, source / "model.safetensors", {"format": "pt"})
    whole, family = AutoConfig.from_pretrained(source), import_vision(name)
    shards = TextShards(source, whole, family)
    shards.require_all_held()
    text = load_text_part(str(source), whole, family, "auto").eval()
    assert type(text.config) is type(text_config_of(whole))
    with torch.no_grad():
        torch.testing.assert_close(text(ids).logits, dense(input_ids=ids).logits, atol=2e-5, rtol=1e-4)
    indexer = "model.layers.0.self_attn.indexer.wq.weight"
    save_file({indexer: torch.ones(2, 2)}, tmp_path / "indexers.safetensors")
    shards.put_into(out, tmp_path / "indexers.safetensors")
    listed = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    beside = hub_name(f"{family.text_prefix}layers.0.self_attn.q_proj.weight", renames)
    assert listed.keys() - state.keys() == {beside.replace("q_proj", "indexer.wq")}


@pytest.mark.parametrize("name", HUB_NAMES)
def test_a_language_model_that_was_changed_is_saved_in_its_whole_model(name, tmp_path):
    dense, inputs, source = make_whole(name), prompt(name), tmp_path / "source"
    dense.config.save_pretrained(source)
    state = {hub_name(key, HUB_NAMES[name]): x.clone() for key, x in dense.state_dict().items()}
    save_file(state, source / "model.safetensors", {"format": "pt"})
    whole, family = AutoConfig.from_pretrained(source), import_vision(name)
    text = make_dsa(load_text_part(str(source), whole, family, "auto"), topk=64)
    change = {"lm_head.weight": 2.0, "model.layers.1.mlp.up_proj.weight": 0.5}
    with torch.no_grad():
        for key, factor in change.items():
            text.get_parameter(key).mul_(factor)
            own = key.replace("model.", family.text_prefix)
            dense.get_parameter(own).mul_(factor)
        expected = dense(**inputs).logits
    filled_whole_of(shards_around(str(source)), text).save_pretrained(tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    assert type(model) is family.whole_class
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected, atol=2e-5, rtol=1e-4)
