"""The doors of `fulmen.ops`: plain names, causal by default, errors that name the argument."""

import re
from pathlib import Path

import pytest
import torch

from fulmen import ops
from fulmen.errors import BackendError, ConfigError
from fulmen.ops.scores.reference import index_scores_reference
from tests.ops.ops_cases import normal

B, T, S, H, G, D, V, J, INDEX_KEYS, E, K = 2, 5, 9, 4, 2, 8, 6, 4, 2, 6, 3
CAUSAL = torch.arange(S)[None] <= torch.arange(S - T, S)[:, None]


def index():
    shapes = [(B, T, J, E), (B, S, INDEX_KEYS, E), (B, T, J), (B, T, J)]
    return dict(zip("qkwb", (normal(*shape, seed=i) for i, shape in enumerate(shapes)), strict=True))


def attention(queries=T, keys=S):
    shapes = [(B, queries, H, D), (B, keys, G, D), (B, keys, G, V)]
    return dict(zip("qkv", (normal(*shape, seed=i) for i, shape in enumerate(shapes)), strict=True))


def losses():
    attn = attention()
    return {**index(), "attn_q": attn["q"], "attn_k": attn["k"]}


def selected(**changes):
    return {**attention(), "indices": ops.index_topk(**index(), topk=K), **changes}


def inputs_of():
    """Right inputs of each function."""
    return {
        ops.index_scores: index(),
        ops.select_topk: {"scores": normal(B, T, S), "topk": K},
        ops.index_topk: {**index(), "topk": K},
        ops.sparse_attention: selected(),
        ops.dense_attention: attention(),
        ops.indexer_loss: losses(),
        ops.indexer_loss_selected: {**losses(), "indices": ops.index_topk(**index(), topk=K)},
        ops.selection_loss: {
            **losses(),
            "attn_v": attention()["v"],
            "out_weight": normal(7, H * V),
            "topk": K,
            "temperature": 0.5,
        },
    }


FUNCTIONS = list(inputs_of())
with_intervals = [f for f in FUNCTIONS if f not in (ops.sparse_attention, ops.indexer_loss_selected)]


