"""Prices against numbers counted by hand and DeepSeek-V3.2's own figure; the search for crossovers."""

import csv
import io

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV32Config, GlmMoeDsaConfig, LlamaConfig, Qwen2Config

from fulmen.config import DsaConfig
from fulmen.errors import ConfigError
from fulmen.evaluation.price.plot import png_bytes, price_csv, price_plot
from fulmen.evaluation.price.prices import (
    KINDS,
    LayerLines,
    Line,
    Machine,
    Measured,
    ModelShape,
    Pair,
    PriceRow,
    Pricing,
    Roofline,
    Terms,
    cheaper_from,
    curve_positions,
    search_positions,
)
from fulmen.modeling.cost import head_weights, layer_weights, read_weights
from fulmen.modeling.families import dsa_of

H100 = Machine(989e12, 3.35e12)
# So slow in one thing that the other does not count.
READS_SLOWLY, COMPUTES_SLOWLY = Machine(1e15, 1e9), Machine(1e9, 1e15)
# Two layers, 4 heads over 2 of width 16; of both layers the weights by hand.
LLAMA = LlamaConfig(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
WEIGHTS = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
HEAD = 64 * 100
DSA = DsaConfig(topk=8, index_n_heads=4, index_n_kv_heads=2, index_head_dim=8, layers=(0, 1))
# wk 32 x 16; wq 64 x 32 and two 64 x 4.
INDEX_WEIGHTS = 2 * (32 * 16 + 64 * 32 + 2 * 64 * 4)
V32 = DeepseekV32Config()
# Figure 3 of arXiv 2512.02556: dollars per million tokens of V3.1 (dense) and V3.2 on H800s at $2 an hour.
PAPER = {
    "prefill": {
        8192: (0.0912, 0.1009),
        32768: (0.2061, 0.1182),
        65536: (0.3593, 0.1412),
        131072: (0.6658, 0.1871),
    },
    "decode": {
        8192: (0.2007, 0.1506),
        32768: (0.5915, 0.1703),
        65536: (1.1124, 0.1966),
        131072: (2.1543, 0.2491),
    },
}
PAPER_PREFILL_CROSSOVER = 10_400


def pricing(config=LLAMA, dsa=DSA, machine=H100, attention=None, **terms):
    shape = ModelShape(config, dsa, torch.bfloat16)
    return Pricing(shape, machine, attention or Roofline(machine), Terms(**{"per_hour": 3600.0, **terms}))


class TestByHand:
    """At $3600 an hour a million tokens cost as many millions of dollars as one token takes seconds."""

    @pytest.mark.parametrize("batch", [1, 4])
    def test_decoding_where_reading_bounds(self, batch):
        found = pricing(machine=READS_SLOWLY, batch=batch).dollars("decode", 100)
        token, index_key = 2 * 2 * 16 * 2, 2 * (8 + 2)
        dense = 2 * (WEIGHTS + HEAD) / batch + 2 * 100 * token
        dsa = 2 * (WEIGHTS + HEAD + INDEX_WEIGHTS) / batch + 2 * (8 * token + 100 * index_key)
        assert found == pytest.approx((dense * 1e-3, dsa * 1e-3))

    def test_prefill_where_computing_bounds(self):
        found = pricing(machine=COMPUTES_SLOWLY).dollars("prefill", 100)
        pair, index_pair = 4 * 4 * 16, 2 * 4 * 9
        dense = 2 * WEIGHTS + 2 * 100 * pair
        dsa = 2 * (WEIGHTS + INDEX_WEIGHTS) + 2 * (8 * pair + 100 * index_pair)
        assert found == pytest.approx((dense * 1e-3, dsa * 1e-3))

    def test_parts_follow_one_another(self):
        """Weights, attention and index scores add up; none hides behind another."""
        machine = Machine(2e9, 2e9)
        shape = ModelShape(LLAMA, DSA, torch.bfloat16)
        found = pricing(machine=machine, batch=1000).seconds("decode", 4000)
        parts = shape.parts("decode", 4000)
        weights = 2 * (WEIGHTS + HEAD) / 2e9
        assert parts.dense_attention.bytes < parts.dense_attention.flops
        assert found.dense == pytest.approx(weights + parts.dense_attention.flops / 2e9)
        index = max(parts.index_scores)
        weights_dsa = 2 * (WEIGHTS + HEAD + INDEX_WEIGHTS) / 2e9
        assert found.dsa == pytest.approx(weights_dsa + (max(parts.dsa_attention) + index) / 2e9)

    def test_up_to_k_the_indexer_only_stores(self):
        at = pricing(machine=READS_SLOWLY).seconds("decode", 8)
        keys = 2 * 32 * 16
        assert at.dsa - at.dense == pytest.approx((2 * keys + 2 * 2 * 10) / 1e9)

    def test_a_prefix_cache_is_free_and_only_prompts_have_one(self):
        plain, cached = pricing(batch=2), pricing(batch=2, hit_rate=0.75)
        assert cached.dollars("prefill", 64) == pytest.approx(
            [0.25 * x for x in plain.dollars("prefill", 64)]
        )
        assert cached.dollars("decode", 64) == plain.dollars("decode", 64)
        assert pricing(hit_rate=1.0).dollars("prefill", 64) == (0, 0)

    def test_the_price_is_in_proportion_to_the_hour(self):
        cheap, dear = (pricing(per_hour=price).dollars("decode", 64) for price in (2.0, 6.0))
        assert dear == pytest.approx([3 * x for x in cheap])

    def test_rows(self):
        price = pricing()
        (row,) = price.rows([100])
        assert row == (100, price.dollars("prefill", 100), price.dollars("decode", 100))

    def test_a_position_that_cannot_be(self):
        with pytest.raises(ConfigError, match="position=0"):
            pricing().rows([0])


class TestReadsOfExperts:
    CONFIG = DeepseekV3Config()
    EXPERT = 58 * 3 * 7168 * 2048

    def test_one_token_reads_its_own(self):
        own = layer_weights(self.CONFIG) + head_weights(self.CONFIG)
        assert read_weights(self.CONFIG, 1) == pytest.approx(own)

    def test_two_tokens_share_some(self):
        more = read_weights(self.CONFIG, 2) - read_weights(self.CONFIG, 1)
        assert more == pytest.approx((8 - 8 * 8 / 256) * self.EXPERT)

    def test_many_tokens_read_all(self):
        own = layer_weights(self.CONFIG) + head_weights(self.CONFIG)
        assert read_weights(self.CONFIG, 100_000) == pytest.approx(own + (256 - 8) * self.EXPERT)

    def test_a_batch_of_a_model_without_experts_shares_all(self):
        assert read_weights(LLAMA, 1) == read_weights(LLAMA, 64) == WEIGHTS + HEAD


class TestPaper:
    """V3.2 on H100s at $2 an hour against the published figure: what it says, within the bound's error."""

    PRICE = pricing(V32, dsa_of(V32), per_hour=2.0, batch=4096)

    @pytest.mark.parametrize("position", list(PAPER["prefill"]))
    def test_prefill_ratio(self, position):
        dense, dsa = PAPER["prefill"][position]
        found = self.PRICE.dollars("prefill", position)
        assert found.dense / found.dsa == pytest.approx(dense / dsa, rel=0.2)

    def test_prefill_crossover(self):
        assert self.PRICE.cheaper_from("prefill", 131_072) == pytest.approx(PAPER_PREFILL_CROSSOVER, rel=0.1)

    def test_a_bound_lies_below_the_dense_prices(self):
        for kind in KINDS:
            for position, (dense, _) in PAPER[kind].items():
                assert 0.5 * dense < self.PRICE.dollars(kind, position).dense < dense

    def test_decode_at_128k(self):
        """The paper's 8.65 has index keys in fp8, half of ours, and several tokens a step share its reads."""
        dense, dsa = PAPER["decode"][131_072]
        found = self.PRICE.dollars("decode", 131_072)
        assert dense / dsa / 2.6 < found.dense / found.dsa < dense / dsa
        assert found.dsa < 2 * dsa


class TestMeasured:
    """Lines with numbers that tell every term apart."""

    LINES = LayerLines(Line(1.0, 0.01, 0), Line(100.0, 0.1, 0), Line(10_000.0, 0.001, 0))

    def found(self, config, dsa, position):
        shape = ModelShape(config, dsa, torch.float32)
        return Measured(dict.fromkeys(KINDS, self.LINES))(shape, "decode", position)

    def test_selecting_layers_add_selection_and_sparse_attention(self):
        assert self.found(LLAMA, DSA, 1000) == pytest.approx((2 * 11.0, 2 * (200.0 + 10_001.0)))

    def test_up_to_k_both_are_dense(self):
        assert self.found(LLAMA, DSA, 8) == pytest.approx((2 * 1.08, 2 * 1.08))
        assert self.found(LLAMA, DSA, 9) == pytest.approx((2 * 1.09, 2 * (100.9 + 10_000.009)))

    def test_layers_that_are_not_converted_stay_dense(self):
        one = DsaConfig(8, 4, 2, 8, (1,))
        assert self.found(LLAMA, one, 1000) == pytest.approx((22.0, 11.0 + 10_201.0))

    def test_a_window_bounds_what_a_layer_reads(self):
        config = Qwen2Config(
            num_hidden_layers=2, use_sliding_window=True, sliding_window=50, max_window_layers=1
        )
        found = self.found(config, DsaConfig(8, 4, 2, 8, (0,)), 1000)
        assert found == pytest.approx((11.0 + 1.5, 10_201.0 + 1.5))

    def test_a_layer_that_shares_a_selection_makes_none(self):
        config = GlmMoeDsaConfig(num_hidden_layers=2, indexer_types=["full", "shared"])
        found = self.found(config, dsa_of(config), 10_000)
        assert found.dsa == pytest.approx(1100.0 + 2 * 10_010.0)


class TestCrossover:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("machine", [H100, READS_SLOWLY, COMPUTES_SLOWLY])
    @pytest.mark.parametrize("shares", [(), (0.5, 1.5)])
    def test_is_what_looking_at_every_position_finds(self, kind, machine, shares):
        price = pricing(dsa=DsaConfig(64, 4, 2, 8, (0, 1), shares), machine=machine, batch=8)
        pairs = [price.seconds(kind, at) for at in range(1, 1501)]
        dearer = [at for at, pair in enumerate(pairs, 1) if pair.dsa >= pair.dense]
        found = price.cheaper_from(kind, 1500)
        assert found == (None if dearer[-1] == 1500 else dearer[-1] + 1)
        assert found is None or found > 64

    def test_some_of_these_cross_and_some_do_not(self):
        """Lest the test above compare None with None alone."""
        dsa = DsaConfig(64, 4, 2, 8, (0, 1))
        found = [
            pricing(dsa=dsa, machine=machine, batch=8).cheaper_from(kind, 1500)
            for kind in KINDS
            for machine in (H100, READS_SLOWLY, COMPUTES_SLOWLY)
        ]
        assert {None} < set(found)
        assert len(set(found)) > 2

    def test_cheaper_everywhere(self):
        assert cheaper_from(lambda at: Pair(2.0, 1.0), search_positions(DSA, 1000)) == 1

    def test_never(self):
        assert cheaper_from(lambda at: Pair(1.0, 1.0), search_positions(DSA, 1000)) is None

    def test_cheaper_for_a_while_only_is_not_cheaper_from_there(self):
        def cost(at):
            return Pair(1.0, 0.5 if 100 < at < 500 else 2.0)

        assert cheaper_from(cost, search_positions(DSA, 1000)) is None
        assert cheaper_from(cost, search_positions(DSA, 499)) == 101

    @pytest.mark.parametrize("last_dearer", [1, 2, 8, 9, 517, 998])
    def test_to_the_token(self, last_dearer):
        found = cheaper_from(lambda at: Pair(at, last_dearer + 0.5), search_positions(DSA, 1000))
        assert found == last_dearer + 1

    @pytest.mark.parametrize("length", [1, 5, 8, 9, 1000])
    def test_positions_end_with_the_length(self, length):
        for positions in (search_positions(DSA, length), curve_positions(DSA, length)):
            assert positions == sorted(set(positions))
            assert (positions[0], positions[-1]) == (1, length)
            assert ({8, 9} <= set(positions)) == (length > 8)


class TestFiles:
    ROWS = (
        PriceRow(1, Pair(1.0, 1.5), Pair(3.0, 3.5)),
        PriceRow(512, Pair(2.0, 1.75), Pair(5.0, 4.0)),
    )

    def test_csv(self):
        rows = list(csv.reader(io.StringIO(price_csv(self.ROWS))))
        assert rows[0] == ["position", "prefill_dense", "prefill_dsa", "decode_dense", "decode_dsa"]
        assert [float(cell) for cell in rows[2]] == [512, 2.0, 1.75, 5.0, 4.0]

    def test_plot_draws_both_sides_and_marks_crossovers(self):
        plot = price_plot(self.ROWS, {"prefill": 300, "decode": None}, measured_to=400)
        prefill, decode = plot.figure.axes
        lines = {line.get_label(): list(line.get_ydata()) for line in prefill.get_lines()}
        assert lines["dense attention"] == [1.0, 2.0]
        assert lines["DSA"] == [1.5, 1.75]
        assert [line.get_xdata()[0] for line in prefill.get_lines()[2:]] == [300]
        assert len(decode.get_lines()) == 2
        assert prefill.get_title(loc="left") == "prefill: DSA is cheaper from 300"
        assert decode.get_title(loc="left") == "decode: DSA is never cheaper within 512"
        assert "400 tokens" in plot.caption
        assert png_bytes(plot).startswith(b"\x89PNG")
