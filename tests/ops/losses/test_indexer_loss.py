"""The indexer's loss against its specification: forward, gradients, isolation, odd rows."""

import pytest
import torch

from fulmen.ops.attention.mean import mean_attention
from fulmen.ops.losses.indexer import indexer_loss, indexer_loss_selected
from fulmen.ops.losses.indexer.reference import indexer_loss_reference, indexer_loss_selected_reference
from tests.ops.ops_cases import DTYPES, assert_near, causal, normal, ragged, random_selection

# J, I, E, H, G, D
HEADS = {"grouped": (6, 3, 8, 6, 3, 8), "absorbed": (4, 1, 16, 8, 1, 12), "expanded": (3, 3, 8, 4, 4, 8)}
# B, T, S, K; T < S are sampled queries
SIZES = {"odd": (2, 37, 83, 9), "square": (1, 40, 40, 50), "one": (2, 1, 30, 7)}
SEVERAL_BLOCKS = (1, 150, 2100, 60)


def index_inputs(sizes, heads, dtype=torch.float32, shifted=True):
    (B, T, S, _), (J, index_keys, E, *_) = sizes, heads
    shapes = [(B, T, J, E), (B, S, index_keys, E), (B, T, J), (B, T, J)]
    tensors = [normal(*shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]
    return tensors if shifted else [*tensors[:3], None]


def attention_inputs(sizes, heads, dtype=torch.float32):
    (B, T, S, _), (*_, H, G, D) = sizes, heads
    return normal(B, T, H, D, seed=7, dtype=dtype), normal(B, S, G, D, seed=8, dtype=dtype)


def operations(sizes):
    B, T, S, K = sizes
    return {
        "interval": (indexer_loss, indexer_loss_reference, ragged(B, T, S)),
        "selected": (
            indexer_loss_selected,
            indexer_loss_selected_reference,
            (random_selection(B, T, S, min(K, S)),),
        ),
    }


def gradients_of(kl_BT, index):
    leaves = [x for x in index if x is not None]
    return torch.autograd.grad((kl_BT * normal(*kl_BT.shape, seed=3).to(kl_BT.dtype)).sum(), leaves)


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", ["interval", "selected"])
def test_matches_the_reference_forward_and_backward(name, sizes, heads, dtype, shifted):
    check_against_reference(name, sizes, heads, dtype, shifted)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("name", ["interval", "selected"])
def test_matches_the_reference_over_several_blocks(name, heads, monkeypatch):
    monkeypatch.setattr("fulmen.ops.losses.indexer.torch_blocked.LOSS_BLOCK_NUMBERS", 1)
    check_against_reference(name, SEVERAL_BLOCKS, heads, torch.float32, shifted=True)


# softcap, whether there are sinks
@pytest.mark.parametrize(("softcap", "has_sinks"), [(1.5, False), (None, True), (1.5, True)])
@pytest.mark.parametrize("name", ["interval", "selected"])
def test_capped_logits_and_sinks_match_the_reference(name, softcap, has_sinks):
    sinks = normal(6, seed=9) + 1 if has_sinks else None
    check_against_reference(name, SIZES["odd"], HEADS["grouped"], torch.float32, True, softcap, sinks)


def test_with_sinks_the_target_is_what_they_leave_to_the_keys():
    index, (q, k) = (
        index_inputs(SIZES["square"], HEADS["grouped"]),
        attention_inputs(SIZES["square"], HEADS["grouped"]),
    )
    sinks, keys = normal(6, seed=9), causal(1, 40, 40)
    found = indexer_loss_reference(*index, q, k, *keys, 0.3, 1.5, sinks)
    logits_HTS = 1.5 * torch.tanh(
        torch.einsum("thd,shd->hts", q[0], k[0].repeat_interleave(2, 1)) * 0.3 / 1.5
    )
    weights_HTS = logits_HTS.exp().tril()
    left_TS = (weights_HTS / (weights_HTS.sum(-1, keepdim=True) + sinks.exp()[:, None, None])).mean(0)
    assert_near(found.target_BTS[0], left_TS / left_TS.sum(-1, keepdim=True), torch.float32)
    assert (found.loss.kl_BT >= -1e-6).all()
    mean_TS = mean_attention(q[0], k[0], keys[0][0], keys[1][0], 0.3, 1.5, sinks)
    assert_near(mean_TS, found.target_BTS[0], torch.float32)


def test_sinks_that_leave_nothing_ask_for_nothing():
    index, attention = (
        index_inputs(SIZES["odd"], HEADS["grouped"]),
        attention_inputs(SIZES["odd"], HEADS["grouped"]),
    )
    keys = causal(2, 37, 83)
    for operation in (indexer_loss, lambda *inputs: indexer_loss_reference(*inputs).loss):
        loss = operation(*index, *attention, *keys, 0.3, None, torch.full((6,), 1e4))
        assert (loss.kl_BT == 0).all()


def check_against_reference(name, sizes, heads, dtype, shifted, *changes):
    operation, reference, keys = operations(sizes)[name]
    index, attention = index_inputs(sizes, heads, dtype, shifted), attention_inputs(sizes, heads, dtype)
    expected = reference(*index, *attention, *keys, 0.3, *changes).loss
    loss = operation(*index, *attention, *keys, 0.3, *changes)
    tight = torch.float32 if dtype == torch.bfloat16 else dtype
    assert loss.kl_BT.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_near(loss.kl_BT, expected.kl_BT, tight)
    assert_near(loss.target_entropy_BT, expected.target_entropy_BT, tight)
    wanted = gradients_of(expected.kl_BT, index)
    for gradient, want in zip(gradients_of(loss.kl_BT, index), wanted, strict=True):
        assert gradient.dtype == dtype
        assert_near(gradient, want, dtype)


def test_agrees_with_torch_kl_div():
    sizes, heads = (1, 12, 12, 1), HEADS["grouped"]
    q, k, w, b = index_inputs(sizes, heads)
    attn_q, attn_k = attention_inputs(sizes, heads)
    start, stop = causal(1, 12, 12)
    loss = indexer_loss(q, k, w, b, attn_q, attn_k, start, stop, 0.3)
    past = torch.ones(12, 12, dtype=torch.bool).tril()
    logits = torch.einsum("thd,shd->hts", attn_q[0], attn_k[0].repeat_interleave(2, 1)) * 0.3
    target = logits.masked_fill(~past, -torch.inf).softmax(-1).mean(0)
    heads_logits = torch.einsum("tje,sje->tjs", q[0], k[0].repeat_interleave(2, 1)) * 8**-0.5
    scores = (w[0, ..., None] * (heads_logits + b[0, ..., None]).relu()).sum(1)
    log_index = scores.masked_fill(~past, -1e30).log_softmax(-1)
    expected = torch.nn.functional.kl_div(log_index, target, reduction="none").sum(-1)
    assert_near(loss.kl_BT[0], expected, torch.float32)


@pytest.mark.parametrize("name", ["interval", "selected"])
def test_only_the_indexer_gets_gradients(name):
    sizes, heads = SIZES["odd"], HEADS["grouped"]
    operation, _, keys = operations(sizes)[name]
    index = index_inputs(sizes, heads)
    attention = [x.requires_grad_() for x in attention_inputs(sizes, heads)]
    loss = operation(*index, *attention, *keys, 0.3)
    assert not loss.target_entropy_BT.requires_grad
    loss.kl_BT.sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in index)
    assert all(x.grad is None for x in attention)


