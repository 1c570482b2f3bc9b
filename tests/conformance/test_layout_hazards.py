"""Hazards of what a layer's indexer is: how RoPE lies in it, and whose selection a layer uses.

Against Transformers' own rotation and its own DSA models; nothing here is computed twice by fulmen.
"""

import pytest
import torch
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaIndexer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from fulmen.config import DsaConfig
from fulmen.errors import ConfigError
from fulmen.modeling.cost import decode_cost
from fulmen.modeling.families import family_for_type
from fulmen.modeling.mla import attention
from fulmen.modeling.selectors import dsa_attentions
from fulmen.ops.common.index_keys import round_index_keys
from tests.conformance.hazard_cases import (
    PADS,
    TOPK,
    best_by_hand,
    logits_in_steps,
    make_model,
    new_cache,
    watched,
)
from tests.modeling.gqa.tiny_gqa import make_dense, make_dsa, random_ids

LENGTH, PROMPT = 100, 60
# Texts in which no selection of the MLA models hangs on a tie, for which Transformers has no rule.
IDS = random_ids(len(PADS), LENGTH, seed=7).clamp(max=63)


def all_causal(batch):
    stop = torch.arange(1, LENGTH + 1).expand(batch, -1)
    return torch.zeros_like(stop), stop


@pytest.mark.parametrize("name", ["llama", "llama3-rope", "qwen2", "qwen3", "mistral", "gemma3"])
def test_hazard_1_a_copied_head_is_rotated_as_the_model_rotates_it(name):
    """Index heads that are the model's own select where its queries and keys, rotated by Transformers' own
    function, have the largest sum of ReLU(q . k).

    Mutation: pairs of neighbours, `x[..., ::2], x[..., 1::2]`, in rotate_half_split (ops/common/rope.py).
    """
    dense = make_dense(name, torch.float64)
    heads, groups = dense.config.num_attention_heads, dense.config.num_key_value_heads
    width = dense.model.layers[0].self_attn.head_dim
    model = make_dsa(dense, TOPK, heads, groups, width)
    project = family_for_type(dense.config.model_type).project
    scores, hooks = {}, []

    def score_by_hand(module, _, kwargs):
        q, k, _ = project(module, kwargs["hidden_states"])
        cos, sin = kwargs["position_embeddings"]
        q, k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
        k = round_index_keys(k).repeat_interleave(heads // groups, 2)
        scores[module.layer_idx] = torch.einsum("bthd,bshd->bths", q, k).relu().sum(2)

    for converted in dsa_attentions(model):
        indexer = converted.indexer
        for projection in (indexer.wq, indexer.wk):
            torch.nn.init.eye_(projection.weight)
        for constant, value in ((indexer.weights_proj, 1.0), (indexer.shift_proj, 0.0)):
            torch.nn.init.zeros_(constant.weight)
            torch.nn.init.constant_(constant.bias, value)
        hooks.append(converted.register_forward_pre_hook(score_by_hand, with_kwargs=True))
    watch, _ = watched(model, lambda: model(IDS, use_cache=False))
    assert len(scores) == (2 if name == "gemma3" else 3)
    for layer, scores_BTS in scores.items():
        expected = best_by_hand(scores_BTS, *all_causal(len(IDS)), TOPK)
        for row, queries in watch.chosen[layer].items():
            assert queries == {t: tuple(expected[row, t].tolist()) for t in range(TOPK, LENGTH)}


@pytest.mark.parametrize("name", ["v32", "glm-shared"])
@pytest.mark.parametrize("cached", [False, True])
def test_hazard_1_mla_selects_what_transformers_own_indexer_selects(name, cached):
    """V3.2's indexer rotates halves and its attention neighbours; GLM-5's does neighbours in both.

    Mutation: half_split_pairs for both kinds, or for neither: `if True` or `if False` for the isinstance of
    mla_index_inputs (modeling/mla/attention.py).
    """
    model, stock = make_model(name), {}

    def keep(module, _, chosen_BTK):
        stock.setdefault(module.layer_idx, []).append(chosen_BTK)

    def feed():
        if not cached:
            return model(IDS, use_cache=False).logits
        return logits_in_steps(model, IDS, [PROMPT] + [1] * 8, new_cache(model))

    indexers = [x for x in model.modules() if isinstance(x, DeepseekV32Indexer | GlmMoeDsaIndexer)]
    hooks = [indexer.register_forward_hook(keep) for indexer in indexers]
    with torch.no_grad():
        expected = feed()
    for hook in hooks:
        hook.remove()
    watch, logits = watched(model, feed)
    for scores_BTS, _, stop_BT in watch.scores:
        best_BTK = scores_BTS.topk(min(TOPK + 1, scores_BTS.shape[-1])).values
        assert (best_BTK[..., -2] - best_BTK[..., -1])[stop_BT > TOPK].min() > 1e-5
    assert len(watch.chosen) == len(indexers) > 1
    for layer, chosen in stock.items():
        chosen_TBK = [chosen_BK for part in chosen for chosen_BK in part.unbind(1)]
        for row, queries in watch.chosen[layer].items():
            assert len(queries) == len(chosen_TBK) - TOPK
            for t, keys in queries.items():
                assert set(chosen_TBK[t][row].tolist()) == set(keys), (layer, row, t)
    # Transformers softmaxes in float32.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("cached", [False, True])
def test_hazard_2_a_shared_layer_uses_the_last_full_layers_selection(cached, monkeypatch):
    """GLM-5. Its cost counts an indexer only where there is one.

    Mutations: None for prev_topk_indices in FulmenGlmAttention.forward (modeling/mla/attention.py); all of
    dsa.layers from _indexer_layers (modeling/cost.py).
    """
    model, used = make_model("glm-shared"), []
    attend = attention.sparse_attention

    def keep(q, k, v, topk_BTK, scale):
        used.append(topk_BTK)
        return attend(q, k, v, topk_BTK, scale)

    monkeypatch.setattr(attention, "sparse_attention", keep)
    steps = [PROMPT, 1, 5]
    watched(
        model,
        lambda: (
            logits_in_steps(model, IDS, steps, new_cache(model)) if cached else model(IDS, use_cache=False)
        ),
    )
    assert len(used) == 4 * (len(steps) if cached else 1)
    for full, shared in zip(used[::2], used[1::2], strict=True):
        assert torch.equal(full, shared)
    assert all(not torch.equal(one, other) for one, other in zip(used[::4], used[2::4], strict=True))
    config, dsa = model.config, DsaConfig(TOPK, 8, 1, 16, (0, 1, 2, 3))
    longer, long = (decode_cost(config, dsa, position).dsa_bytes for position in (2001, 2000))
    assert longer - long == pytest.approx(2 * config.index_head_dim * 2)


def test_hazard_2_a_config_that_shares_selections_is_not_read_as_one_that_does_not():
    """Mutation: unknown keys dropped in DsaConfig.from_dict (config.py)."""
    dsa = {**make_model("llama").config.dsa, "indexer_types": ["full", "shared", "shared"]}
    with pytest.raises(ConfigError, match="indexer_types"):
        DsaConfig.from_dict(dsa)
