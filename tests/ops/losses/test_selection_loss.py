"""The selection loss: blocked against its reference, and what it means."""

import pytest
import torch

from fulmen.errors import ConfigError
from fulmen.ops.attention.dense import dense_attention
from fulmen.ops.attention.sparse import sparse_attention
from fulmen.ops.dispatch import pin_backend
from fulmen.ops.losses.selection import selection_loss
from fulmen.ops.losses.selection.reference import selection_loss_reference

SCALE, TEMPERATURE = 0.3, 0.4


def inputs(batch=2, queries=13, keys=41, heads=4, groups=2, width=8, value=6, dtype=torch.float64, seed=0):
    """Index and attention tensors, an output weight, and intervals with padding and an empty one."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    index = [
        random(batch, queries, heads, 4),
        random(batch, keys, groups, 4),
        random(batch, queries, heads).abs(),
    ]
    index = [x.requires_grad_(True) for x in (*index, random(batch, queries, heads))]
    attention = [random(batch, queries, heads, width), random(batch, keys, groups, width)]
    attention += [random(batch, keys, groups, value), random(10, heads * value)]
    stop = torch.arange(keys - queries, keys).expand(batch, -1) + 1
    start = torch.zeros_like(stop)
    start[-1] = 5
    stop = stop.clone()
    stop[-1, 0] = 3
    return index, attention, start, stop


def loss_of(index, attention, start, stop, topk=7, **changes):
    return selection_loss(*index, *attention, start, stop, topk, SCALE, TEMPERATURE, **changes)


def random_gate(attention, seed=1):
    """Of the outputs of all heads, between 0 and 1."""
    q, *_, out_weight = attention
    shape = (*q.shape[:2], out_weight.shape[1])
    gate = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return gate.to(q.dtype)


@pytest.mark.parametrize("has_gate", [False, True], ids=["plain", "gated output"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-4)])
def test_blocked_equals_reference_with_gradients(groups, dtype, tolerance, has_gate, monkeypatch):
    monkeypatch.setattr("fulmen.ops.losses.selection.torch_blocked.SELECTION_BLOCK_LOGITS", 500)
    monkeypatch.setattr("fulmen.ops.losses.selection.torch_blocked.LEAST_LOSS_ROWS", 3)
    case = inputs(groups=groups, dtype=dtype)
    gate = random_gate(case[1]) if has_gate else None
    results = []
    for backend in ("reference", "torch"):
        with pin_backend(backend):
            loss = loss_of(*case, out_gate_BTN=gate)
        results.append([loss.detach(), *torch.autograd.grad(loss.sum(), case[0])])
    for exact, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, exact, atol=tolerance, rtol=tolerance)


def test_capped_logits_and_sinks_are_those_of_attention():
    """At a low temperature the change is that of attention over the keys above the cut."""
    index, attention, start, stop = inputs(batch=1)
    changes = {"softcap": 1.5, "sinks_H": torch.tensor([0.5, -1, 2, 0], dtype=torch.float64)}
    with torch.no_grad():
        loss = selection_loss(*index, *attention, start, stop, 8, SCALE, 1e-9, **changes)
        steps = selection_loss_reference(*index, *attention, start, stop, 8, SCALE, 1e-9, **changes)
        kept = (steps.scores_BTS > steps.cut_BT[..., None]).int()
        selected = torch.where(kept > 0, torch.arange(41), -1)
        some = (SCALE, 1.5, changes["sinks_H"])
        sparse, _ = sparse_attention(*attention[:3], selected, *some)
        dense, _ = dense_attention(*attention[:3], start, stop, *some)
        sparse, dense = (x.flatten(2) @ attention[3].T for x in (sparse, dense))
    expected = (sparse - dense).square().sum(-1) / dense.square().sum(-1)
    sees_keys_T = stop[0] > start[0]
    torch.testing.assert_close(loss[0, sees_keys_T], expected[0, sees_keys_T], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_what_a_gate_on_the_output_closes_costs_nothing(backend):
    """One token's gate is its own output projection; a head that it closes has no say, nor gradient."""
    index, attention, start, stop = inputs(batch=1)
    gate = random_gate(attention)
    with pin_backend(backend):
        gated = loss_of(index, attention, start, stop, out_gate_BTN=gate)
        for t in (4, 9):
            of_token = [*attention[:3], attention[3] * gate[0, t]]
            assert torch.allclose(gated[0, t], loss_of(index, of_token, start, stop)[0, t], rtol=1e-9)
        one_head = torch.zeros_like(gate)
        one_head[..., :6] = 1
        found = loss_of(index, attention, start, stop, out_gate_BTN=one_head)
        first = [attention[0][:, :, :1], *(x[:, :, :1] for x in attention[1:3]), attention[3][:, :6]]
        expected = loss_of(index, first, start, stop)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(x.sum(), index) for x in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(gated, loss_of(index, attention, start, stop), rtol=0.1)


@pytest.mark.parametrize("has_gate", [False, True], ids=["plain", "gated output"])
def test_gradcheck(has_gate):
    index, attention, start, stop = inputs(batch=1, queries=3, keys=9, heads=2, groups=1)
    gate = random_gate(attention) if has_gate else None
    assert torch.autograd.gradcheck(
        lambda *x: loss_of(x, attention, start, stop, 4, out_gate_BTN=gate), index, atol=1e-6
    )


def test_nothing_changes_where_all_keys_are_kept_or_none_is_seen():
    index, attention, start, stop = inputs()
    assert loss_of(index, attention, start, stop, topk=41).abs().max() == 0
    loss = loss_of(index, attention, start, stop, topk=7)
    assert loss[-1, 0] == 0
    assert torch.isfinite(torch.autograd.grad(loss.sum(), index)[0]).all()


def test_a_hard_cut_is_the_change_of_true_top_k_attention():
    """At a low temperature the gate keeps exactly the keys above the cut."""
    index, attention, start, stop = inputs(batch=1)
    steps = selection_loss_reference(*index, *attention, start, stop, 7, SCALE, 1e-9)
    kept = (steps.scores_BTS > steps.cut_BT[..., None]) & (steps.scores_BTS > -torch.inf)
    q, k, v, _ = attention
    logits = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) * SCALE
    probs = logits.masked_fill(~kept[:, None], -torch.inf).softmax(-1)
    out = torch.einsum("bhts,bshv->bthv", probs, v.repeat_interleave(2, 2))
    rows = kept.any(-1)
    torch.testing.assert_close(steps.gated_BTHV[rows], out[rows])


def test_keeping_what_attention_reads_costs_less_than_keeping_the_rest():
    _, attention, start, stop = inputs(batch=1, heads=2, groups=2, width=4, seed=3)
    q, k = attention[0] * 4, attention[1]
    faithful = (q, k, torch.ones(*q.shape[:3], dtype=q.dtype), None)
    losses = [
        selection_loss(q * sign, *faithful[1:], q, k, *attention[2:], start, stop, 7, 0.5, 0.1).mean()
        for sign in (1, -1)
    ]
    assert losses[0] < 0.3 * losses[1]


def test_memory_stays_in_blocks_and_attention_gets_no_gradient():
    index, attention, start, stop = inputs()
    attention = [x.requires_grad_(True) for x in attention]
    gate = random_gate(attention).requires_grad_(True)
    loss_of(index, attention, start, stop, out_gate_BTN=gate).sum().backward()
    assert all(x.grad is None for x in (*attention, gate))
    assert all(x.grad is not None for x in index)


def test_bad_topk():
    with pytest.raises(ConfigError, match="topk=0"):
        loss_of(*inputs(), topk=0)
