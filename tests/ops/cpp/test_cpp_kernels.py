"""What the C++ kernels promise beyond the other backends: bits that depend on nothing but the numbers."""

import os
import signal
import time
from functools import cache

import pytest
import torch

from fulmen.ops.attention import cpp
from fulmen.ops.attention.dense import dense_attention
from fulmen.ops.attention.sparse import sparse_attention
from fulmen.ops.attention.sparse.reference import sparse_attention_reference
from fulmen.ops.common.index_keys import pack_index_keys, unpack_index_keys
from fulmen.ops.cpp.library import cpp_simd
from fulmen.ops.dispatch import pin_backend
from fulmen.ops.scores import cpp as cpp_scores
from fulmen.ops.scores import index_scores
from fulmen.ops.topk import index_topk, select_topk
from tests.ops.cpp_levels import EACH_LEVEL, cpp_level
from tests.ops.ops_cases import (
    assert_near,
    causal,
    gradients,
    normal,
    ragged,
    random_selection,
    with_gradients,
)

THREADS = [2, 3, 7]
# H, G, D, V: SmolLM2's, absorbed latents, a single head
HEADS = [(9, 3, 64, 64), (16, 1, 40, 32), (1, 1, 5, 3), (8, 2, 16, 16)]
# J, I, E
INDEX_HEADS = [(9, 3, 24), (4, 1, 33), (2, 2, 8)]
# B, T, S, K: many queries of few keys
SHARED_KEYS = (2, 300, 90, 60)


@pytest.fixture(scope="module", autouse=True, params=EACH_LEVEL)
def _cpp(request):
    with cpp_level(request.param), pin_backend("cpp"):
        yield


@pytest.fixture
def _restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def attention_inputs(B, T, S, heads, dtype=torch.float32):
    H, G, D, V = heads
    shapes = [(B, T, H, D), (B, S, G, D), (B, S, G, V)]
    return tuple(normal(*s, seed=i, dtype=dtype).requires_grad_() for i, s in enumerate(shapes))


def index_inputs(B, T, S, heads, dtype=torch.float32):
    J, index_keys, E = heads
    shapes = [(B, T, J, E), (B, S, index_keys, E), (B, T, J), (B, T, J)]
    return [normal(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes)]


def everything(heads, index_heads):
    """Results of all kernels on one set of inputs."""
    B, T, S, K = 2, 50, 700, 40
    intervals = ragged(B, T, S)
    q, k, w, b = index_inputs(B, T, S, index_heads)
    index = (q, k, w, b)
    scores = index_scores(*index, *intervals)
    chosen = [index_topk(*index, *intervals, K), select_topk(scores, *intervals, K)]
    chosen += [index_scores(q, pack_index_keys(k), w, b, *intervals)]
    qkv = attention_inputs(B, T, S, heads)
    sparse = sparse_attention(*qkv, random_selection(B, T, S, K), 0.3)
    return [scores, *chosen, *sparse, *gradients(sparse, qkv), *dense_attention(*qkv, *intervals, 0.3)]


@pytest.mark.usefixtures("_restore_threads")
@pytest.mark.parametrize(("heads", "index_heads"), list(zip(HEADS, INDEX_HEADS, strict=False)))
def test_the_number_of_threads_changes_no_bit(heads, index_heads):
    torch.set_num_threads(1)
    alone = everything(heads, index_heads)
    for threads in THREADS:
        torch.set_num_threads(threads)
        for together, one in zip(everything(heads, index_heads), alone, strict=True):
            assert torch.equal(together, one)


