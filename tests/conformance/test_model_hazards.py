"""Hazards of whole models: caches, chunks, batches, speculation, training; every kind of model, all layers.

In float64, where rounding never decides a selection: what differs has a cause. Only plain torch computes it;
that the other backends select alike from the same index inputs is in test_selection_hazards.py.
"""

import copy
import io
from functools import partial

import pytest
import torch

from fulmen.modeling.gqa.cache import DsaCache
from fulmen.ops.common.index_keys import pack_index_keys, unpack_index_keys
from fulmen.ops.topk import index_topk
from fulmen.training.sparse.losses import SparseLossSelector
from tests.conformance.hazard_cases import (
    MODELS,
    PADS,
    TOPK,
    Watch,
    check_scores,
    logits_in_steps,
    make_model,
    new_cache,
    watched,
)
from tests.modeling.gqa.tiny_gqa import random_ids
from tests.ops.ops_cases import normal

LENGTH, PROMPT = 100, 60
IDS = random_ids(len(PADS), LENGTH).clamp(max=63)  # the smallest vocabulary has 64
ROWS = range(len(PADS))
NEAR = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(params=MODELS)
def model(request):
    return make_model(request.param)


def whole(model, ids=IDS):
    return watched(model, lambda: model(ids, use_cache=False).logits)


def selections(watch, first=0, rows=ROWS):
    """`[row][layer][query]` from query `first` on."""
    return [
        {
            layer: {t: keys for t, keys in queries.items() if t >= first}
            for layer, queries in watch.of_row(row).items()
        }
        for row in rows
    ]


def test_models_of_these_tests_select_by_scores_that_vary(model):
    watch, _ = whole(model)
    tied = model is make_model("llama-tied")
    for scores, start, stop in watch.scores:
        check_scores(scores, start, stop, TOPK, tied)
    assert len(watch.chosen) == (2 if getattr(model.config, "indexer_types", None) else len(watch.scores))
    other = IDS.clone()
    other[:, 7] = 63 - other[:, 7]
    before, after = selections(watch), selections(whole(model, other)[0])
    assert before != after
    assert all(len(keys) == TOPK for row in before for layer in row.values() for keys in layer.values())


def test_hazards_5_and_9_a_padded_row_is_the_row_alone(model):
    """Padding holds NaN, so whatever reads it shows.

    Mutation: zeros for start_BT in _padded_intervals (modeling/intervals.py).
    """
    embeds = model.get_input_embeddings()(IDS).detach().clone()
    mask = torch.ones_like(IDS)
    for row, pads in enumerate(PADS):
        mask[row, :pads] = 0
    embeds[mask == 0] = torch.nan
    padded = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    steps = [PROMPT, 1, 1, 8, LENGTH - PROMPT - 10]
    together = [
        watched(model, lambda: model(inputs_embeds=embeds, use_cache=False, **padded).logits),
        watched(model, lambda: logits_in_steps(model, embeds, steps, new_cache(model), **padded)),
    ]
    for row, pads in enumerate(PADS):
        alone, logits = whole(model, IDS[row : row + 1, pads:])
        for watch, batch_logits in together:
            assert selections(watch, rows=[row]) == selections(alone, rows=[0])
            torch.testing.assert_close(batch_logits[row, pads:], logits[0], **NEAR)


@pytest.mark.parametrize("sizes", [[1, 3, 60, 1, 35], [7] * 14 + [2]], ids=str)
def test_hazard_6_index_keys_keep_their_own_scale_in_every_layer_and_block(sizes):
    """Sizes of keys from 1e-6 to 1e6, token by token, head by head, layer by layer; caches that grow.

    Mutations: `scale_bytes[:, :1]` in unpack_index_keys, `amax((1, -1), keepdim=True)` in pack_index_keys
    (ops/common/index_keys.py): the first token's scale, or one for a whole block.
    """
    config = make_model("llama").config
    cache = DsaCache(config)
    for layer in range(3):
        spread = torch.exp2(normal(2, LENGTH, 2, 1, seed=layer) * 7)
        keys = normal(2, LENGTH, 2, 8, seed=10 + layer, dtype=torch.float32) * spread
        for piece in keys.split(sizes, 1):
            stored = cache.update_indexer(pack_index_keys(piece).flatten(2), layer)
        found = unpack_index_keys(stored.unflatten(-1, (2, 10)))
        off = (found - keys).abs().amax(-1) / keys.abs().amax(-1)
        assert off.max() < 0.5 / 127 * (1 + 1 / 64)
        q, w = normal(2, 1, 4, 8, seed=20), normal(2, 1, 4, seed=21).abs()
        ends = torch.zeros(2, 1, dtype=torch.int64), torch.full((2, 1), LENGTH)
        exact, stored_set = (index_topk(q, k, w, None, *ends, 3 * TOPK) for k in (keys, found))
        # Neighbours at the cut may swap, no more.
        common = sum(
            len(set(a) & set(b)) for a, b in zip(exact[:, 0].tolist(), stored_set[:, 0].tolist(), strict=True)
        )
        assert common >= 2 * (3 * TOPK - 2)


