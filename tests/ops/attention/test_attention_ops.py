"""Dense and sparse attention against their specification, and what both promise."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fulmen.ops.attention.dense import dense_attention
from fulmen.ops.attention.dense.reference import dense_attention_reference
from fulmen.ops.attention.sparse import sparse_attention
from fulmen.ops.attention.sparse.reference import sparse_attention_reference
from fulmen.ops.dispatch import pin_backend
from tests.ops.ops_cases import (
    EACH_BACKEND_AND_DTYPE,
    assert_near,
    causal,
    gradients,
    normal,
    ragged,
    random_selection,
    with_gradients,
)

pytestmark = pytest.mark.usefixtures("backend")

# H, G, D, V: grouped, one key head for many queries (absorbed latents), as many key heads (expanded latents)
HEADS = {"grouped": (6, 2, 8, 8), "absorbed": (4, 1, 12, 8), "expanded": (3, 3, 12, 7)}
# B, T, S, K: odd sizes; one query; many tiles of keys and blocks of queries
SIZES = {"odd": (2, 37, 83, 9), "decode": (2, 1, 83, 9), "long": (1, 70, 1500, 150)}


def inputs(sizes, heads, dtype=torch.float32, seed=0):
    (B, T, S, _), (H, G, D, V) = sizes, heads
    shapes = [(B, T, H, D), (B, S, G, D), (B, S, G, V)]
    return tuple(normal(*s, seed=seed + i, dtype=dtype).requires_grad_() for i, s in enumerate(shapes))


def operations(sizes, seed=0):
    """(operation, reference, keys of each query) for dense and sparse attention."""
    B, T, S, K = sizes
    return {
        "dense": (dense_attention, dense_attention_reference, ragged(B, T, S, seed)),
        "sparse": (sparse_attention, sparse_attention_reference, (random_selection(B, T, S, K, seed),)),
    }


@cache  # for all backends
def expected_of(name, sizes, heads, dtype):
    """out, lse and the gradients of both by the reference."""
    _, reference, keys = operations(sizes)[name]
    qkv = inputs(sizes, heads, dtype)
    found = reference(*qkv, *keys, 0.3)
    return with_gradients((found.out_BTHV, found.lse_BTH), qkv)


@EACH_BACKEND_AND_DTYPE
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_matches_the_reference_forward_and_backward(name, sizes, heads, dtype):
    operation, _, keys = operations(sizes)[name]
    qkv = inputs(sizes, heads, dtype)
    out, lse = operation(*qkv, *keys, 0.3)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for found, want in zip(
        with_gradients((out, lse), qkv), expected_of(name, sizes, heads, dtype), strict=True
    ):
        assert_near(found, want, dtype)


# T, S: fewer queries than torch's kernel is used for, just enough, a whole text, a chunk with a past
CHUNKS = {"few": (15, 40), "enough": (16, 40), "whole": (60, 60), "chunk": (33, 300)}


@cache  # for all backends
def expected_of_chunk(T, S, heads, dtype):
    """out, lse and the gradients of both by the reference."""
    qkv = inputs((2, T, S, 1), heads, dtype)
    found = dense_attention_reference(*qkv, *causal(2, T, S), 0.3)
    return with_gradients((found.out_BTHV, found.lse_BTH), qkv)


@EACH_BACKEND_AND_DTYPE
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)
def test_causal_chunks_match_the_reference_forward_and_backward(sizes, heads, dtype):
    T, S = sizes
    qkv, interval = inputs((2, T, S, 1), heads, dtype), causal(2, T, S)
    expected = expected_of_chunk(T, S, heads, dtype)
    found = dense_attention(*qkv, *interval, 0.3)
    assert [x.dtype for x in found] == [dtype, expected[1].dtype]
    for a, b in zip(with_gradients(found, qkv), expected, strict=True):
        assert_near(a, b, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [1, 40], ids=["decode", "chunk"])
@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_a_query_whose_scores_are_all_minus_infinity_is_no_number(name, queries, dtype):
    """Nor 0, which an empty set gives."""
    q, k, v = (x.detach() for x in inputs((1, queries, 40, 1), HEADS["grouped"], dtype))
    row = queries // 2
    q[:, row] = 0
    q[:, row, :3, 0] = -torch.inf  # the heads of one key head
    k[..., 0] = 1
    interval = causal(1, queries, 40)
    selection = torch.arange(40).expand(1, queries, 40)
    selection = selection.masked_fill(selection >= interval[1][..., None], -1).int()
    given = interval if name == "dense" else (selection,)
    operation, reference, _ = operations((1, queries, 40, 1))[name]
    out, lse = operation(q, k, v, *given, 1.0)
    expected = reference(q, k, v, *given, 1.0)
    assert_near(out, expected.out_BTHV, dtype)
    assert out[:, row, :3].isnan().all()
    assert not lse[:, row, :3].isfinite().any()
    assert out[:, row, 3:].isfinite().all()


@pytest.mark.parametrize("queries", [20, 60])
@pytest.mark.parametrize(
    ("start", "stop"), [(0, -1), (1, 0), (-3, 0)], ids=["less", "windowed", "before the first"]
)
def test_intervals_that_are_nearly_causal_are_kept_to(queries, start, stop):
    q, k, v = inputs((2, queries, 60, 1), HEADS["grouped"])
    interval = [x.clone() for x in causal(2, queries, 60)]
    interval[0][1, 7] += start
    interval[1][1, 7] += stop
    expected = dense_attention_reference(q, k, v, *interval, 0.3)
    out, lse = dense_attention(q, k, v, *interval, 0.3)
    assert_near(out, expected.out_BTHV, torch.float32)
    assert_near(lse, expected.lse_BTH, torch.float32)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("poisoned", [1, 2], ids="kv")
def test_a_bad_key_makes_nan_of_no_query_of_a_chunk_before_it(poisoned, poison):
    clean, interval = inputs((1, 40, 60, 1), HEADS["grouped"]), causal(1, 40, 60)
    bad = [x.detach().clone() for x in clean]
    bad[poisoned][:, 50] = poison
    out, _ = dense_attention(*clean, *interval, 0.3)
    found, _ = dense_attention(*bad, *interval, 0.3)
    assert_near(found[:, :30], out[:, :30], torch.float32)
    assert not found[:, 30:].isfinite().any()


@settings(max_examples=25)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 20), st.integers(1, 22), st.integers(0, 999))
def test_any_small_shape_matches_the_reference(groups, queries, keys, topk, seed):
    sizes, heads = (1, queries, keys, min(topk, keys)), (groups * 2, groups, 4, 3)
    qkv = inputs(sizes, heads, torch.float64, seed)
    for operation, reference, visible in operations(sizes, seed).values():
        expected = reference(*qkv, *visible, 0.5)
        out, lse = operation(*qkv, *visible, 0.5)
        assert_near(out, expected.out_BTHV, torch.float64)
        assert_near(lse, expected.lse_BTH, torch.float64)


def test_selecting_everything_is_dense_attention_bit_for_bit_in_the_reference():
    sizes = (2, 20, 33, 40)
    q, k, v = inputs(sizes, HEADS["grouped"])
    start, stop = causal(2, 20, 33)
    everything = torch.arange(33).expand(2, 20, 33)
    topk = everything.masked_fill(everything >= stop[..., None], -1).flip(-1)
    with pin_backend("reference"):
        dense, sparse = dense_attention(q, k, v, start, stop, 0.3), sparse_attention(q, k, v, topk, 0.3)
    assert torch.equal(dense[0], sparse[0])
    assert torch.equal(dense[1], sparse[1])
    blocked = sparse_attention(q, k, v, topk, 0.3)
    assert_near(blocked[0], dense[0], torch.float32)
    assert_near(blocked[1], dense[1], torch.float32)


def test_agrees_with_torch_attention_on_a_causal_sequence():
    q, k, v = inputs((2, 50, 50, 1), HEADS["grouped"])
    out, _ = dense_attention(q, k, v, *causal(2, 50, 50), 8**-0.5)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    assert_near(out, theirs.transpose(1, 2), torch.float32)


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_a_query_without_keys_gives_zero_and_touches_nothing(name):
    sizes = (1, 5, 12, 3)
    q, k, v = inputs(sizes, HEADS["grouped"])
    operation = operations(sizes)[name][0]
    nothing = {
        "dense": (torch.full((1, 5), 7), torch.full((1, 5), 7)),
        "sparse": (torch.full((1, 5, 3), -1),),
    }[name]
    out, lse = operation(q, k, v, *nothing, 0.3)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_packed_and_left_padded_documents_match_each_document_alone():
    q, k, v = inputs((1, 50, 50, 1), HEADS["grouped"])
    documents = [slice(13, 14), slice(14, 50)]  # after 13 positions of padding
    start, stop = causal(1, 50, 50)
    start, stop = start.clone(), stop.clone()
    stop[:, :13] = 0
    for document in documents:
        start[:, document] = document.start
    packed, _ = dense_attention(q, k, v, start, stop, 0.3)
    assert torch.equal(packed[:, :13], torch.zeros_like(packed[:, :13]))
    for document in documents:
        length = document.stop - document.start
        alone, _ = dense_attention(*(x[:, document] for x in (q, k, v)), *causal(1, length, length), 0.3)
        assert_near(packed[:, document], alone, torch.float32)


@pytest.mark.parametrize("name", ["dense", "sparse"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_nan_in_keys_nobody_sees_does_not_leak(name, sizes):
    _, T, S, _ = sizes
    operation, _, visible = operations(sizes)[name]
    q, k, v = inputs(sizes, HEADS["grouped"])
    clean = operation(q, k, v, *visible, 0.3)
    clean_gradients = gradients(clean, (q, k, v))
    # Rows of the second half of the queries see the poison, if any row does; the first half must not.
    seen = operation_mask(name, visible, S)
    poisoned_S = ~seen[0, : max(T // 2, 1)].any(0)
    bad_k, bad_v = k.detach().clone(), v.detach().clone()
    bad_k[0, poisoned_S], bad_v[0, poisoned_S] = torch.nan, torch.inf
    bad_k.requires_grad_(), bad_v.requires_grad_()
    out, lse = operation(q, bad_k, bad_v, *visible, 0.3)
    safe_BT = ~(seen & poisoned_S).any(-1)
    safe_BT[1:] = True
    assert poisoned_S.any()
    assert torch.equal(out[safe_BT], clean[0][safe_BT])
    assert torch.equal(lse[safe_BT], clean[1][safe_BT])
    assert out[~safe_BT].isnan().all()
    if safe_BT.all():
        for gradient, want in zip(gradients((out, lse), (q, bad_k, bad_v)), clean_gradients, strict=True):
            assert torch.equal(gradient, want)


def operation_mask(name, visible, n_keys):
    reference = {"dense": dense_attention_reference, "sparse": sparse_attention_reference}[name]
    B, T = visible[0].shape[:2]
    empty = torch.zeros(B, T, 1, 0), torch.zeros(B, n_keys, 1, 0), torch.zeros(B, n_keys, 1, 0)
    return reference(*empty, *visible, 1.0).visible_BTS


@pytest.mark.parametrize("poisoned", [0, 1, 2], ids="qkv")
def test_gradients_of_a_document_ignore_nan_in_another(poisoned):
    clean = inputs((1, 20, 20, 1), HEADS["grouped"])
    _, stop = causal(1, 20, 20)
    start = torch.where(torch.arange(20) < 8, 0, 8)[None]
    bad = [x.detach().clone() for x in clean]
    bad[poisoned][:, 3] = torch.nan
    healthy = slice(8, 20)

    def healthy_gradients(qkv):
        out, _ = dense_attention(*qkv, start, stop, 0.3)
        return torch.autograd.grad(out[:, healthy].square().sum(), qkv)

    wanted = healthy_gradients(clean)
    for gradient, want in zip(healthy_gradients([x.requires_grad_() for x in bad]), wanted, strict=True):
        assert torch.equal(gradient[:, healthy], want[:, healthy])


def test_the_order_of_a_selection_does_not_matter():
    sizes = SIZES["odd"]
    q, k, v = inputs(sizes, HEADS["grouped"], torch.float64)
    topk = random_selection(*sizes)
    for rows in (slice(None), slice(0, 1)):
        first = sparse_attention(q[:, rows], k, v, topk[:, rows], 0.3)
        second = sparse_attention(q[:, rows], k, v, topk[:, rows].flip(-1).long(), 0.3)
        assert_near(first[0], second[0], torch.float64)
        assert_near(first[1], second[1], torch.float64)


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_memory_layout_does_not_matter(name):
    sizes = SIZES["odd"]
    operation, _, visible = operations(sizes)[name]
    q, k, v = inputs(sizes, HEADS["grouped"])
    layouts = [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),  # as caches keep it
        lambda x: torch.stack([x, x], 2)[:, :, 0],  # a slice
        lambda x: torch.stack([x, x], -1)[..., 1],  # strided in the last axis
    ]
    for layout in layouts:
        odd = tuple(layout(x).detach().requires_grad_() for x in (q, k, v))
        out = operation(*odd, *(x.transpose(0, 1).contiguous().transpose(0, 1) for x in visible), 0.3)
        assert_near(out[0], operation(q, k, v, *visible, 0.3)[0], torch.float32)
        wanted = gradients(operation(q, k, v, *visible, 0.3), (q, k, v))
        for gradient, want in zip(gradients(out, odd), wanted, strict=True):
            assert_near(gradient, want, torch.float32)


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(name):
    sizes = (3, 40, 60, 9)
    operation, _, visible = operations(sizes)[name]
    q, k, v = inputs(sizes, HEADS["grouped"])
    together = operation(q, k, v, *visible, 0.3)
    alone = operation(q[1:2], k[1:2], v[1:2], *(x[1:2] for x in visible), 0.3)
    assert torch.equal(together[0][1:2], alone[0])
    assert torch.equal(together[1][1:2], alone[1])


@pytest.mark.parametrize("backend", ["torch"], indirect=True)  # cpp has no kernels for float64
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_gradcheck(name, heads):
    sizes = (1, 3, 6, 3)
    H, G, D, V = heads
    qkv = inputs(sizes, (H, G, min(D, 3), min(V, 2)), torch.float64)
    operation, _, _ = operations(sizes)[name]
    visible = {"dense": causal(1, 3, 6), "sparse": (torch.tensor([[[4, 0, -1], [-1, -1, 2], [5, 1, 3]]]),)}[
        name
    ]
    assert torch.autograd.gradcheck(lambda *qkv: operation(*qkv, *visible, 0.7), qkv)


def test_very_different_logits_stay_finite():
    q, k, v = inputs((1, 30, 200, 1), HEADS["grouped"])
    out, lse = dense_attention(q * 1e3, k * 1e3, v, *causal(1, 30, 200), 1.0)
    assert out.isfinite().all()
    expected = dense_attention_reference(q * 1e3, k * 1e3, v, *causal(1, 30, 200), 1.0)
    torch.testing.assert_close(lse, expected.lse_BTH, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_autocast_takes_mixed_dtypes_and_keeps_float32_arithmetic(name):
    sizes = SIZES["odd"]
    operation, _, visible = operations(sizes)[name]
    q, k, v = inputs(sizes, HEADS["grouped"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = operation(q, k, v.bfloat16(), *visible, 0.3)
        gradients((out, lse), (q, k))
    plain = operation(q.bfloat16(), k.bfloat16(), v.bfloat16(), *visible, 0.3)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, plain[0])
    assert torch.equal(lse, plain[1])


def test_works_inside_the_models_own_checkpointing():
    sizes = SIZES["odd"]
    q, k, v = inputs(sizes, HEADS["grouped"])
    topk = random_selection(*sizes)
    plain = sparse_attention(q, k, v, topk, 0.3)
    again = torch.utils.checkpoint.checkpoint(sparse_attention, q, k, v, topk, 0.3, use_reentrant=False)
    for gradient, want in zip(gradients(again, (q, k, v)), gradients(plain, (q, k, v)), strict=True):
        assert torch.equal(gradient, want)


def test_no_queries_and_no_keys_are_allowed():
    q, k, v = torch.ones(2, 0, 2, 4), torch.ones(2, 5, 1, 4), torch.ones(2, 5, 1, 4)
    assert dense_attention(q, k, v, *causal(2, 0, 5), 1.0)[0].shape == (2, 0, 2, 4)
    assert sparse_attention(q, k, v, torch.ones(2, 0, 3, dtype=torch.int32), 1.0)[0].shape == (2, 0, 2, 4)
    q, k, v = torch.ones(2, 3, 2, 4), torch.ones(2, 0, 1, 4), torch.ones(2, 0, 1, 4)
    zero = torch.zeros(2, 3, dtype=torch.int64)
    assert torch.equal(dense_attention(q, k, v, zero, zero, 1.0)[0], torch.zeros(2, 3, 2, 4))
    assert torch.equal(
        sparse_attention(q, k, v, torch.zeros(2, 3, 0, dtype=torch.int32), 1.0)[0], torch.zeros(2, 3, 2, 4)
    )