@pytest.mark.parametrize("packed", [False, True], ids=["numbers", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", INDEX_HEADS)
def test_a_decoded_query_scores_and_selects_as_in_the_prefill(heads, dtype, packed):
    B, S = 2, 300
    q, k, w, b = index_inputs(B, S, S, heads, dtype)
    k = pack_index_keys(k) if packed else k
    start, stop = causal(B, S, S)
    scores, chosen = index_scores(q, k, w, b, start, stop), index_topk(q, k, w, b, start, stop, 16)
    for t in (0, 16, 17, 63, 64, 200, S - 1):
        # The cache then ends with the query's own key.
        row, past = slice(t, t + 1), slice(0, t + 1)
        inputs = (q[:, row], k[:, past], w[:, row], b[:, row], start[:, row], stop[:, row])
        assert torch.equal(index_scores(*inputs), scores[:, row, past])
        decoded = index_topk(*inputs, 16)
        assert torch.equal(decoded, chosen[:, row, : decoded.shape[-1]])


@pytest.mark.parametrize("heads", [*INDEX_HEADS, (9, 3, 48), (2, 1, 1030)])
def test_packed_keys_without_tiles_score_as_their_numbers(heads, monkeypatch):
    """Bit for bit, unless by integers: sums are exact, but a query has 22 bits below its largest number."""
    B, T, S = 2, 30, 300
    q, k, w, b = index_inputs(B, T, S, heads)
    packed, intervals = pack_index_keys(k), ragged(B, T, S)
    monkeypatch.setattr(cpp_scores, "has_tiles", lambda: False)
    numbers = index_scores(q, unpack_index_keys(packed), w, b, *intervals)
    found = index_scores(q, packed, w, b, *intervals)
    if "AVX512VNNI" not in cpp_simd() or heads[2] > 1024:
        assert torch.equal(found, numbers)
        return
    with pin_backend("reference"):
        exact = index_scores(
            q.double(), unpack_index_keys(packed).double(), w.double(), b.double(), *intervals
        )
    seen = exact.isfinite()
    error, of_numbers = ((x.double() - exact)[seen].square().mean().sqrt() for x in (found, numbers))
    assert 0 < error < 2.5 * of_numbers


@pytest.mark.parametrize("bits", [8, 15, 24])
def test_queries_of_few_and_of_many_digits_score_exactly(bits, monkeypatch):
    q, k, w, _ = index_inputs(1, 9, 100, (4, 2, 32))
    q = (q * 2 ** (bits - 3)).round()
    packed, ones, intervals = pack_index_keys(k), torch.ones_like(w), causal(1, 9, 100)
    k = unpack_index_keys(packed)
    monkeypatch.setattr(cpp_scores, "has_tiles", lambda: False)
    found = index_scores(q, packed, ones, None, *intervals)
    with pin_backend("reference"):
        exact = index_scores(*(x.double() for x in (q, k, ones)), None, *intervals)
        size = index_scores(*(x.double().abs() for x in (q, k, ones)), None, *intervals)
    seen = exact.isfinite()
    assert ((found.double() - exact).abs()[seen] < 3e-7 * size[seen]).all()


def test_a_query_that_is_no_number_makes_nan_of_its_own_scores_alone():
    q, k, w, b = index_inputs(1, 20, 70, INDEX_HEADS[0])
    packed, intervals = pack_index_keys(k), causal(1, 20, 70)
    expected = index_scores(q, packed, w, b, *intervals)
    for bad in (torch.nan, torch.inf):
        poisoned_q = q.clone()
        poisoned_q[0, 7, 4, 3] = bad
        scores = index_scores(poisoned_q, packed, w, b, *intervals)
        assert not scores[0, 7, :57].isfinite().any()
        scores[0, 7] = expected[0, 7]
        assert torch.equal(scores, expected)


def test_tiles_leave_torch_its_own():
    # Both sides use the CPU's matrix tiles, in shapes of their own, on one thread.
    x = normal(64, 256, dtype=torch.bfloat16)
    q, k, w, b = index_inputs(1, 20, 70, INDEX_HEADS[0])
    before = x @ x.T
    index_scores(q, pack_index_keys(k), w, b, *causal(1, 20, 70))
    assert torch.equal(x @ x.T, before)


@pytest.mark.parametrize("heads", HEADS)
def test_a_decoded_query_attends_as_in_the_prefill(heads):
    B, T, S = 2, 40, 400
    q, k, v = attention_inputs(B, T, S, heads)
    topk = random_selection(B, T, S, 150)
    start, stop = ragged(B, T, S)
    sparse, dense = sparse_attention(q, k, v, topk, 0.3), dense_attention(q, k, v, start, stop, 0.3)
    for t in (0, 1, T - 1):
        row = slice(t, t + 1)
        for alone, among in (
            (sparse_attention(q[:, row], k, v, topk[:, row], 0.3), sparse),
            (dense_attention(q[:, row], k, v, start[:, row], stop[:, row], 0.3), dense),
        ):
            assert torch.equal(alone[0], among[0][:, row])
            assert torch.equal(alone[1], among[1][:, row])


@cache  # for all levels
def expected_of_shared_keys(heads):
    """Gradients by the reference."""
    B, T, S, K = SHARED_KEYS
    qkv = attention_inputs(B, T, S, heads)
    found = sparse_attention_reference(*qkv, random_selection(B, T, S, K), 0.2)
    return gradients((found.out_BTHV, found.lse_BTH), qkv)


@pytest.mark.parametrize("heads", HEADS)
def test_gradients_match_the_reference_where_many_queries_share_keys(heads):
    B, T, S, K = SHARED_KEYS
    qkv, topk = attention_inputs(B, T, S, heads), random_selection(B, T, S, K)
    found = gradients(sparse_attention(*qkv, topk, 0.2), qkv)
    for gradient, want in zip(found, expected_of_shared_keys(heads), strict=True):
        torch.testing.assert_close(gradient, want, rtol=2e-5, atol=2e-5 * want.abs().max().item())


def alike_selection(B, T, S, K, seed=0):
    """As `random_selection`, from 2 K keys alone: neighbours have most of them in common."""
    few = torch.randperm(S, generator=torch.Generator().manual_seed(seed))[: 2 * K].sort().values
    chosen = random_selection(B, T, len(few), K, seed)
    return torch.where(chosen < 0, -1, few[chosen.clamp(min=0)]).int()


def many_queries(heads, queries):
    """bfloat16 queries, keys and values, and selections, two of them empty."""
    B, S, K = 2, 500, 90
    topk = alike_selection(B, queries, S, K)
    topk[:, 5:7], topk[:, 9, 1:] = -1, -1
    return attention_inputs(B, queries, S, heads, torch.bfloat16), topk


@cache  # for all levels
def expected_of_many(heads, queries):
    """out, lse and the gradients of both by the reference."""
    qkv, topk = many_queries(heads, queries)
    found = sparse_attention_reference(*qkv, topk, 0.3)
    return with_gradients((found.out_BTHV, found.lse_BTH), qkv)


# Tiles take bfloat16 queries by 16: just enough, a whole block and a part, several
@pytest.mark.parametrize("queries", [16, 23, 70])
@pytest.mark.parametrize("heads", [*HEADS, (3, 1, 96, 64), (20, 1, 80, 512)], ids=str)
def test_many_bfloat16_queries_match_the_reference(heads, queries, monkeypatch):
    qkv, topk = many_queries(heads, queries)
    out, lse, *expected = expected_of_many(heads, queries)
    found = sparse_attention(*qkv, topk, 0.3)
    assert_near(found[0], out, torch.bfloat16)
    assert_near(found[1], lse, torch.float32)
    for gradient, want in zip(gradients(found, qkv), expected, strict=True):
        torch.testing.assert_close(gradient, want, rtol=2e-2, atol=2e-2 * want.abs().max().item())
    monkeypatch.setattr(cpp, "has_tiles", lambda: False)
    for a, b in zip(sparse_attention(*qkv, topk, 0.3), found, strict=True):
        assert_near(a, b, torch.bfloat16)


@pytest.mark.usefixtures("_restore_threads")
def test_the_number_of_threads_changes_no_bit_of_many_bfloat16_queries():
    B, T, S, K = 2, 90, 500, 60
    qkv, topk = attention_inputs(B, T, S, HEADS[0], torch.bfloat16), alike_selection(B, T, S, K)
    # Some blocks select so little alike that they are computed query by query.
    topk[:, 32:48] = random_selection(B, 16, S, K)
    torch.set_num_threads(1)
    alone = sparse_attention(*qkv, topk, 0.3)
    for threads in THREADS:
        torch.set_num_threads(threads)
        for together, one in zip(sparse_attention(*qkv, topk, 0.3), alone, strict=True):
            assert torch.equal(together, one)


@pytest.mark.parametrize("poisoned", [0, 1, 2], ids="qkv")
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_poison_among_many_bfloat16_queries_stays_with_those_that_select_it(poisoned, poison):
    B, T, S, K = 1, 20, 200, 40
    clean, topk = attention_inputs(B, T, S, (4, 2, 32, 16), torch.bfloat16), alike_selection(B, T, S, K)
    key = int(topk[0, 3].max())
    bad = [x.detach().clone() for x in clean]
    bad[poisoned][:, 3 if poisoned == 0 else key] = poison
    affected = torch.arange(T) == 3 if poisoned == 0 else (topk[0] == key).any(-1)
    assert 0 < affected.sum() < T
    out, lse = sparse_attention(*clean, topk, 0.3)
    bad_out, bad_lse = sparse_attention(*bad, topk, 0.3)
    assert torch.equal(bad_out[:, ~affected], out[:, ~affected])
    assert torch.equal(bad_lse[:, ~affected], lse[:, ~affected])
    assert not bad_out[:, affected].isfinite().all(-1).any()


def test_many_bfloat16_queries_read_views():
    B, T, S, K = 2, 40, 300, 50
    q, k, v = attention_inputs(B, T, S, HEADS[0], torch.bfloat16)
    topk = alike_selection(B, T, S, K)
    expected = sparse_attention(q, k, v, topk, 0.3)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    for found, want in zip(sparse_attention(q, k, v, topk, 0.3), expected, strict=True):
        assert torch.equal(found, want)


def test_gradients_take_any_layout():
    qkv, topk = attention_inputs(2, 20, 50, HEADS[0]), random_selection(2, 20, 50, 9)
    out, lse = sparse_attention(*qkv, topk, 0.3)
    dout, dlse = normal(2, 9, 64, 20, seed=5).permute(0, 3, 1, 2), normal(9, 20, 2, seed=6).permute(2, 1, 0)
    plain = torch.autograd.grad((out, lse), qkv, (dout.contiguous(), dlse.contiguous()), retain_graph=True)
    strided = torch.autograd.grad((out, lse), qkv, (dout, dlse))
    for gradient, want in zip(strided, plain, strict=True):
        assert_near(gradient, want, torch.float32)


@pytest.mark.parametrize("poisoned", [0, 1, 2], ids="qkv")
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_poison_stays_with_the_queries_that_select_it(poisoned, poison):
    clean = attention_inputs(1, 20, 40, (4, 2, 16, 16))
    # The first 8 queries select among the first 20 keys, the others among the rest.
    topk = torch.stack([torch.randperm(20)[:7] + (0 if t < 8 else 20) for t in range(20)])[None]
    bad = [x.detach().clone() for x in clean]
    bad[poisoned][:, 3] = poison
    bad = [x.requires_grad_() for x in bad]
    (out, lse), (bad_out, bad_lse) = sparse_attention(*clean, topk, 0.3), sparse_attention(*bad, topk, 0.3)
    assert torch.equal(bad_out[:, 8:], out[:, 8:])
    assert torch.equal(bad_lse[:, 8:], lse[:, 8:])
    dq, dk, dv = torch.autograd.grad(bad_out.sum() + bad_lse.sum(), bad)
    wanted = torch.autograd.grad(out.sum() + lse.sum(), clean)
    assert torch.equal(dq[:, 8:], wanted[0][:, 8:])
    assert torch.equal(dk[:, 20:], wanted[1][:, 20:])
    assert torch.equal(dv[:, 20:], wanted[2][:, 20:])


@pytest.mark.parametrize("topk", [1, 7, 2999])
def test_selection_far_below_the_length_and_just_below_it(topk):
    scores = torch.cat([normal(1, 20, 3000), normal(1, 20, 3000).round(), normal(1, 20, 3000).relu()], 1)
    interval = causal(1, 60, 3000)
    with pin_backend("reference"):
        expected = select_topk(scores, *interval, topk)
    assert torch.equal(select_topk(scores, *interval, topk), expected)


@pytest.mark.parametrize("topk", [1, 300, 2048, 15000, 19999])
@pytest.mark.parametrize("kind", ["normal", "ascending", "ties", "one spike", "nan"])
def test_selection_from_long_rows(kind, topk):
    # Long enough for the threshold to be sought from a sample, which some of these rows mislead.
    S = 20_000
    numbers = normal(1, 2, S)
    scores = {
        "normal": numbers,
        "ascending": numbers.sort(-1).values,
        "ties": numbers.round(),
        "one spike": numbers.abs().masked_fill(torch.arange(S) % 39 == 0, -1),
        "nan": numbers.masked_fill(torch.arange(S) % 39 == 0, torch.nan),
    }[kind]
    interval = causal(1, 2, S)
    with pin_backend("reference"):
        expected = select_topk(scores, *interval, topk)
    assert torch.equal(select_topk(scores, *interval, topk), expected)


def test_threads_survive_a_fork():
    """A forked process inherits the team of threads without its threads."""
    inputs = (normal(1, 64, 4, 16), normal(1, 4096, 2, 16), normal(1, 64, 4), None, *causal(1, 64, 4096))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = index_topk(*inputs, 9)
        child = os.fork()
        if child == 0:
            os._exit(not torch.equal(index_topk(*inputs, 9), expected))
        for _ in range(600):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            time.sleep(0.1)
        else:
            os.kill(child, signal.SIGKILL)
        assert ended
        assert status == 0
    finally:
        torch.set_num_threads(threads)
