"""Defaults fit models of every context; what config and tokenizer tell is said before weights are read."""

import json
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, LlamaConfig, Qwen2Config

from fulmen.config import DsaConfig
from fulmen.data import Document, load_corpus
from fulmen.errors import ConfigError
from fulmen.modeling.checkpoint import find_source, load_tokenizer
from fulmen.modeling.lengths import default_topk
from fulmen.pipeline.conversion_plan import plan_conversion
from fulmen.pipeline.evaluate import EvalSize, plan_evaluation
from fulmen.pipeline.evaluate_lookups import plan_lookups
from fulmen.pipeline.reporter import LineReporter, SilentReporter
from fulmen.pipeline.settings import ConvertSettings, EvalSettings
from fulmen.pipeline.suite_settings import SuiteSettings
from fulmen.pipeline.suites import lengths_of
from fulmen.pipeline.texts import conversion_texts, draw_longest
from fulmen.pipeline.train import plan_training
from fulmen.pipeline.train_settings import TrainSettings
from tests.cli.said import lines_that_stay
from tests.cli.test_commands import call, refused
from tests.data.byte_tokenizer import byte_tokenizer
from tests.modeling.gqa.tiny_gqa import SHAPE, make_dense
from tests.modeling.mla.tiny_mla import MLA_SHAPE
from tests.pipeline.tiny_runs import VOCAB, convert, save_tiny

# What a run needs of how a model was made.
RECORD = '{"source": "m", "made_with": {}, "dsa": {}, "stages": [], "seed": 0}'
K = 1024
CONTEXTS = [2 * K, 4 * K, 8 * K, 16 * K, 32 * K, 40_960, 64 * K, 128 * K, 192 * K, 256 * K, 512 * K, K * K]
SMALL_CONTEXTS = [64, 256, 512, K]
LLAMA = {**SHAPE, "num_hidden_layers": 2}


def config_dir(folder: Path, config, **more) -> Path:
    """A directory from which nothing but the config can be read."""
    folder.mkdir(exist_ok=True)
    values = {**config.to_dict(), **more}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def long_dir(tmp_path_factory) -> Path:
    """A model with a context of 128K."""
    small = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = make_dense("llama", **small, max_position_embeddings=128 * K)
    return save_tiny(model, tmp_path_factory.mktemp("long"))


