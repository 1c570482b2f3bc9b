"""torch.compile on converted models: no graph break, the same numbers, few compilations."""

import pytest
import torch
from torch._dynamo.utils import counters

from fulmen import set_topk
from fulmen.modeling.gqa.model import set_topk_ratios
from fulmen.modeling.selectors import DenseSelector, use_selector
from tests.modeling.gqa.tiny_gqa import make_dense, make_dsa, random_ids

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
TOPK = 6


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make_model(name="llama", dtype=torch.float32, layers=1):
    """Of few layers: each is traced anew."""
    changes = {"num_hidden_layers": layers}
    if name == "qwen3":  # whose config lists them
        changes["layer_types"] = ["full_attention"] * layers
    return make_dsa(make_dense(name, dtype, **changes), TOPK)


def traced(model, backend="aot_eager"):
    """A graph break is an error."""
    return torch.compile(model, backend=backend, fullgraph=True)


def padded(ids):
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    return {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def packed(ids):
    place = torch.cat((torch.arange(9), torch.arange(ids.shape[1] - 9)))
    return {"position_ids": place.expand_as(ids), "use_cache": False}


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_forward_pass_is_one_graph(name):
    model = make_model(name)
    compiled = traced(model)
    with torch.no_grad():
        for length in (24, 30, 50):
            ids = random_ids(2, length)
            torch.testing.assert_close(compiled(ids).logits, model(ids).logits, **CLOSE)
    assert not counters["graph_break"]
    # For the first length, and for all the others.
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("kind", [padded, packed])
def test_padding_and_packed_documents(kind):
    model = make_model()
    ids = random_ids(2, 24)
    inputs = kind(ids)
    seen = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    with torch.no_grad():
        for topk in (TOPK, 64):
            set_topk(model, topk)
            found, expected = traced(model)(ids, **inputs).logits, model(ids, **inputs).logits
            torch.testing.assert_close(found[seen], expected[seen], **CLOSE)


def test_layers_with_shares_of_the_budget():
    model = make_model(layers=2)
    set_topk_ratios(model, (0.5, 1.5))
    set_topk(model, 10)
    ids = random_ids(2, 24)
    with torch.no_grad():
        torch.testing.assert_close(traced(model)(ids).logits, model(ids).logits, **CLOSE)


def test_another_selector_is_traced_anew():
    model = make_model()
    compiled, ids = traced(model), random_ids(1, 24)
    with torch.no_grad():
        sparse = compiled(ids).logits
        with use_selector(model, DenseSelector()):
            torch.testing.assert_close(compiled(ids).logits, model(ids).logits, **CLOSE)
        assert torch.equal(compiled(ids).logits, sparse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(dtype):
    model, ids = make_model(dtype=dtype).train(), random_ids(2, 24)
    found = []
    for run in (model, traced(model)):
        model.zero_grad()
        run(ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    eager, compiled = found
    assert eager.keys() == compiled.keys()
    for name, grad in eager.items():
        torch.testing.assert_close(
            compiled[name], grad, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5
        )


def test_autocast():
    model, ids = make_model(), random_ids(2, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(traced(model)(ids).logits, model(ids).logits, rtol=3e-2, atol=8e-2)


def test_a_cache_and_generate():
    model, ids = make_model(), random_ids(1, 24)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
    # A prompt, a token, and tokens after any past.
    assert counters["stats"]["unique_graphs"] <= 3


def test_the_default_compiler():
    """Its kernels fuse what is not opaque."""
    model, ids = make_model(), random_ids(1, 24)
    with torch.no_grad():
        found = traced(model, "inductor")(ids, use_cache=False).logits
        torch.testing.assert_close(found, model(ids).logits, **CLOSE)


def test_export():
    model, ids = make_model(), random_ids(1, 24)
    with torch.no_grad():
        program = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
        torch.testing.assert_close(program.module()(ids, use_cache=False).logits, model(ids).logits, **CLOSE)
