"""fulmen's attention in a stock DSA model gives the stock model's numbers, well above topk."""

from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from fulmen.errors import CacheError, ConfigError, UnsupportedModelError
from fulmen.modeling.intervals import visible_intervals
from fulmen.modeling.mla.attention import accelerate_mla, fulmen_attention, mla_loss_inputs, restore_mla
from fulmen.modeling.mla.cache import MlaCache
from fulmen.modeling.selectors import DenseSelector, use_selector
from fulmen.ops.losses.indexer import indexer_loss
from tests.modeling.mla.tiny_mla import make_mla, mla_ids

MODELS = {
    "v32": ("v32", {"num_hidden_layers": 4}),
    "glm": ("glm", {"num_hidden_layers": 4}),
    "glm-shared": ("glm", {"num_hidden_layers": 4, "indexer_types": ["full", "shared", "full", "shared"]}),
}
LENGTH, PROMPT, STEPS = 96, 60, 8


@pytest.fixture(params=["sdpa", "eager"])
def attn(request):
    return request.param


@pytest.fixture(params=list(MODELS))
def model(request, attn):
    kind, changes = MODELS[request.param]
    return make_mla(kind, attn=attn, **changes)


def tolerance(model) -> dict:
    return {"rtol": 0, "atol": 1e-7 if model.dtype == torch.float64 else 3e-5}


@torch.no_grad()
def run(model, ids, cache=None, **kwargs):
    return model(ids, past_key_values=cache, use_cache=cache is not None, **kwargs).logits


def decode(model, ids, cache):
    """Logits of a prompt, a chunk of two, then single tokens."""
    bounds = [0, PROMPT, PROMPT + 2, *range(PROMPT + 3, PROMPT + STEPS)]
    return torch.cat([run(model, ids[:, a:b], cache) for a, b in pairwise(bounds)], 1)


def test_prefill_is_the_stock_models(model):
    ids = mla_ids(2, LENGTH)
    expected = run(model, ids)
    with fulmen_attention(model), use_selector(model, DenseSelector()):
        assert (run(model, ids) - expected).abs().max() > 0.1, (
            "selection must matter for this test to mean anything"
        )
    with fulmen_attention(model):
        torch.testing.assert_close(run(model, ids), expected, **tolerance(model))


@pytest.mark.parametrize("name", list(MODELS))
def test_of_tied_tokens_the_most_recent_are_attended_to(name):
    """Every score is 0: each token then sees the last `index_topk`, as by a mask; stock may take any."""
    kind, changes = MODELS[name]
    # With room for the whole text the stock model has nothing to choose; the mask does.
    model, stock = (make_mla(kind, **changes, **topk) for topk in ({}, {"index_topk": LENGTH}))
    for weight in (w for x in (model, stock) for n, w in x.named_parameters() if "weights_proj" in n):
        torch.nn.init.zeros_(weight)
    ids, position = mla_ids(1, LENGTH), torch.arange(LENGTH)
    past = position[:, None] - position
    recent = (past >= 0) & (past < model.config.index_topk)
    expected = run(stock, ids, attention_mask=recent[None, None])
    with fulmen_attention(model):
        prompt, decoded = run(model, ids), decode(model, ids, MlaCache(model.config))
    torch.testing.assert_close(prompt, expected, **tolerance(model))
    torch.testing.assert_close(decoded, expected[:, : decoded.shape[1]], **tolerance(model))


@pytest.mark.parametrize("name", list(MODELS))
def test_float64_agrees_to_the_last_norm(name):
    kind, changes = MODELS[name]
    # Transformers' fused experts take no float64.
    model = make_mla(kind, first_k_dense_replace=4, **changes).double()
    ids = mla_ids(1, LENGTH)
    expected = run(model, ids)
    with fulmen_attention(model):
        torch.testing.assert_close(run(model, ids), expected, **tolerance(model))


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache, MlaCache])
def test_cached_decode_is_the_stock_models(model, cache_class):
    ids = mla_ids(2, LENGTH)
    expected = decode(model, ids, DynamicCache(config=model.config))
    settings = {"max_cache_len": 70} if cache_class is StaticCache else {}
    cache = cache_class(config=model.config, **settings)
    with fulmen_attention(model):
        torch.testing.assert_close(decode(model, ids, cache), expected, **tolerance(model))


def test_caches_are_interchangeable():
    model, ids = make_mla("v32"), mla_ids(2, LENGTH)
    expected = decode(model, ids, DynamicCache(config=model.config))[:, -1:]
    stock, ours = DynamicCache(config=model.config), MlaCache(model.config)
    last = PROMPT + STEPS - 1
    run(model, ids[:, : last - 1], stock)
    with fulmen_attention(model):
        run(model, ids[:, : last - 1], ours)
        ours_read_stock = run(model, ids[:, last - 1 : last], stock)
    stock_read_ours = run(model, ids[:, last - 1 : last], ours)
    torch.testing.assert_close(ours_read_stock, expected, **tolerance(model))
    torch.testing.assert_close(stock_read_ours, expected, **tolerance(model))


def test_own_cache_holds_each_token_once_and_can_be_cropped():
    model, ids = make_mla("v32"), mla_ids(2, 40)
    cache = MlaCache(model.config, max_length=64)
    with fulmen_attention(model):
        full = run(model, ids, cache)
        per_token = 3 * 2 * 4  # layers, batch rows, bytes
        assert cache.nbytes == (40 * per_token * (32 + 8), 40 * per_token * 16)
        cache.crop(-10)
        again = run(model, ids[:, 30:], cache)
    torch.testing.assert_close(again, full[:, 30:], rtol=0, atol=1e-5)


