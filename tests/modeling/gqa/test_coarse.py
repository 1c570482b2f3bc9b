"""The coarse level of an index: its closed form, its cache, and when it has no effect."""

import json

import pytest
import torch
from transformers import LlamaConfig

from fulmen.config import CoarseShape, DsaConfig
from fulmen.errors import CacheError, CheckpointError, ConfigError
from fulmen.modeling.cost import decode_parts, token_bytes
from fulmen.modeling.families import dsa_family_for, family_for_type
from fulmen.modeling.gqa.cache import DsaCache
from fulmen.modeling.gqa.inherit import inherit_coarse_gqa
from fulmen.modeling.gqa.inherit_coarse import best_mix, pair_moments, still_pairs
from fulmen.modeling.index_shape import default_dsa, one_level_reason
from fulmen.modeling.selectors import DenseSelector, OneLevelSelector, Selector, use_selector
from fulmen.modeling.weights import load_all_weights
from fulmen.ops.topk import index_topk
from fulmen.ops.two_level import two_level_topk
from tests.modeling.gqa.tiny_gqa import FAMILIES, make_dense, make_dsa, random_ids

TOPK = 8


def two_level_model(name="llama", width=8, factor=1, topk=TOPK, **changes):
    dense = make_dense(name, **changes)
    family = family_for_type(dense.config.model_type)
    layers = tuple(family.full_attention_layers(dense.config))
    torch.manual_seed(1)
    return family.from_dense(
        dense,
        DsaConfig(topk, 4, 2, 8, layers, coarse_head_dim=width, coarse_n_heads=4, candidate_factor=factor),
    )


class RecallOfCandidates(Selector):
    """Attends densely and notes how many of the keys that the indexer alone keeps two levels keep."""

    def __init__(self, factor: int) -> None:
        self.factor = factor
        self.recalls: list[float] = []

    def select(self, inputs, topk):
        index = (inputs.index_q_BTJE, inputs.index_k_BSIE, inputs.index_w_BTJ, inputs.index_b_BTJ)
        index = (*index, inputs.start_BT, inputs.stop_BT)
        alone = index_topk(*index, topk)[:, -40:]
        both = two_level_topk(*inputs.coarse[:3], *index, topk, self.factor * topk)[:, -40:]
        kept = [
            len(set(a) & set(b))
            for a, b in zip(alone.flatten(0, 1).tolist(), both.flatten(0, 1).tolist(), strict=True)
        ]
        self.recalls.append(sum(kept) / len(kept) / topk)


def recall(model, factor=3):
    seen = RecallOfCandidates(factor)
    with torch.no_grad(), use_selector(model, seen):
        model.base_model(random_ids(2, 160, seed=9), use_cache=False)
    return sum(seen.recalls) / len(seen.recalls)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_closed_form_keeps_what_the_indexer_keeps(name):
    model = two_level_model(name, width=16)
    dsa_family_for(model.config).inherit(model, random_ids(6, 160, seed=3))
    inherited = recall(model)
    with torch.no_grad():
        for layer in model.config.dsa["layers"]:
            model.model.layers[layer].self_attn.indexer.coarse.reset(0.2)
    assert inherited > recall(model) + 0.15
    # Heads of random models have little in common, whose mean the coarse head is; by chance it is 0.15.
    assert inherited > 0.4


def test_all_pairs_of_all_key_heads_carry_each_heads_logit_whole():
    model = two_level_model(width=32)  # two key heads of 16
    inherit_coarse_gqa(model, random_ids(4, 100, seed=3), TOPK)
    seen = []

    class Compare(Selector):
        def select(self, inputs, topk):
            k_BSHD = inputs.k_BSGD.repeat_interleave(2, 2)
            logits_BHTS = torch.einsum("bthd,bshd->bhts", inputs.q_BTHD, k_BSHD) * inputs.scale
            seen.append((logits_BHTS, inputs.coarse))

    with torch.no_grad(), use_selector(model, Compare()):
        model.base_model(random_ids(1, 60, seed=5), use_cache=False)
    for logits_BHTS, coarse in seen:
        numbers = coarse.k_BSX[..., :-2].float()
        scale = coarse.k_BSX[..., -2:].contiguous().view(torch.bfloat16).float()
        coarse_BMTS = torch.einsum("btmn,bsn->bmts", coarse.q_BTMN, numbers * scale) * 32**-0.5
        error = (coarse_BMTS[:, :-1] - logits_BHTS).std() / logits_BHTS.std()
        assert error < 0.03  # 8 bits
        mean_BTS = logits_BHTS.mean(1)
        assert (32 * coarse_BMTS[:, -1] - mean_BTS).std() / mean_BTS.std() < 0.03


