"""The plan of a conversion: what it would do on a machine with so much memory, before a weight is read."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3Config, Qwen3Config

import fulmen
from fulmen import memory
from fulmen.memory import available_bytes
from fulmen.modeling.inherit_cost import InheritTexts, WeightSizes, inherit_cost, weight_sizes
from fulmen.pipeline.conversion_plan import Planner, plan_conversion
from fulmen.pipeline.model_source import PlaceSource, dense_source
from fulmen.pipeline.run_dir import RunDir
from fulmen.pipeline.settings import ConvertSettings, ModelInMemory
from tests.cli.test_commands import call
from tests.modeling.gqa.tiny_gqa import make_dense
from tests.modeling.mla.tiny_mla import MLA_SHAPE
from tests.pipeline.tiny_runs import tiny_tokenizer

GB = 10**9
QWEN3_8B = Qwen3Config(
    vocab_size=151_936,
    hidden_size=4096,
    intermediate_size=12_288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40_960,
    tie_word_embeddings=False,
    dtype="bfloat16",
)


def changed(config: Qwen3Config, **changes) -> Qwen3Config:
    return Qwen3Config(**{**config.to_dict(), "layer_types": None, **changes})


SMALL = changed(QWEN3_8B, num_hidden_layers=2, vocab_size=5000)


@pytest.fixture
def small_dir(tmp_path) -> Path:
    SMALL.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def planner_with(monkeypatch, place, free, run=None) -> Planner:
    monkeypatch.setattr("fulmen.pipeline.conversion_plan.available_bytes", lambda device: free)
    return Planner(dense_source(str(place)), run.settings() if run else {}, None)


def test_sizes_are_counted_without_weights():
    sizes = weight_sizes(QWEN3_8B)
    attention, mlp = 4096 * 128 * (2 * 32 + 2 * 8), 3 * 4096 * 12_288
    assert sizes.layer == attention + mlp + 2 * 4096 + 2 * 128
    assert sizes.model == 36 * sizes.layer + 2 * 151_936 * 4096 + 4096


def test_what_inherit_takes_grows_with_its_text_and_not_with_the_layers_that_are_away():
    dsa = plan_conversion(ConvertSettings("m", Path("out"), stages=("inherit",)), QWEN3_8B).dsa
    sizes = weight_sizes(QWEN3_8B)
    short_texts, long_texts = (InheritTexts(2, length, 2, 2, 2048) for length in (2048, 16_384))
    short, long = (inherit_cost(QWEN3_8B, dsa, sizes, texts, 2) for texts in (short_texts, long_texts))
    assert 2 * sizes.layer * 2 < short.layers_bytes < 2.5 * GB
    assert short.whole_bytes - short.layers_bytes > 15 * GB
    assert long.layers_bytes > short.layers_bytes + GB
    deeper = changed(QWEN3_8B, num_hidden_layers=72)
    twice = inherit_cost(deeper, dsa, weight_sizes(deeper), short_texts, 2)
    assert twice.layers_bytes == short.layers_bytes


def test_what_inherit_takes_counts_all_that_is_done():
    """Sharing k reads and fits as often again as its texts; the trial reads its own, and has their logits."""
    dsa, sizes = plan_conversion(ConvertSettings("m", Path("out"), topk=512), QWEN3_8B).dsa, WeightSizes(0, 0)

    def cost(config=QWEN3_8B, sequences=4, length=4096, shared=0, tried=0):
        return inherit_cost(config, dsa, sizes, InheritTexts(sequences, length, shared, tried, 4096), 2)

    alone, shared = cost(), cost(shared=2)
    for kind in ("flops", "float32_flops"):
        assert getattr(shared, kind) == pytest.approx(1.5 * getattr(alone, kind))
        # Its texts do not tell budgets apart below 4 k.
        assert getattr(cost(length=1024, shared=2), kind) == getattr(cost(length=1024), kind)
    # Two texts, densely and with three splits: twice as many tokens as four texts once.
    assert cost(tried=2).flops == pytest.approx(3 * alone.flops)
    assert shared.layers_bytes == alone.layers_bytes
    wide = changed(QWEN3_8B, vocab_size=10**6)
    more = cost(wide, 2, 1024, tried=2).layers_bytes - cost(sequences=2, length=1024, tried=2).layers_bytes
    assert more > 4 * 192 * 4 * (10**6 - 151_936) / 2


class TestRoom:
    SETTINGS = ConvertSettings("m", Path("out"))

    def test_the_model_is_whole_where_it_has_room(self, small_dir, monkeypatch):
        planner = planner_with(monkeypatch, small_dir, 100 * GB)
        settings = planner.settled(self.SETTINGS)
        assert (settings.by_layers, settings.stages) == (False, ("inherit", "warmup"))
        assert planner.plan(settings).dsa.topk == 1280

    def test_without_room_it_is_by_layers_and_k_that_of_an_untrained_index(self, small_dir, monkeypatch):
        planner = planner_with(monkeypatch, small_dir, GB)
        settings = planner.settled(self.SETTINGS)
        assert (settings.by_layers, settings.stages) == (True, ("inherit",))
        assert (settings.budget_s, settings.steps) == (None, None)
        assert planner.plan(settings).dsa.topk == 2048

    def test_what_is_asked_for_decides(self, small_dir, monkeypatch):
        planner = planner_with(monkeypatch, small_dir, GB)
        asked: list[dict] = [{"by_layers": False}, {"stages": ("inherit", "warmup")}, {"steps": 3}]
        for changes in [*asked, {"dtype": "float32"}]:
            assert planner.settled(ConvertSettings("m", Path("out"), **changes)).by_layers is False
        planner = planner_with(monkeypatch, small_dir, 100 * GB)
        assert planner.settled(ConvertSettings("m", Path("out"), by_layers=True)).by_layers is True

    def test_texts_are_as_long_as_the_memory_allows(self, small_dir, monkeypatch):
        alone = ConvertSettings("m", Path("out"), stages=("inherit",), by_layers=True)
        roomy = planner_with(monkeypatch, small_dir, 100 * GB)
        plan, needs = roomy.plan(alone), {}
        assert (plan.lengths, plan.calibration_tokens) == ([8192, 4096], 32_768)
        for place, tokens in ((0, 32_768), (0, 16_384), (1, 32_768), (1, 16_384), (1, 8192)):
            one = plan._replace(lengths=plan.lengths[place:], calibration_tokens=tokens)
            needs[plan.lengths[place], tokens] = roomy.cost(one).layers_bytes
            little = planner_with(monkeypatch, small_dir, roomy.cost(one).layers_bytes)
            found = little.plan(alone)
            assert little.cost(found).layers_bytes <= little.free_bytes
            assert (found.lengths[0], found.calibration_tokens) in needs
        assert needs[8192, 32_768] > needs[8192, 16_384] > needs[4096, 8192]
        least = planner_with(monkeypatch, small_dir, needs[4096, 8192] - 1).plan(alone)
        assert (least.lengths, least.calibration_tokens) == ([4096], 8192)
        asked = planner_with(monkeypatch, small_dir, GB).plan(replace(alone, length=8192))
        assert (asked.lengths, asked.calibration_tokens) == ([8192], 16_384)

    def test_a_run_goes_on_with_the_length_it_began_with(self, small_dir, monkeypatch, tmp_path):
        run = RunDir(tmp_path / "out")
        run.open({"by_layers": True, "length": 4096, "calibration_tokens": 9000}, discard_other=False)
        planner = planner_with(monkeypatch, small_dir, 100 * GB, run)
        settings = planner.settled(self.SETTINGS)
        assert settings.by_layers is True
        plan = planner.plan(settings)
        assert (plan.lengths, plan.calibration_tokens) == ([4096], 9000)

    def test_a_model_in_memory_takes_no_more(self):
        model = make_dense("llama")
        source = dense_source(ModelInMemory(model, tiny_tokenizer()))
        planner = Planner(source, {}, None)
        assert source.loaded_bytes == sum(x.nbytes for x in model.parameters())
        assert planner.settled(ConvertSettings(ModelInMemory(model, 1), Path("o"))).by_layers is False

    def test_some_sources_have_no_layers_to_read(self, small_dir, tmp_path):
        DeepseekV3Config(**{**MLA_SHAPE, "q_lora_rank": None}).save_pretrained(tmp_path / "mla")
        assert dense_source(str(small_dir)).has_layers
        assert not dense_source(str(tmp_path / "mla")).has_layers
        found = dense_source(str(small_dir)).found._replace(gguf_file="a.gguf")
        assert not PlaceSource(found, SMALL, "a").has_layers


class TestInspect:
    def test_the_plan_is_data_and_two_lines(self, small_dir, monkeypatch):
        planner_with(monkeypatch, small_dir, 2 * 10**9)
        plan = fulmen.inspect(small_dir).plan
        assert (plan.by_layers, plan.stages, plan.topk) == (True, ("inherit",), 2048)
        assert (plan.length, plan.calibration) == (4096, (2, 4096))
        assert plan.weight_bytes == 2 * weight_sizes(SMALL).model
        assert plan.layers_bytes < plan.whole_bytes
        assert plan.inherit_seconds > 0
        lines = call("inspect", small_dir, env={"COLUMNS": "200"}).stdout.splitlines()
        facts = {line.split()[0]: line for line in lines if line.strip()}
        assert "inherit; k 2,048, texts of 4,096 tokens, calibration 2 x 4,096" in facts["conversion"]
        assert "of the 2 GB that are free, layer by layer" in facts["here"]
        assert json.loads(call("inspect", small_dir, "--json").stdout)["plan"]["topk"] == 2048

    def test_a_model_with_room_trains(self, small_dir, monkeypatch):
        planner_with(monkeypatch, small_dir, 100 * GB)
        plan = fulmen.inspect(small_dir).plan
        assert (plan.by_layers, plan.stages, plan.topk) == (False, ("inherit", "warmup"), 1280)


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    free = available_bytes()
    assert free > 0
    names = [tmp_path / name for name in ("memory.max", "memory.current", "memory.stat")]
    for file, text in zip(names, ("5000", "4000", "anon 3000\ninactive_file 700"), strict=True):
        file.write_text(text)
    monkeypatch.setattr(memory, "GROUPS", [(str(names[0]), str(names[1]), "inactive_file")])
    assert available_bytes(torch.device("cpu")) == 1700
    names[0].write_text("max")
    assert available_bytes() > 1700