def by_torch(q, k, v, visible):
    """Attention by torch's own function; `visible` [B, T, S] for all heads."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=visible[:, None].expand(-1, H, -1, -1), enable_gqa=True
    )
    return out.transpose(1, 2)


def test_dense_attention_is_torchs_own_causal_one():
    x = attention()
    expected = by_torch(**x, visible=CAUSAL.expand(B, -1, -1))
    torch.testing.assert_close(ops.dense_attention(**x), expected, rtol=1e-5, atol=1e-6)


def test_sparse_attention_is_torchs_own_over_what_the_index_selects():
    x, indices = attention(), ops.index_topk(**index(), topk=K)
    scores = ops.index_scores(**index())
    # By hand: the K largest of the causal scores.
    best = scores.topk(K).indices
    assert torch.equal(indices.sort(-1).values.long(), best.sort(-1).values)
    visible = torch.zeros(B, T, S, dtype=torch.bool).scatter(-1, best, True)
    found = ops.sparse_attention(**x, indices=indices)
    torch.testing.assert_close(found, by_torch(**x, visible=visible), rtol=1e-5, atol=1e-6)


def test_scores_are_those_of_the_formula():
    x = index()
    products = torch.einsum("btje,bsje->btjs", x["q"], x["k"].repeat_interleave(J // INDEX_KEYS, 2)) * E**-0.5
    expected = (x["w"][..., None] * (products + x["b"][..., None]).relu()).sum(2)
    found = ops.index_scores(**x)
    assert torch.equal(found == -torch.inf, ~CAUSAL.expand(B, -1, -1))
    torch.testing.assert_close(found[:, CAUSAL], expected[:, CAUSAL], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", [f for f in FUNCTIONS if "w" in inputs_of()[f]])
def test_one_index_key_head_needs_no_axis(function):
    inputs = inputs_of()[function]
    inputs["k"] = inputs["k"][:, :, :1]
    given = function(**inputs)
    same = function(**{**inputs, "k": inputs["k"][:, :, 0]})
    for one, other in [(given, same)] if isinstance(given, torch.Tensor) else zip(given, same, strict=True):
        assert torch.equal(one, other)


def test_the_log_sum_exp_comes_where_it_is_asked_for():
    for function, inputs in ((ops.dense_attention, attention()), (ops.sparse_attention, selected())):
        out, lse = function(**inputs, return_lse=True)
        assert torch.equal(out, function(**inputs))
        assert lse.shape == (B, T, H)


@pytest.mark.parametrize("function", with_intervals, ids=lambda f: f.__name__)
def test_causal_is_what_it_is_with_the_intervals_written_out(function):
    inputs = inputs_of()[function]
    start, stop = torch.zeros(B, T, dtype=torch.int32), torch.arange(S - T + 1, S + 1).repeat(B, 1)
    expected = as_tuple(function(**inputs, start=start, stop=stop))
    for given in ({}, {"start": start}, {"stop": stop}):
        found = as_tuple(function(**inputs, **given))
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("function", with_intervals, ids=lambda f: f.__name__)
def test_intervals_hide_keys(function):
    """Padding in front: as if the first keys were not there."""
    inputs = inputs_of()[function]
    start = torch.full((B, T), 4)
    shorter = {name: x[:, 4:] if is_of_keys(x) else x for name, x in inputs.items()}
    if function is ops.select_topk:
        shorter["scores"] = inputs["scores"][..., 4:]
    found, expected = as_tuple(function(**inputs, start=start)), as_tuple(function(**shorter))
    for x, y in zip(found, expected, strict=True):
        if x.dtype == torch.int32:
            x = torch.where(x < 0, x, x - 4)
        torch.testing.assert_close(x[..., -y.shape[-1] :], y, rtol=1e-5, atol=1e-6)


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)


def is_of_keys(x):
    return isinstance(x, torch.Tensor) and x.ndim == 4 and x.shape[1] == S


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (7, 3), (1, 1)])
def test_any_number_of_queries_and_keys(queries, keys):
    """Queries before the first key see none: their output is 0."""
    x = attention(queries, keys)
    out, lse = ops.dense_attention(**x, return_lse=True)
    blind = max(queries - keys, 0)
    assert out.shape == (B, queries, H, V)
    assert not out[:, :blind].any()
    assert (lse[:, :blind] == -torch.inf).all()
    assert lse[:, blind:].isfinite().all()
    q, k, w = normal(B, queries, J, E), normal(B, keys, INDEX_KEYS, E), normal(B, queries, J)
    indices = ops.index_topk(q, k, w, topk=4)
    assert indices.shape == (B, queries, min(4, keys))
    assert (indices >= 0).sum(-1).tolist() == [
        [min(max(keys - queries + t + 1, 0), 4) for t in range(queries)] for _ in range(B)
    ]
    assert ops.sparse_attention(**x, indices=indices).shape == out.shape


def test_more_than_there_are_is_dense_attention():
    x = attention()
    indices = ops.index_topk(**index(), topk=100)
    assert indices.shape == (B, T, S)
    torch.testing.assert_close(
        ops.sparse_attention(**x, indices=indices), ops.dense_attention(**x), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("function", [ops.sparse_attention, ops.dense_attention], ids=lambda f: f.__name__)
def test_gradients_are_those_of_the_reference(function):
    gradients = []
    for backend in ("reference", None):
        inputs = inputs_of()[function]
        leaves = [inputs[name].requires_grad_() for name in "qkv"]
        if backend:
            with ops.pin_backend(backend):
                gradients.append(torch.autograd.grad(function(**inputs).square().sum(), leaves))
        else:
            gradients.append(torch.autograd.grad(function(**inputs).square().sum(), leaves))
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [ops.indexer_loss, ops.indexer_loss_selected, ops.selection_loss])
def test_losses_train_the_indexer(function):
    inputs = inputs_of()[function]
    leaves = [inputs[name].requires_grad_() for name in "qkwb"]
    loss = as_tuple(function(**inputs))[0]
    assert loss.shape == (B, T)
    assert all(x.abs().sum() > 0 for x in torch.autograd.grad(loss.sum(), leaves))


@pytest.mark.parametrize(
    "function", [f for f in FUNCTIONS if "loss" not in f.__name__], ids=lambda f: f.__name__
)
def test_compiled_in_one_piece(function):
    torch._dynamo.reset()
    inputs = inputs_of()[function]
    with torch.no_grad():
        found = torch.compile(function, backend="aot_eager", fullgraph=True)(**inputs)
        assert torch.equal(found, function(**inputs))


def test_compiled_for_any_length_with_gradients():
    torch._dynamo.reset()

    def loss(q, k, v, indices):
        return (ops.sparse_attention(q, k, v, indices) + ops.dense_attention(q, k, v)).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for queries, keys in ((5, 9), (9, 9), (3, 20)):
        x = attention(queries, keys)
        indices = torch.arange(4).expand(B, queries, 4)
        q = x["q"].requires_grad_()
        found, expected = (torch.autograd.grad(f(**x, indices=indices), q)[0] for f in (compiled, loss))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


WRONG = [
    (ops.index_scores, "q", [[1.0]], "q is of type list; it must be a torch.Tensor"),
    (ops.index_topk, "k", None, "k is of type NoneType"),
    (ops.index_topk, "w", 3.0, "w is of type float"),
    (ops.index_topk, "b", 0, "b is of type int"),
    (ops.index_topk, "q", torch.ones(B, T, E), r"q has shape \(2, 5, 6\); it needs the 4 axes BTJE"),
    (ops.index_topk, "k", torch.ones(B, S, 3, E), "J=4 heads cannot share I=3 key heads"),
    (ops.index_topk, "k", torch.ones(B, S, INDEX_KEYS, E).double(), "k has dtype torch.float64"),
    (ops.index_topk, "k", torch.ones(B, S, INDEX_KEYS, E).char(), "k has dtype torch.int8"),
    (ops.index_topk, "q", torch.ones(B, T, J, E, dtype=torch.int64), "q has dtype torch.int64"),
    (ops.index_topk, "w", torch.ones(B, T, J + 1), "w has J=5"),
    (ops.index_topk, "start", torch.zeros(B, T), "start has dtype torch.float32"),
    (ops.index_topk, "stop", torch.zeros(B, T + 1, dtype=torch.int64), "stop has T=6"),
    (ops.index_topk, "stop", 4, "stop is of type int"),
    (ops.index_topk, "topk", 0, "topk=0 cannot be"),
    (ops.index_topk, "topk", True, "topk=True cannot be"),
    (ops.index_topk, "topk", 2.5, "topk=2.5 cannot be"),
    (ops.select_topk, "scores", torch.ones(B, T), r"scores has shape \(2, 5\)"),
    (ops.select_topk, "scores", torch.ones(B, T, S).long(), "scores has dtype torch.int64"),
    (ops.sparse_attention, "indices", torch.zeros(B, T, K), "indices has dtype torch.float32"),
    (ops.sparse_attention, "indices", None, "indices is of type NoneType"),
    (ops.sparse_attention, "indices", torch.zeros(B, T + 1, K).long(), "indices has T=6"),
    (ops.sparse_attention, "indices", torch.full((B, T, K), S), "holds the index 9; there are only S=9"),
    (ops.sparse_attention, "v", torch.ones(B, S + 1, G, V), "v has S=10"),
    (ops.sparse_attention, "k", torch.ones(B, S, G, D, device="meta"), "k is on meta"),
    (ops.sparse_attention, "scale", "big", "scale='big' cannot be; use a finite number"),
    (ops.sparse_attention, "scale", float("nan"), "scale=nan cannot be"),
    (ops.dense_attention, "scale", torch.ones(()), r"scale=tensor\(1.\) cannot be"),
    (ops.dense_attention, "v", torch.ones(B, S, G, V).half(), "v has dtype torch.float16"),
    (ops.dense_attention, "q", torch.ones(B, T, 0, D), "q has H=0"),
    (ops.indexer_loss, "attn_k", torch.ones(B, S + 1, G, D), "attn_k has S=10"),
    (ops.indexer_loss_selected, "indices", torch.zeros(B, T, K).char(), "indices has dtype torch.int8"),
    (ops.selection_loss, "out_weight", torch.ones(7, 5), "out_weight has 5 columns, the heads 24 values"),
    (ops.selection_loss, "out_gate", torch.ones(B, T, 5), "out_gate has N=5"),
    (ops.selection_loss, "out_gate", 1.0, "out_gate is of type float"),
    (ops.selection_loss, "temperature", 0, "temperature=0 cannot be; use a number above 0"),
]


@pytest.mark.parametrize(("function", "name", "value", "message"), WRONG)
def test_a_wrong_argument_is_named(function, name, value, message):
    inputs = {**inputs_of()[function], name: value}
    with pytest.raises(ConfigError, match=message) as caught:
        function(**inputs)
    assert "\n" not in str(caught.value)
    assert "_B" not in str(caught.value)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_tensors_without_values_are_refused(function):
    hollow = {
        name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in inputs_of()[function].items()
    }
    with pytest.raises(BackendError, match="hold no values"):
        function(**hollow)


def test_autocast_is_as_for_torchs_own_attention():
    x = {**attention(), "k": attention()["k"].bfloat16()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.dense_attention(**x).dtype == torch.bfloat16
    with pytest.raises(ConfigError, match=r"k has dtype torch\.bfloat16"):
        ops.dense_attention(**x)


def test_backends_by_name():
    assert ops.BACKENDS == ("reference", "torch", "cpp", "triton")
    x = index()
    zero, end = torch.zeros(B, T), torch.arange(S - T + 1, S + 1).expand(B, T)
    with ops.pin_backend("reference"):
        found = ops.index_scores(**x)
    assert torch.equal(found, index_scores_reference(*x.values(), zero.long(), end).scores_BTS)
    with pytest.raises(BackendError, match="'cuda' is not known"), ops.pin_backend("cuda"):
        pass


def test_the_lines_of_the_readme_run():
    text = Path(ops.__file__).with_name("README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names = {}
    exec(code.replace("4096", "512"), names)
    assert names["out"].shape == names["dense"].shape == (1, 512, 9, 64)
    assert names["indices"].shape == (1, 512, 256)
    assert names["scores"].shape == (1, 8, 512)