def test_keys_of_two_numbers_need_one_pair_unless_they_turn():
    """Two numbers, spread over all key heads and pairs: of pairs that turn, no two mix."""
    torch.manual_seed(0)
    q_RHD, number_SX, spread_XGD = torch.randn(20, 4, 16), torch.randn(30, 2), torch.randn(2, 2, 16)
    k_GSD = torch.einsum("sx,xgd->gsd", number_SX, spread_XGD)
    logits_RHS = torch.einsum("rhd,hsd->rhs", q_RHD, k_GSD.repeat_interleave(2, 0))

    def error(still_P):
        inputs = (q_RHD, k_GSD, torch.arange(10, 30), (0.25, None, None), 4, 4, still_P)
        mix = best_mix([pair_moments(*inputs)], still_P, 1)
        key_SN = torch.einsum("ngd,gsd->sn", mix.key_U2GD[0], k_GSD.double())
        query_NHD = mix.query_U2GD[0].repeat_interleave(2, 1)
        query_RHN = torch.einsum("nhd,rhd->rhn", query_NHD, q_RHD.double())
        found_RHS = torch.einsum("rhn,sn->rhs", query_RHN, key_SN)
        return float((found_RHS - logits_RHS).std() / logits_RHS.std()), mix.turns_U.tolist()

    still, turning = error(torch.ones(8).bool()), error(torch.zeros(8).bool())
    assert still[0] < 1e-3
    assert still[1] == [8]
    assert turning[0] > 0.5
    assert turning[1][0] < 8


@pytest.mark.parametrize(
    ("context", "expected"), [(512, [6, 7, 8, 9]), (64, [4, 5, 6, 7, 8, 9]), (None, [8, 9])]
)
def test_still_pairs_turn_by_a_radian_at_most_within_the_context(context, expected):
    """Of 20 dims RoPE turns 16; pair p by 10^(-p/2) a token. Without a context the text's tokens count."""
    angle_TP = torch.arange(4000)[:, None] * 10.0 ** (-torch.arange(8) / 2)
    table_TR = torch.cat((angle_TP, angle_TP), -1)[None]
    still_P = still_pairs((table_TR.cos(), table_TR.sin()), 10, context)
    assert still_P.nonzero()[:, 0].tolist() == expected


def test_with_many_candidates_it_is_the_one_level_model():
    model = two_level_model(factor=40)
    ids = random_ids(2, 120)
    with torch.no_grad():
        found = model(ids).logits
        with use_selector(model, OneLevelSelector()):
            assert torch.equal(model(ids).logits, found)
    few = two_level_model(factor=1)
    few.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert not torch.equal(few(ids).logits, found)