@pytest.mark.parametrize("name", ["llama", "qwen3", "llama-tied"])
def test_hazard_6_a_cached_key_is_the_same_number_as_without_a_cache(name):
    """Mutations: the key heads of packed_BSIX flipped in _extend_cache, or round_index_keys left out of
    forward (modeling/gqa/attention.py).
    """
    model, keys = make_model(name), [{}, {}]

    class Keys(Watch):
        def write(self, inputs, topk_BTK, topk):
            self.found[inputs.layer_idx] = inputs.index_k_BSIE

    for found, feed in zip(
        keys,
        [
            lambda: model(IDS, use_cache=False),
            lambda: logits_in_steps(model, IDS, [PROMPT, 7, 1, 1, LENGTH - PROMPT - 10, 1], new_cache(model)),
        ],
        strict=True,
    ):
        watch = Keys()
        watch.found = found
        watched(model, feed, watch)
    assert len(keys[0]) == 3
    for layer, whole_keys in keys[0].items():
        assert torch.equal(whole_keys, keys[1][layer])


def moved_by_bytes(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def in_place(change):
    def changed(cache):
        change(cache)
        return cache

    return changed


RESTORED = {
    "copied": (copy.deepcopy, [0, 1, 2]),
    "transferred": (moved_by_bytes, [0, 1, 2]),
    "reordered": (in_place(lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0]))), [2, 0, 0]),
    "repeated": (in_place(lambda cache: cache.batch_repeat_interleave(2)), [0, 0, 1, 1, 2, 2]),
    "selected": (in_place(lambda cache: cache.batch_select_indices(torch.tensor([1]))), [1]),
}


@pytest.mark.parametrize("how", RESTORED)
def test_hazard_7_a_restored_prefix_is_the_prefix_read_anew(model, how):
    """The first owner of the prefix reads on meanwhile, which must not show.

    Mutation: InPlaceIndexedLayer.buffers and MlaLayer.buffers without the index keys (modeling/gqa/cache.py,
    modeling/mla/cache.py).
    """
    restore, rows = RESTORED[how]
    other = random_ids(len(PADS), LENGTH, seed=5).clamp(max=63)
    first = new_cache(model)
    watched(model, lambda: logits_in_steps(model, IDS, [PROMPT], first))
    cache = restore(copy.deepcopy(first) if how not in ("copied", "transferred") else first)
    watched(model, lambda: logits_in_steps(model, other, [20], first, start=PROMPT))
    ids = torch.cat((IDS[rows, :PROMPT], other.flip(1)[rows, PROMPT:]), 1)
    cold, expected = whole(model, ids)
    warm, logits = watched(model, lambda: logits_in_steps(model, ids, [1, 30, 9], cache, start=PROMPT))
    assert selections(warm, rows=range(len(rows))) == selections(cold, PROMPT, range(len(rows)))
    torch.testing.assert_close(logits, expected[:, PROMPT:], **NEAR)


def test_hazards_7_and_10_speculation_is_token_by_token(model):
    """Drafts of several tokens, most of them rolled back by `crop`, then the true ones.

    Mutations: `stop_BT` of every query set to n_keys in visible_intervals (modeling/intervals.py: a draft
    sees the ones after it); InPlaceIndexedLayer.buffers without the index keys.
    """
    (cold, expected), wrong = whole(model), 63 - IDS
    cache, watch = new_cache(model), Watch()
    _, logits = watched(model, lambda: logits_in_steps(model, IDS, [PROMPT], cache), watch)
    parts, read = [logits], PROMPT
    for accepted, drafted in [(1, 4), (3, 5), (0, 6), (4, 4), (2, 7), (5, 6)]:
        draft = torch.cat((IDS[:, : read + accepted], wrong[:, read + accepted : read + drafted]), 1)
        one = Watch()
        feed = partial(logits_in_steps, model, draft, [drafted], cache, start=read)
        _, logits = watched(model, feed, one)
        cache.crop(accepted - drafted)
        parts.append(logits[:, :accepted])
        for layer, rows in one.chosen.items():
            for row, queries in rows.items():
                kept = {t: keys for t, keys in queries.items() if t < read + accepted}
                watch.chosen[layer][row].update(kept)
        read += accepted
    watched(
        model, lambda: parts.append(logits_in_steps(model, IDS, [1] * 5 + [20], cache, start=read)), watch
    )
    found = torch.cat(parts, 1)
    torch.testing.assert_close(found, expected[:, : found.shape[1]], **NEAR)
    for one, other in zip(selections(watch), selections(cold), strict=True):
        for layer, queries in one.items():
            assert queries == {t: other[layer][t] for t in queries}
            assert len(queries) == found.shape[1] - TOPK


class WatchedLoss(SparseLossSelector, Watch):
    """The sparse stage's selector, watched."""

    def select(self, inputs, topk):
        topk_BTK = super().select(inputs, topk)
        self.write(inputs, topk_BTK, topk)
        return topk_BTK


def test_hazard_12_training_and_serving_select_the_same_set(model):
    """Training reads whole texts without a cache, with gradients; serving, a prompt and then single tokens.

    Mutations: round_index_keys left out of forward (modeling/gqa/attention.py); keeps - 1 for keeps where
    SparseLossSelector selects (training/sparse/losses.py).
    """
    steps = [LENGTH - 16] + [1] * 16
    serving, _ = watched(model, lambda: logits_in_steps(model, IDS, steps, new_cache(model)))
    attentions = {layer: block.self_attn for layer, block in enumerate(model.model.layers)}
    training = WatchedLoss(attentions, lambda layer: TOPK, "kl", n_rows=32)
    Watch.__init__(training)
    model.train()
    try:

        def learn():
            with torch.enable_grad():
                return model(IDS, labels=IDS, use_cache=False).loss

        watched(model, learn, training)
    finally:
        model.eval()
    assert selections(training) == selections(serving)
    assert all(part.loss > 0 for part in training.layers.values())