class TestDefaults:
    @pytest.mark.parametrize("context", CONTEXTS)
    def test_k_and_windows_for_every_context(self, context, tmp_path):
        config = LlamaConfig(**{**LLAMA, "max_position_embeddings": context})
        dsa, lengths, _ = plan_conversion(ConvertSettings("m", tmp_path / "out"), config)
        assert dsa.topk == max(256, min(2048, context // 32))
        assert lengths[0] == max(2048, 4 * dsa.topk) <= context
        assert all(dsa.topk < length for length in lengths)
        assert lengths == sorted(lengths, reverse=True)

    @pytest.mark.parametrize("context", SMALL_CONTEXTS)
    def test_small_contexts_leave_something_out_too(self, context, tmp_path):
        config = LlamaConfig(**{**LLAMA, "max_position_embeddings": context})
        dsa, lengths, _ = plan_conversion(ConvertSettings("m", tmp_path / "out"), config)
        assert (dsa.topk, lengths[0]) == (min(256, context // 2), context)

    def test_a_model_that_states_no_context(self, tmp_path):
        config = LlamaConfig(**LLAMA)
        del config.max_position_embeddings
        dsa, lengths, _ = plan_conversion(ConvertSettings("m", tmp_path / "out"), config)
        assert (dsa.topk, lengths[0]) == (256, 2048)

    def test_sliding_layers_change_nothing(self, tmp_path):
        slides = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
        config = Qwen2Config(**{**LLAMA, **slides, "max_position_embeddings": 128 * K})
        dsa, lengths, _ = plan_conversion(ConvertSettings("m", tmp_path / "out"), config)
        assert (dsa.topk, dsa.layers, lengths[0]) == (2048, (0,), 8192)

    def test_a_k_that_is_asked_for_moves_the_window(self, tmp_path):
        config = LlamaConfig(**{**LLAMA, "max_position_embeddings": 128 * K})
        settings = ConvertSettings("m", tmp_path / "out", topk=4096)
        assert plan_conversion(settings, config).lengths[0] == 16 * K

    @pytest.mark.parametrize("context", [512, 2 * K, 128 * K])
    def test_train_and_eval_read_texts_above_k(self, context, tmp_path):
        config = LlamaConfig(**{**LLAMA, "max_position_embeddings": context})
        topk = default_topk(config)
        dsa = DsaConfig(topk, 4, 2, 8, (0, 1)).to_dict()
        model_dir = config_dir(tmp_path / "m", config, model_type="llama_dsa", dsa=dsa)
        (model_dir / "conversion.json").write_text(RECORD)
        wanted = min(context, max(2048, 4 * topk))
        # A training step at long length takes minutes: 4,096 tokens where 2 k are not more.
        trained = min(wanted, max(4096, 2 * topk))
        assert plan_training(TrainSettings(model_dir, tmp_path / "out"))[0] == trained
        assert plan_evaluation(EvalSettings(model_dir), SilentReporter())[0] == wanted

    @pytest.mark.parametrize(
        ("context", "topk", "lengths"),
        [
            (512, 16, (512,)),
            (2 * K, 256, (K, 2 * K)),
            (8 * K, None, (K, 2 * K)),
            (32 * K, K, (2 * K, 4 * K)),
            (128 * K, 2 * K, (4 * K, 8 * K)),
            (None, None, (K, 2 * K)),
        ],
    )
    def test_suites_read_texts_above_k(self, context, topk, lengths):
        assert lengths_of(SuiteSettings("m", ("ruler",), None), context, topk) == lengths

    def test_long_texts_are_fewer(self):
        size = EvalSize(8)
        assert [size.of_length(length) for length in (64, 2048, 4096, 8192, 65_536)] == [8, 8, 8, 4, 4]

    @pytest.mark.parametrize(
        ("context", "topk", "length", "ks"),
        [
            (8 * K, 256, 2 * K, [128, 256]),
            (32 * K, 512, 4 * K, [256, 512]),
            (4 * K, K, 4 * K, [256, 512, K]),
            (2 * K, 3 * K, 2 * K, [128, 256]),
            (128 * K, 2 * K, 8 * K, [512, K, 2 * K]),
        ],
    )
    def test_look_ups_are_asked_at_an_8th_a_16th_and_the_models_own_k(
        self, tmp_path, context, topk, length, ks
    ):
        plan = self.planned(tmp_path, context, topk)
        assert (plan.length, plan.ks) == (length, ks)
        assert sum(len(text.lookups) for text in plan.texts) == 128
        assert len(plan.texts) == 8

    def test_a_quick_look_asks_less_and_a_length_may_be_given(self, tmp_path, whole_quick_look):
        plan = self.planned(tmp_path, 8 * K, 256, quick=True, needle_length=K)
        assert (plan.length, plan.ks) == (K, [256])
        assert sum(len(text.lookups) for text in plan.texts) == 16
        assert "key_head_oracle" not in plan.variants
        assert self.planned(tmp_path, 8 * K, 256, needles=False) is None
        with pytest.raises(ConfigError, match="needle_length=9000 exceeds the model's context of 8192"):
            self.planned(tmp_path, 8 * K, 256, needle_length=9000)

    def planned(self, folder, context, topk, **changes):
        config = LlamaConfig(**{**LLAMA, "max_position_embeddings": context})
        config.model_type, config.dsa = "llama_dsa", DsaConfig(topk, 4, 2, 8, (0, 1)).to_dict()
        text = "\n".join(f"line {n} of a long text" for n in range(30_000))
        asked = EvalSettings(folder, **changes)
        documents = [Document("long", "prose", text)]
        return plan_lookups(asked, config, documents, byte_tokenizer(), SilentReporter())

    def test_scarce_text_makes_shorter_windows(self, corpus_dir, long_dir, capsys):
        """One file of each kind calibrates, and has not 2,048 words."""
        corpus, tokenizer = load_corpus(corpus_dir), load_tokenizer(find_source(long_dir))
        texts = draw_longest(
            [2048, 1024, 512],
            lambda length: conversion_texts(
                corpus, tokenizer, length, None, 0, SilentReporter(), trains=True
            ),
            LineReporter(),
        )
        assert texts.length == 1024
        assert {len(text.input_ids) for text in (*texts.training, *texts.validation)} == {1024}
        assert "too little text for sequences of 2,048 tokens; trying 1,024" in capsys.readouterr().err

    def test_a_conversion_of_a_long_context_with_defaults(self, tmp_path, long_dir):
        words = torch.randint(2, VOCAB, (400_000,), generator=torch.Generator().manual_seed(0)).tolist()
        data = tmp_path / "text.txt"
        data.write_text(" ".join(f"w{word}" for word in words))
        out = convert(ConvertSettings(str(long_dir), tmp_path / "out", data=(str(data),), steps=1))
        record = json.loads((out / "conversion.json").read_text())
        assert (record["dsa"]["topk"], record["length"]) == (2048, 8192)
        assert record["stages_done"]["warmup"]["last_step"] == 1


class TestBeforeTheLoad:
    """Nothing but the config can be read, and the line is about the settings."""

    LLAMA = LlamaConfig(**{**LLAMA, "max_position_embeddings": 128 * K})

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--topk", "2048", "--length", "2048"], "topk=2048 is not below the sequence of 2048 tokens"),
            (["--length", "512"], "topk=2048 is not below the sequence of 512 tokens"),
            (["--topk", 128 * K], "topk=131072 is not below the model's context of 131072 tokens"),
            (["--index-heads", "6"], "index_n_heads=6 does not divide the model's 4 attention heads"),
            (["--index-heads", "8"], "index_n_heads=8 does not divide the model's 4 attention heads"),
            (["--index-heads", "3"], "index_n_heads=3 is not a multiple of index_n_kv_heads=2"),
            (["--index-head-dim", "7"], "--index-head-dim=7 is odd"),
            (["--index-head-dim", "18"], "--index-head-dim=18 is more than the model's head width 16"),
        ],
    )
    def test_conversions(self, options, words, tmp_path):
        model_dir = config_dir(tmp_path / "m", self.LLAMA)
        assert words in refused("convert", model_dir, "--out", tmp_path / "out", *options)

    def test_a_sparse_stage_that_cannot_be(self, tmp_path):
        model_dir = config_dir(tmp_path / "m", self.LLAMA, attention_dropout=0.1)
        line = refused("convert", model_dir, "--out", tmp_path / "out", "--stages", "inherit,warmup,sparse")
        assert "attention_dropout=0.1 is not supported in training" in line

    @pytest.mark.parametrize(
        ("config", "changes", "options", "words"),
        [
            (DeepseekV3Config, {}, ["--index-head-dim", "8"], "--index-head-dim=8 leaves no room"),
            (DeepseekV3Config, {"num_key_value_heads": 2}, [], "num_key_value_heads=2 cannot become"),
            (DeepseekV2Config, {}, [], "first_k_dense_replace=1 cannot become deepseek_v32"),
            (DeepseekV2Config, {"mlp_bias": True, "first_k_dense_replace": 3}, [], "mlp_bias=True cannot"),
        ],
    )
    def test_mla(self, config, changes, options, words, tmp_path):
        model_dir = config_dir(tmp_path / "m", config(**{**MLA_SHAPE, **changes}))
        assert words in refused("convert", model_dir, "--out", tmp_path / "out", *options)

    def test_texts_that_are_too_short(self, corpus_dir, long_dir, tmp_path):
        asked = ["--out", tmp_path / "out", "--data", corpus_dir, "--topk", "64", "--length", "4096"]
        result = call("convert", long_dir, *asked)
        assert result.exit_code == 2
        # The line before it says that there is no chat template.
        assert "tokens, a sequence needs 4096" in lines_that_stay(result.stderr)[-1]

    def test_a_converted_model(self, tmp_path, long_dir):
        dsa = DsaConfig(2048, 4, 2, 8, (0, 1)).to_dict()
        model_dir = config_dir(tmp_path / "m", self.LLAMA, model_type="llama_dsa", dsa=dsa)
        train = ("train", model_dir, "--out", tmp_path / "out")
        assert "conversion.json cannot be read" in refused(*train)
        (model_dir / "conversion.json").write_text("{}")
        assert "conversion.json lacks source, made_with, dsa, stages, seed" in refused(*train)
        (model_dir / "conversion.json").write_text(RECORD)
        assert "topk=2048 is not below the sequence of 2048" in refused(*train, "--length", "2048")
        assert "topk=9000 is not below the sequence of 8192" in refused(
            *train, "--length", "8192", "--topk", "9000"
        )
        suite = ("eval", model_dir, "--suite", "ruler")
        assert "length=262144 is beyond the model's context" in refused(*suite, "--lengths", "256k")
        load_tokenizer(find_source(long_dir)).save_pretrained(model_dir)
        (tmp_path / "long.txt").write_text("w5 " * 128 * K)
        chat = ("chat", model_dir, "--document", tmp_path / "long.txt", "--prompt", "w3")
        assert "exceed the model's context of 131,072" in refused(*chat)

    def test_a_dense_model_has_no_k(self, tmp_path):
        suite = ("eval", config_dir(tmp_path / "m", self.LLAMA), "--suite", "ruler")
        assert "topk=64 is for a converted model" in refused(*suite, "--topk", "64")
        assert "--dense is what a converted model is compared with" in refused(*suite, "--dense", "x")