@pytest.mark.parametrize("name", ["interval", "selected"])
def test_is_never_negative_and_zero_without_a_choice(name):
    sizes, heads = (2, 30, 60, 9), HEADS["grouped"]
    operation, _, keys = operations(sizes)[name]
    index, attention = index_inputs(sizes, heads), attention_inputs(sizes, heads)
    loss = operation(*index, *attention, *keys, 0.3)
    assert (loss.kl_BT > -1e-6).all()
    for n_keys in (0, 1):
        if name == "interval":
            few = (torch.full((2, 30), 5), torch.full((2, 30), 5 + n_keys))
        else:
            few = (torch.full((2, 30, 4), -1).index_fill(2, torch.arange(n_keys), 5),)
        kl, entropy = operation(*index, *attention, *few, 0.3)
        assert torch.equal(kl, torch.zeros_like(kl))
        assert torch.equal(entropy, torch.zeros_like(entropy))
        kl.sum().backward()
        assert all(x.grad is None or not x.grad.any() for x in index)


def test_selecting_the_whole_interval_gives_the_loss_over_the_interval():
    sizes, heads = (2, 20, 50, 1), HEADS["grouped"]
    index, attention = index_inputs(sizes, heads), attention_inputs(sizes, heads)
    start, stop = causal(2, 20, 50)
    everything = torch.arange(50).expand(2, 20, 50)
    topk = everything.masked_fill(everything >= stop[..., None], -1).flip(-1)
    over_interval = indexer_loss(*index, *attention, start, stop, 0.3)
    over_selection = indexer_loss_selected(*index, *attention, topk, 0.3)
    for one, other in zip(over_interval, over_selection, strict=True):
        assert_near(one, other, torch.float32)


