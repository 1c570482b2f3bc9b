"""Hazards of the selection itself, by every backend: ties, lost winners, batches, padding, replays."""

from functools import cache

import pytest
import torch

from fulmen.ops.attention.dense import dense_attention
from fulmen.ops.attention.sparse import sparse_attention
from fulmen.ops.dispatch import pin_backend
from fulmen.ops.scores import index_scores
from fulmen.ops.topk import index_topk, select_topk
from tests.conformance.hazard_cases import TOPK, best_by_hand, check_scores, index_case
from tests.ops.ops_cases import normal


def case_for(backend, dtype, tied):
    """Small where Triton is interpreted; several tiles of keys and blocks of queries elsewhere."""
    inputs = checked_case(dtype, tied, *((2, 150) if backend == "triton" else (26, 700)))
    return tuple(x.clone() for x in inputs)


@cache  # for all backends and hazards
def checked_case(dtype, tied, queries, keys):
    inputs = index_case(dtype, tied, queries, keys)
    with pin_backend("reference"):
        check_scores(index_scores(*inputs), *inputs[4:], TOPK, tied)
    return inputs


def cases_for(backend, dtype):
    return [case_for(backend, dtype, tied) for tied in ([True] if backend == "triton" else [False, True])]


def test_hazard_3_ties_have_one_winner_in_every_replay(backend, dtype):
    """Mutations, each for its backend, all in ops/topk but the last: `-s` for `s` in the sort key of
    reference.py; zeros for positions_S in _rank_scores of torch_blocked.py; `tl.cumsum(equal_C, 0) - equal_C`
    for equal_later_C in triton.py; the oldest ties taken in take_best of cpp/src/index_topk.cpp.
    """
    inputs = case_for(backend, dtype, tied=True)
    expected = best_by_hand(index_scores(*inputs), *inputs[4:], TOPK)
    for _ in range({"reference": 1, "triton": 2}.get(backend, 25)):
        assert torch.equal(index_topk(*inputs, TOPK), expected)