def test_left_padding_changes_nothing(model):
    ids = mla_ids(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    expected = run(model, ids, attention_mask=mask, position_ids=positions)
    with fulmen_attention(model):
        padded = run(model, ids, attention_mask=mask, position_ids=positions)
        alone = run(model, ids[1:, 20:])
    seen = mask.bool()
    torch.testing.assert_close(padded[seen], expected[seen], **tolerance(model))
    torch.testing.assert_close(padded[1:, 20:], alone, **tolerance(model))


def test_packed_documents_do_not_see_each_other(model):
    ids = mla_ids(1, LENGTH)
    positions = torch.cat([torch.arange(40), torch.arange(LENGTH - 40)])[None]
    expected = run(model, ids, position_ids=positions)
    with fulmen_attention(model):
        packed = run(model, ids, position_ids=positions)
        torch.testing.assert_close(packed[:, 40:], run(model, ids[:, 40:]), **tolerance(model))
    torch.testing.assert_close(packed, expected, **tolerance(model))


@pytest.mark.parametrize("cache_implementation", [None, "static"])
def test_generation_is_the_stock_models(cache_implementation):
    model, ids = make_mla("v32"), mla_ids(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    settings = {
        "max_new_tokens": 8,
        "do_sample": False,
        "attention_mask": mask,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    expected = model.generate(ids, **settings)
    with fulmen_attention(model):
        assert model.generate(ids, cache_implementation=cache_implementation, **settings).equal(expected)


@pytest.mark.parametrize("name", list(MODELS))
def test_bfloat16_stays_near_float32(name):
    kind, changes = MODELS[name]
    model, ids = make_mla(kind, **changes), mla_ids(2, LENGTH)
    with fulmen_attention(model), use_selector(model, DenseSelector()):
        expected = run(model, ids)
        model.bfloat16()
        assert (run(model, ids) - expected).abs().mean() < 0.05
    with fulmen_attention(model):
        assert decode(model, ids, MlaCache(model.config)).isfinite().all()


def test_restored_model_is_stock_again():
    model, ids = make_mla("v32"), mla_ids(1, 40)
    expected, names = run(model, ids), set(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    with fulmen_attention(model), fulmen_attention(model), use_selector(model, DenseSelector()):
        assert set(model.state_dict()) == names
        assert not run(model, ids).equal(expected)
    assert [type(module) for module in model.modules()] == kinds
    assert run(model, ids).equal(expected)
    restore_mla(model)
    assert run(model, ids).equal(expected)


def test_what_does_not_fit_is_refused():
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, num_attention_heads=1, num_hidden_layers=1)
    )
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM"):
        accelerate_mla(llama)
    model, ids = make_mla("v32", attention_dropout=0.1), mla_ids(1, 40)
    holes = torch.ones_like(ids)
    holes[0, 10] = 0
    with fulmen_attention(model):
        with pytest.raises(CacheError, match="MlaCache"):
            run(model, ids, DynamicCache())
        with pytest.raises(ConfigError, match="attention_mask"):
            run(model, ids, attention_mask=holes)
        with pytest.raises(ConfigError, match=r"attention_dropout=0\.1"):
            model.train()(ids)


def test_trunk_gradient_is_the_stock_models():
    model, ids = make_mla("v32"), mla_ids(2, 40)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients()
    with fulmen_attention(model):
        found = gradients()
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["v32", "glm"])
def test_warm_up_lowers_the_kl_of_the_indexer_alone(kind):
    model, ids = make_mla(kind), mla_ids(2, 48)
    seen = visible_intervals(None, None, 2, 48, 0, ids.device)
    inputs = record_attention_inputs(model, ids)
    trunk = [parameter for name, parameter in model.named_parameters() if ".indexer." not in name]
    layers = [layer.self_attn for layer in model.model.layers]
    optimizer = torch.optim.Adam([p for layer in layers for p in layer.indexer.parameters()], lr=3e-3)

    def kl():
        total = 0.0
        for layer, (x_BTC, rotary) in zip(layers, inputs, strict=True):
            index, q_BTHD, k_BSGD, scale = mla_loss_inputs(layer, x_BTC, rotary)
            total += indexer_loss(*index, q_BTHD, k_BSGD, seen.start_BT, seen.stop_BT, scale).kl_BT.mean()
        return total

    first = kl()
    for _ in range(15):
        optimizer.zero_grad()
        kl().backward()
        optimizer.step()
    assert kl() < 0.6 * first
    assert all(parameter.grad is None for parameter in trunk)
    assert all(p.grad is not None for layer in layers for p in layer.indexer.parameters())


class KlSelector(DenseSelector):
    """Selects nothing, and adds up the warm-up loss of every layer that has an indexer."""

    def __init__(self):
        self.total = 0.0

    def is_needed(self, n_keys, topk):
        return True

    def select(self, inputs, topk):
        index = (inputs.index_q_BTJE, inputs.index_k_BSIE, inputs.index_w_BTJ, inputs.index_b_BTJ)
        intervals = (inputs.start_BT, inputs.stop_BT)
        self.total += indexer_loss(
            *index, inputs.q_BTHD, inputs.k_BSGD, *intervals, inputs.scale
        ).kl_BT.mean()


def test_loss_on_a_selectors_inputs_reaches_the_indexer_alone():
    model, ids, selector = (
        make_mla("glm", indexer_types=["full", "shared", "full"]),
        mla_ids(2, 48),
        KlSelector(),
    )
    with fulmen_attention(model), use_selector(model, selector):
        model(ids, use_cache=False)
    selector.total.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".indexer." in name), name


def record_attention_inputs(model, ids):
    """(x, (cos, sin)) of every layer, with gradient into the trunk."""
    records = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda _module, _args, kwargs: records.append(
                (kwargs["hidden_states"], kwargs["position_embeddings"])
            ),
            with_kwargs=True,
        )
        for layer in model.model.layers
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return records