def test_sampled_queries_have_the_loss_they_have_among_all():
    sizes, heads = (1, 40, 40, 1), HEADS["grouped"]
    (q, k, w, b), (attn_q, attn_k) = index_inputs(sizes, heads), attention_inputs(sizes, heads)
    start, stop = causal(1, 40, 40)
    rows = torch.tensor([3, 17, 18, 39])
    everything = indexer_loss(q, k, w, b, attn_q, attn_k, start, stop, 0.3)
    sampled = indexer_loss(
        q[:, rows], k, w[:, rows], b[:, rows], attn_q[:, rows], attn_k, start[:, rows], stop[:, rows], 0.3
    )
    assert_near(sampled.kl_BT, everything.kl_BT[:, rows], torch.float32)


@pytest.mark.parametrize("name", ["interval", "selected"])
def test_nan_outside_a_querys_keys_does_not_leak(name):
    sizes, heads = (1, 20, 40, 9), HEADS["grouped"]
    operation, _, _ = operations(sizes)[name]
    index, attention = index_inputs(sizes, heads), attention_inputs(sizes, heads)
    # The first ten queries see keys 0..19, the others 20..39: one block, two documents.
    start = torch.where(torch.arange(20) < 10, 0, 20)[None]
    keys = (start, start + 20) if name == "interval" else (start[..., None] + torch.arange(0, 18, 2),)
    clean = operation(*index, *attention, *keys, 0.3)
    wanted = torch.autograd.grad(clean.kl_BT[:, 10:].sum(), index)
    bad_k, bad_attn_k = index[1].detach().clone(), attention[1].clone()
    bad_k[:, 4], bad_attn_k[:, 6] = torch.nan, torch.nan
    bad_index = [index[0], bad_k.requires_grad_(), *index[2:]]
    loss = operation(*bad_index, attention[0], bad_attn_k, *keys, 0.3)
    assert torch.equal(loss.kl_BT[:, 10:], clean.kl_BT[:, 10:])
    assert loss.kl_BT[:, :10].isnan().all()
    for gradient, want in zip(torch.autograd.grad(loss.kl_BT[:, 10:].sum(), bad_index), wanted, strict=True):
        rows = slice(20, 40) if gradient.shape[1] == 40 else slice(10, 20)
        assert_near(gradient[:, rows], want[:, rows], torch.float32)


@pytest.mark.parametrize("name", ["interval", "selected"])
def test_gradcheck(name):
    sizes, heads = (1, 3, 6, 3), (4, 2, 3, 4, 2, 3)
    operation, _, _ = operations(sizes)[name]
    index = index_inputs(sizes, heads, torch.float64)
    attention = attention_inputs(sizes, heads, torch.float64)
    keys = {
        "interval": causal(1, 3, 6),
        "selected": (torch.tensor([[[4, 0, -1], [-1, -1, 2], [5, 1, 3]]]),),
    }[name]
    assert torch.autograd.gradcheck(lambda *index: operation(*index, *attention, *keys, 0.7).kl_BT, index)


def test_views_and_autocast():
    sizes, heads = SIZES["odd"], HEADS["grouped"]
    index, attention = index_inputs(sizes, heads), attention_inputs(sizes, heads)
    interval = ragged(2, 37, 83)
    plain = indexer_loss(*index, *attention, *interval, 0.3)
    views = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (*index, *attention, *interval)]
    assert_near(indexer_loss(*views, 0.3).kl_BT, plain.kl_BT, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = indexer_loss(*index, *attention, *interval, 0.3)
        gradients_of(mixed.kl_BT, index)
    q, k, *weights = index
    rounded = indexer_loss(
        q.bfloat16(), k.bfloat16(), *weights, *(x.bfloat16() for x in attention), *interval, 0.3
    )
    assert torch.equal(mixed.kl_BT, rounded.kl_BT)