def test_up_to_the_asking_point_no_coarse_query_is_made(monkeypatch):
    model, ids = two_level_model(factor=2), random_ids(1, 65)
    with torch.no_grad():
        expected = model(ids).logits
        attention = model.model.layers[0].self_attn
        monkeypatch.setattr(attention.indexer.coarse, "queries", None)
        assert torch.equal(model(ids[:, :64]).logits, expected[:, :64])
        with pytest.raises(TypeError):
            model(ids)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_token_by_token_and_in_chunks_it_is_the_prompt_at_once(name):
    model, ids = two_level_model(name), random_ids(2, 60)
    inherit_coarse_gqa(model, random_ids(4, 100, seed=3), TOPK)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = DsaCache(model.config)
        parts = [model(some, past_key_values=cache).logits for some in ids.split([33, 20, 1, 1, 5], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_a_cache_without_room_for_coarse_keys_is_refused():
    class Old(DsaCache):
        update_coarse = property()

    model = two_level_model()
    with pytest.raises(CacheError, match="Old has no room for the index keys of layer 0"):
        model(random_ids(1, 10), past_key_values=Old(model.config))


def two_models():
    """Of one level and of two, with the same weights otherwise; neither asks a coarse level of 10 tokens."""
    two = two_level_model()
    one = make_dsa(make_dense(), topk=TOPK)
    return one, two


@pytest.mark.parametrize("filled_by", [0, 1])
@pytest.mark.parametrize("is_cropped", [False, True])
def test_a_cache_filled_by_a_model_of_other_levels_is_refused(filled_by, is_cropped):
    models, ids = two_models(), random_ids(1, 14)
    cache = DsaCache(models[0].config)
    with torch.no_grad():
        models[filled_by](ids[:, :10], past_key_values=cache)
        if is_cropped:
            cache.crop(-4)
    said = "are to have no coarse keys" if filled_by else "need coarse keys of 10 bytes"
    kept = 6 if is_cropped else 10
    with pytest.raises(CacheError, match=f"its {kept} tokens of layer 0 {said}; read them anew"):
        models[1 - filled_by](ids[:, 10:], past_key_values=cache)
    assert cache.get_seq_length() == kept


def test_a_cache_of_coarse_keys_of_another_width_is_refused_and_an_empty_one_is_not():
    wide, narrow, ids = two_level_model(width=16), two_level_model(width=8), random_ids(1, 14)
    cache = DsaCache(wide.config)
    with torch.no_grad():
        wide(ids, past_key_values=cache)
        with pytest.raises(CacheError, match="14 tokens of layer 0 need coarse keys of 10 bytes"):
            narrow(ids, past_key_values=cache)
        cache = DsaCache(wide.config)
        expected = narrow(ids, past_key_values=DsaCache(narrow.config)).logits
        assert torch.equal(narrow(ids, past_key_values=cache).logits, expected)


def test_a_config_of_other_levels_than_the_weights_is_refused_at_load(tmp_path):
    one, two = two_models()
    shapes = {"coarse_head_dim": 8, "coarse_n_heads": 4, "candidate_factor": 8}
    said = {
        "one": (one, shapes, r"lacks \d+ weights, the first model.layers.0.self_attn.indexer.coarse"),
        "two": (two, {}, "weights that config.json does not ask for, as .*indexer.coarse"),
        "other": (two, {**shapes, "coarse_head_dim": 6}, "of another shape than config.json says"),
    }
    for name, (model, coarse, message) in said.items():
        model.save_pretrained(tmp_path / name)
        file = tmp_path / name / "config.json"
        config = json.loads(file.read_text())
        kept = {key: value for key, value in config["dsa"].items() if key not in shapes}
        file.write_text(json.dumps({**config, "dsa": {**kept, **coarse}}))
        with pytest.raises(CheckpointError, match=message):
            load_all_weights(str(tmp_path / name), type(model))


def test_dense_attention_does_not_see_it():
    model, ids = two_level_model(), random_ids(1, 60)
    with torch.no_grad(), use_selector(model, DenseSelector()):
        found = model(ids).logits
    torch.testing.assert_close(found, make_dense()(ids).logits, rtol=1e-4, atol=1e-4)


def test_training_has_no_gradient_in_it():
    model = two_level_model()
    assert not any(".coarse." in name for name, _ in model.named_parameters())
    assert any(".coarse.wq" in name for name, _ in model.named_buffers())


def test_configs_say_whether_there_are_two_levels():
    one = DsaConfig(8, 4, 2, 8, (0, 1))
    assert "coarse_head_dim" not in one.to_dict()
    assert DsaConfig.from_dict(one.to_dict()) == one
    two = DsaConfig(8, 4, 2, 8, (0, 1), coarse_head_dim=6, coarse_n_heads=2)
    assert DsaConfig.from_dict(two.to_dict()) == two
    assert two.candidate_factor == 8
    with pytest.raises(ConfigError, match="coarse_head_dim=5 cannot be; use an even number"):
        DsaConfig(8, 4, 2, 8, (0,), coarse_head_dim=5)
    with pytest.raises(ConfigError, match="coarse_n_heads=0 cannot be"):
        DsaConfig(8, 4, 2, 8, (0,), coarse_head_dim=6)
    with pytest.raises(ConfigError, match="coarse_n_heads=2 cannot be without coarse_head_dim"):
        DsaConfig(8, 4, 2, 8, (0,), coarse_n_heads=2)
    with pytest.raises(ConfigError, match="candidate_factor=0 cannot be"):
        DsaConfig(8, 4, 2, 8, (0,), candidate_factor=0)


def test_default_shapes_and_what_they_cost():
    config = make_dense().config
    two, one = default_dsa(config, 8, index="two-level"), default_dsa(config, 8)
    assert (two.coarse_head_dim, one.coarse_head_dim) == (24, 0)
    kept = 2 * (24 + 2)  # bytes a token, in three layers
    assert token_bytes(config, two).index_keys - token_bytes(config, one).index_keys == 3 * kept / 2
    far, near = (decode_parts(config, two, position).index_scores for position in (600, 60))
    alone = decode_parts(config, one, 600).index_scores
    index_key = token_bytes(config, one).index_keys
    assert far.bytes == 600 * 3 * 26 + 64 * index_key
    assert near == decode_parts(config, one, 60).index_scores
    pair = alone.flops / 600 / 3
    assert far.flops == 3 * (600 * 2 * 5 * 25 + 64 * pair)
    with pytest.raises(ConfigError, match="is more than the 32 dims of the key heads"):
        dsa_family_for_dense(config).require_inheritable(config, DsaConfig(8, 4, 2, 8, (0,), (), 40, 4))
    with pytest.raises(ConfigError, match="coarse_n_heads=3 does not fit 4 heads on 2 key heads"):
        dsa_family_for_dense(config).require_inheritable(config, DsaConfig(8, 4, 2, 8, (0,), (), 8, 3))


@pytest.mark.parametrize(
    ("shape", "coarse"),
    [
        ({"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}, (9, 24)),  # SmolLM2-135M
        ({"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}, (32, 64)),
        ({"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}, (4, 32)),
        # A coarse key of 26 bytes beside index keys of 20, and one that is smaller.
        ({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}, (0, 0)),
        ({"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}, (0, 0)),
    ],
)
def test_two_levels_are_the_default_where_they_pay(shape, coarse):
    config = LlamaConfig(hidden_size=576, max_position_embeddings=131_072, **shape)
    default, two, one = (default_dsa(config, index=index) for index in (None, "two-level", "one-level"))
    assert default.coarse == CoarseShape(*coarse)
    assert default == (two if coarse[0] else one)
    assert two.coarse_head_dim
    assert bool(one_level_reason(default, config)) == (default == one)


@pytest.mark.parametrize(("context", "topk", "levels"), [(8192, 256, 1), (8193, 256, 2), (8192, 255, 2)])
def test_two_levels_are_the_default_where_the_context_is_long_enough_for_them_to_act(context, topk, levels):
    shape = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    config = LlamaConfig(hidden_size=576, max_position_embeddings=context, **shape)
    dsa = default_dsa(config, topk)
    assert bool(dsa.coarse_head_dim) == (levels == 2)
    assert ("which its context does not have" in (one_level_reason(dsa, config) or "")) == (levels == 1)


def test_few_index_heads_that_are_asked_for_leave_nothing_to_spare():
    """3 index heads of 48 numbers cost less than 10 coarse ones of 24."""
    shape = {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 131_072}
    config = LlamaConfig(hidden_size=576, **shape)
    assert not default_dsa(config, index_n_heads=3).coarse_head_dim


def dsa_family_for_dense(config):
    return family_for_type(config.model_type)


def test_a_model_of_one_level_is_as_before():
    model = make_dsa(make_dense())
    assert not any(".coarse" in name for name in model.state_dict())
    assert model.model.layers[0].self_attn.indexer.coarse is None