def hard_rows(S):
    """Scores as indexers make them, and worse, one row each."""
    numbers = normal(1, S, seed=5)[0]
    powers = torch.exp2(normal(1, S, seed=6)[0].mul(40).clamp(-126, 127))
    spike = torch.zeros(S)
    spike[S // 3] = 1e-45
    return {
        "attention-like": numbers.mul(3).exp(),
        "neighbours in float32": 1 + numbers.mul(300).round() * 2.0**-23,
        "plateau of zeros": numbers.relu() * -1,
        "of bfloat16 logits": numbers.bfloat16().float(),
        "huge range": powers * numbers.sign(),
        "denormal": numbers.mul(9).round() * 1e-45,
        "one least winner": spike,
        "rising": numbers.sort().values,
        "falling": numbers.sort(descending=True).values,
    }


@cache  # for all backends
def hard_case(S, topk):
    """Scores, start and stop, and what is to be selected."""
    scores = torch.stack(list(hard_rows(S).values()))[:, None]
    start = torch.full((len(scores), 1), 7)
    stop = torch.full_like(start, S - 5)
    return scores, start, stop, best_by_hand(scores, start, stop, topk)


@pytest.mark.parametrize("topk", [1, 64, 500])
def test_hazard_4_no_winner_is_lost(backend, topk, monkeypatch):
    """Mutations: `scores_TS.bfloat16()` in _rank_scores of topk/torch_blocked.py; `bits &= ~0xffff` in
    rank_scores of cpp/src/index_topk.cpp; `& 0xFFFFFF00` on the ranks in _load_ranks of
    topk/triton.py.
    """
    # Several blocks of any backend.
    S = 5000
    if backend == "triton":
        from fulmen.ops.triton_kit import KERNEL_SIZES

        S = 700
        monkeypatch.setitem(KERNEL_SIZES["select"], "columns", 256)
    *inputs, expected = hard_case(S, topk)
    found = select_topk(*inputs, topk)
    wrong = [
        name for name, one, other in zip(hard_rows(S), found, expected, strict=True) if not one.equal(other)
    ]
    assert not wrong


def test_hazard_5_a_row_selects_alike_alone_and_in_a_batch(backend, dtype):
    """Alone means without its padding and without the other queries, as a server would meet it.

    Mutations: `start_BT.amin(0)` for start_BT[b] in index_topk_blocked (ops/topk/torch_blocked.py), or for
    start_BT in call_index_kernel (ops/scores/cpp.py): every row sees what the longest one does.
    """
    for q, k, w, b, start, stop in cases_for(backend, dtype):
        together = index_topk(q, k, w, b, start, stop, TOPK)
        for row, t in [(0, 0), (1, 1), (2, q.shape[1] - 1)]:
            one = (slice(row, row + 1), slice(t, t + 1))
            first, last = int(start[row, t]), int(stop[row, t])
            keys = k[one[0], first:last].clone()
            ends = (start[one] - first, stop[one] - first)
            alone = index_topk(q[one], keys, w[one], b[one], *ends, TOPK)
            assert torch.equal(alone + first, together[one])
            if backend in ("cpp", "triton"):  # these promise the bits of every score, in any company
                scores = index_scores(q[one], keys, w[one], b[one], *ends)
                assert torch.equal(scores, index_scores(q, k, w, b, start, stop)[one][..., first:last])


def test_hazard_9_hidden_keys_and_missing_ones_are_never_read(backend, dtype):
    """Mutations: 0 for n_keys where _union_of_selected (ops/common/tiles.py) fills what is nothing; `key_K
    >= -1` in load_selected (ops/triton_kit.py); max(..., 0) counted in keys_of (cpp/src/attention.h);
    `topk.clamp(min=0)` in selection_mask (ops/common/intervals.py, of the reference).
    """
    for q, k, w, b, start, stop in cases_for(backend, dtype):
        # The first queries of each row see fewer than TOPK keys, one none; none sees key 0 or the last.
        stop = torch.minimum(stop, start + torch.arange(q.shape[1]) * (5 if q.shape[1] < 9 else 1))
        stop[:, -1] = k.shape[1] - 2
        topk = index_topk(q, k, w, b, start, stop, TOPK)
        for row in range(len(q)):
            for t in range(q.shape[1]):
                seen = range(int(start[row, t]), int(stop[row, t]))
                if len(seen) <= TOPK:
                    assert topk[row, t].tolist() == [*seen] + [-1] * (TOPK - len(seen))
        positions = torch.arange(k.shape[1])
        hidden = (positions < start.min(1).values[:, None]) | (positions >= stop.max(1).values[:, None])
        unread = torch.ones(len(k), k.shape[1] + 1, dtype=torch.bool).scatter_(
            1, topk.flatten(1).long().masked_fill(topk.flatten(1) < 0, k.shape[1]), False
        )[:, :-1]
        heads = [normal(*k.shape[:2], 2, 16, seed=seed).to(dtype) for seed in (8, 9)]
        plain = sparse_attention(q, *heads, topk, 0.3)
        dense = dense_attention(q, *heads, start, stop, 0.3) if backend != "triton" else None
        for poison in (torch.nan, torch.inf, -torch.inf)[: 3 if backend in ("torch", "cpp") else 1]:
            bad = k.masked_fill(hidden[..., None, None], poison)
            assert torch.equal(index_topk(q, bad, w, b, start, stop, TOPK), topk)
            bad_heads = [x.masked_fill(unread[..., None, None], poison) for x in heads]
            found = sparse_attention(q, *bad_heads, topk, 0.3)
            assert all(torch.equal(*pair) for pair in zip(found, plain, strict=True))
            if dense:
                bad_heads = [x.masked_fill(hidden[..., None, None], poison) for x in heads]
                found = dense_attention(q, *bad_heads, start, stop, 0.3)
                assert all(torch.equal(*pair) for pair in zip(found, dense, strict=True))
        assert not plain[0][:, 0].any()


def test_hazard_10_several_queries_select_as_one_by_one(backend, dtype):
    """The chunk reads keys that lie beyond the first of its queries.

    Mutations: `stop_T.max()` for every query in IntervalBlock.tile (ops/common/tiles.py); the last query's
    stop for all in make_block (cpp/src/index_topk.cpp).
    """
    for q, k, w, b, start, stop in cases_for(backend, dtype):
        chunk = index_topk(q, k, w, b, start, stop, TOPK)
        for t in range(0, q.shape[1], 1 if backend == "triton" else 6):
            one = (slice(None), slice(t, t + 1))
            past = slice(0, int(stop[0, t]))
            step = index_topk(q[one], k[:, past], w[one], b[one], start[one], stop[one], TOPK)
            assert torch.equal(step, chunk[one])


@pytest.fixture
def _poisoned_memory():
    """Fresh tensors hold NaN and the largest integers: what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_poisoned_memory")
def test_hazard_8_buffers_filled_anew_are_selected_from_anew(backend):
    """As a captured graph has it: the inputs' memory stays, its contents change between replays.

    Mutations: index_topk_cpp keeps its results in a dict by the inputs' data_ptr() (ops/topk/
    cpp.py); take_all left out of fulmen_index_topk (cpp/src/index_topk.cpp), or without its -1 in
    topk/triton.py: then the poison shows.
    """
    contents = [case_for(backend, torch.float32, tied) for tied in (False, True)]
    contents = [(*case, normal(*case[1].shape[:2], 2, 16, seed=8)) for case in contents]
    contents[1][5][:] = contents[1][4] + torch.arange(contents[1][5].shape[1]) * 4  # short rows too
    buffers = [x.clone() for x in contents[0]]

    def step(q, k, w, b, start, stop, v):
        topk = index_topk(q, k, w, b, start, stop, TOPK)
        return topk, *sparse_attention(q, v, v, topk, 0.3)

    with pin_backend("reference"):
        expected = [step(*case) for case in contents]
    assert not torch.equal(expected[0][0], expected[1][0])
    for number in (0, 1, 0, 1):
        for buffer, new in zip(buffers, contents[number], strict=True):
            buffer.copy_(new)
        topk, out, lse = step(*buffers)
        assert torch.equal(topk, expected[number][0])
        torch.testing.assert_close(out, expected[number][1], rtol=2e-5, atol=5e-6)
        torch.testing.assert_close(lse, expected[number][2], rtol=2e-5, atol=5e-6)
