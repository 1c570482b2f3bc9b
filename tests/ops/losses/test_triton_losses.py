"""The Triton kernels of the indexer's losses against the specification: interpreted where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fulmen.ops.dispatch import pin_backend
from fulmen.ops.losses.indexer import indexer_loss, indexer_loss_selected
from fulmen.ops.losses.indexer.reference import indexer_loss_reference, indexer_loss_selected_reference
from fulmen.ops.losses.selection import selection_loss
from fulmen.ops.losses.selection.reference import selection_loss_reference
from fulmen.ops.triton_support import triton_reason
from tests.ops.ops_cases import assert_near, normal, ragged, random_selection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parents[3]
# J, I, E, H, G, D; absorbed latents are wider than a power of 2, and more heads share them than a tile takes
HEADS = {"grouped": (4, 2, 7, 6, 2, 8), "absorbed": (4, 1, 24, 8, 1, 20)}
# B, T, S, K
SIZES = (1, 5, 20, 6)
OPERATIONS = {
    "interval": (indexer_loss, indexer_loss_reference),
    "selected": (indexer_loss_selected, indexer_loss_selected_reference),
}
each_operation = pytest.mark.parametrize("name", OPERATIONS)


@pytest.fixture(scope="module", autouse=True)
def _triton():
    if reason := triton_reason(DEVICE):
        pytest.skip(f"triton: {reason}")
    with pin_backend("triton"):
        yield


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Several tiles, chunks of queries and blocks of heads at sizes that can be interpreted."""
    from fulmen.ops import triton_kit
    from fulmen.ops.losses.indexer import triton_tiles

    small = {"rows": 16, "queries": 4, "columns": 16}
    for name in ("loss_lse", "loss", "loss_gradients", "loss_gates"):
        monkeypatch.setitem(triton_kit.KERNEL_SIZES, name, triton_kit.KERNEL_SIZES[name] | small)
    monkeypatch.setitem(triton_kit.KERNEL_SIZES["loss_row"], "columns", 16)
    monkeypatch.setitem(triton_kit.KERNEL_SIZES["loss_selected_keys"], "rows", 8)
    monkeypatch.setattr(triton_tiles, "HELD_NUMBERS", 80)


def inputs(sizes, heads, dtype=torch.float32):
    """The indexer's q, k, w, b and the attention's q, k."""
    (B, T, S, _), (J, index_keys, E, H, G, D) = sizes, heads
    shapes = [(B, T, J, E), (B, S, index_keys, E), (B, T, J), (B, T, J), (B, T, H, D), (B, S, G, D)]
    tensors = [normal(*shape, seed=i, dtype=dtype).to(DEVICE) for i, shape in enumerate(shapes)]
    return [x.requires_grad_() for x in tensors[:4]], tensors[4:]


def keys_of(name, sizes):
    B, T, S, K = sizes
    keys = ragged(B, T, S, seed=1) if name == "interval" else (random_selection(B, T, S, K),)
    return [x.to(DEVICE) for x in keys]


def gradients_of(kl_BT, index):
    """Of a random weighting."""
    weight_BT = normal(*kl_BT.shape, seed=3).to(kl_BT)
    return torch.autograd.grad((kl_BT * weight_BT).sum(), index)


def check(name, index, attention, keys, *changes):
    operation, reference = OPERATIONS[name]
    expected = reference(*index, *attention, *keys, 0.3, *changes).loss
    loss = operation(*index, *attention, *keys, 0.3, *changes)
    assert not loss.target_entropy_BT.requires_grad
    # Both compute in float32 from the same rounded inputs.
    for found, wanted in zip(loss, expected, strict=True):
        assert found.dtype == torch.float32
        assert_near(found, wanted, torch.float32)
    leaves = [x for x in index if x is not None]
    wanted = gradients_of(expected.kl_BT, leaves)
    for leaf, found, want in zip(leaves, gradients_of(loss.kl_BT, leaves), wanted, strict=True):
        assert found.dtype == leaf.dtype
        assert_near(found, want, leaf.dtype)


@each_operation
def test_matches_the_reference_forward_and_backward_in_any_layout(name):
    """A text far longer than what is selected, in several chunks of queries and tiles of keys."""
    sizes = (1, 3, 40, 4)
    index, attention = inputs(sizes, HEADS["grouped"])
    as_caches_keep_them = [x.detach().transpose(0, 1).contiguous().transpose(0, 1) for x in index]
    strided = [torch.stack([x, x], -1)[..., 1] for x in attention]
    keys = [x.long() for x in keys_of(name, sizes)]
    check(name, [x.requires_grad_() for x in as_caches_keep_them], strided, keys)


@each_operation
def test_bfloat16_without_shifts_and_heads_wider_than_a_tile(name, monkeypatch):
    monkeypatch.setattr("fulmen.ops.triton_kit.WIDE_HEAD", 16)
    index, attention = inputs(SIZES, HEADS["absorbed"], torch.bfloat16)
    check(name, [*index[:3], None], attention, keys_of(name, SIZES))


@each_operation
def test_capped_logits_sinks_and_plateaus(name):
    """A low shift shuts most ReLUs: scores are exactly 0, and those heads have no gradient."""
    index, attention = inputs(SIZES, HEADS["grouped"])
    index[3] = (index[3].detach() - 2).requires_grad_()
    keys, sinks = keys_of(name, SIZES), (normal(6, seed=9) + 1).to(DEVICE)
    check(name, index, attention, keys, 1.5, sinks)


@each_operation
def test_sinks_that_leave_nothing_ask_for_nothing(name):
    index, attention = inputs((1, 2, 9, 4), HEADS["grouped"])
    sinks = torch.full((6,), 1e4, device=DEVICE)
    loss = OPERATIONS[name][0](*index, *attention, *keys_of(name, (1, 2, 9, 4)), 0.3, None, sinks)
    assert not loss.kl_BT.any()
    assert not any(x.any() for x in gradients_of(loss.kl_BT, index))


@each_operation
def test_the_same_bits_alone_and_in_a_batch(name):
    sizes = (2, 2, 9, 4)
    index, attention = inputs(sizes, HEADS["grouped"])
    keys, (operation, _) = keys_of(name, sizes), OPERATIONS[name]
    together = operation(*index, *attention, *keys, 0.3).kl_BT
    wanted = torch.autograd.grad(together.sum(), index)
    own = [x[1:].detach().requires_grad_() for x in index]
    alone = operation(*own, *(x[1:] for x in (*attention, *keys)), 0.3).kl_BT
    assert torch.equal(alone, together[1:])
    for found, want in zip(torch.autograd.grad(alone.sum(), own), wanted, strict=True):
        assert torch.equal(found, want[1:])


@each_operation
def test_poison_stays_with_the_queries_that_see_it(name):
    """Two documents whose queries share tiles: of the first, keys and a query are no numbers."""
    index, attention = inputs((1, 4, 20, 0), HEADS["grouped"])
    start = torch.tensor([[0, 0, 10, 10]], device=DEVICE)
    columns = torch.arange(0, 10, 2, device=DEVICE)
    keys = (start, start + 10) if name == "interval" else (start[..., None] + columns,)
    operation, reference = OPERATIONS[name]
    clean = reference(*index, *attention, *keys, 0.3).loss.kl_BT
    wanted = torch.autograd.grad(clean.sum(), index)
    bad_index, bad_attention = [x.detach().clone() for x in index], [x.clone() for x in attention]
    bad_index[0][:, 0, 1, 2], bad_attention[1][:, 6, 1] = torch.inf, torch.nan
    bad_index[1][:, 4, 0, 0] = torch.nan
    bad_index = [x.requires_grad_() for x in bad_index]
    kl = operation(*bad_index, *bad_attention, *keys, 0.3).kl_BT
    assert kl[:, :2].isnan().all()
    assert_near(kl[:, 2:], clean[:, 2:], torch.float32)
    found = torch.autograd.grad(kl.sum(), bad_index)
    assert found[0][:, :2].isnan().any(-1).any(-1).all()
    for gradient, want in zip(found, wanted, strict=True):
        rows = slice(10, 20) if gradient.shape[1] == 20 else slice(2, 4)
        assert_near(gradient[:, rows], want[:, rows], torch.float32)


@pytest.mark.parametrize("sizes", [(2, 0, 5, 3), (1, 3, 0, 0), (0, 3, 5, 2)], ids=str)
@each_operation
def test_nothing_to_do_is_no_error(name, sizes):
    B, T, _, K = sizes
    index, attention = inputs(sizes, HEADS["grouped"])
    ends = torch.zeros(B, T, dtype=torch.int64, device=DEVICE)
    nothing = torch.full((B, T, K), -1, device=DEVICE)
    loss = OPERATIONS[name][0](*index, *attention, *((ends, ends) if name == "interval" else (nothing,)), 0.3)
    assert loss.kl_BT.shape == (B, T)
    assert not loss.kl_BT.any()
    assert not any(x.any() for x in torch.autograd.grad(loss.kl_BT.sum(), index))


def selection_inputs(dtype=torch.float64):
    """Of 5 queries: one without keys, and one with fewer than are kept."""
    index, attention = inputs(SIZES, HEADS["grouped"], dtype)
    attention += [normal(1, 20, 2, 5, seed=7, dtype=dtype), normal(9, 30, seed=8, dtype=dtype)]
    ends = torch.tensor([[0, 3, 2, 0, 5]]), torch.tensor([[15, 3, 8, 20, 19]])
    return index, [x.to(DEVICE) for x in attention], [x.to(DEVICE) for x in ends]


@pytest.mark.parametrize("has_changes", [False, True], ids=["plain", "capped logits, sinks, gated output"])
def test_selection_loss_matches_the_reference_in_double_precision(has_changes):
    index, attention, ends = selection_inputs()
    changes: tuple = (None, None, None)
    if has_changes:
        gate = normal(1, 5, 30, seed=10).sigmoid().to(DEVICE)
        changes = (1.5, normal(6, seed=9).to(DEVICE) + 1, gate)
    expected = selection_loss_reference(*index, *attention, *ends, 7, 0.3, 0.4, *changes).loss_BT
    leaves = [x.detach().float().requires_grad_() for x in index]
    floats = [x.float() for x in attention]
    loss = selection_loss(*leaves, *floats, *ends, 7, 0.3, 0.4, *changes)
    assert loss.dtype == torch.float32
    assert not loss[0, 1:3].any()
    torch.testing.assert_close(loss, expected.float(), rtol=1e-4, atol=1e-6)
    wanted = gradients_of(expected, index)
    for found, want in zip(gradients_of(loss, leaves), wanted, strict=True):
        torch.testing.assert_close(found, want.float(), rtol=1e-3, atol=2e-5)


def test_selection_loss_keeps_poison_with_the_queries_that_see_it():
    index, attention, _ = selection_inputs(torch.float32)
    ends = [torch.tensor(x, device=DEVICE) for x in ([[0, 0, 10, 10, 10]], [[10, 10, 20, 20, 20]])]
    clean = selection_loss_reference(*index, *attention, *ends, 4, 0.3, 0.4).loss_BT
    wanted = torch.autograd.grad(clean.sum(), index)
    bad_index, bad = [x.detach().clone() for x in index], [x.clone() for x in attention]
    bad_index[1][:, 4], bad[1][:, 5], bad[2][:, 6] = torch.nan, torch.nan, torch.inf
    bad_index = [x.requires_grad_() for x in bad_index]
    loss = selection_loss(*bad_index, *bad, *ends, 4, 0.3, 0.4)
    assert loss[:, :2].isnan().all()
    torch.testing.assert_close(loss[:, 2:], clean[:, 2:], rtol=1e-4, atol=1e-6)
    for found, want in zip(torch.autograd.grad(loss.sum(), bad_index), wanted, strict=True):
        rows = slice(10, 20) if found.shape[1] == 20 else slice(2, 5)
        torch.testing.assert_close(found[:, rows], want[:, rows], rtol=1e-3, atol=2e-5)


class HostRead(TorchDispatchMode):
    """Fails for what the host would wait for; keeps the most numbers of a floating tensor that was made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero"), name
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.largest = max(self.largest, x.numel())
        return found


@pytest.mark.parametrize("name", [*OPERATIONS, "selection loss"])
def test_nothing_is_read_back_and_no_more_is_held_than_a_chunk(name, monkeypatch):
    """On "meta", whose tensors hold no numbers: some queries of a text of 32K."""
    from fulmen.ops.losses.indexer import triton, triton_tiles
    from fulmen.ops.losses.selection.triton import selection_loss_triton

    T, S, K = 512, 32768, 512
    of_queries = [(T, 6, 8), (T, 6), (T, 6), (T, 6, 8), (T, K)]
    q, w, b, attn_q, keys = (torch.empty(1, *shape, device="meta") for shape in of_queries)
    k, attn_k = (torch.empty(1, S, 3, 8, device="meta") for _ in range(2))
    index = [x.requires_grad_() for x in (q, k, w, b)]
    monkeypatch.setattr(triton_tiles, "HELD_NUMBERS", 2**20)
    with HostRead() as watch:
        some = (*index, attn_q, attn_k)
        changes = (0.125, 30.0, torch.zeros(6, device="meta"))
        if name == "interval":
            ends = torch.zeros(2, 1, T, dtype=torch.int64, device="meta")
            loss_BT = triton.indexer_loss_triton(*some, *ends, *changes).kl_BT
        elif name == "selected":
            loss_BT = triton.indexer_loss_selected_triton(*some, keys.int(), *changes).kl_BT
        else:
            values = (torch.empty_like(attn_k), torch.empty(9, 48, device="meta"))
            ends = torch.zeros(2, 1, T, dtype=torch.int64, device="meta")
            gate = torch.empty(1, T, 48, device="meta")
            loss_BT = selection_loss_triton(*some, *values, *ends, K, changes[0], 0.5, *changes[1:], gate)
        torch.autograd.grad(loss_BT.sum(), index)
    assert watch.largest <= 2**20 < T * S // 8


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled when they run")
def test_every_kernel_compiles_for_a_gpu_without_spilling():
    """Other GPUs and models: docs/gpu.md, by the same program."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = (
        "from benchmarks.gpu.compiled import *\n"
        "for x in compile_model('sm_90', 'smollm2', ('train',)): print(*x, reason_against(x), sep='|')"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, cwd=ROOT
    )
    lines = [line.split("|") for line in run.stdout.splitlines()]
    assert {line[3] for line in lines} == {
        *("attention_lse", "mean_attention", "scores", "row_loss", "row_gradient"),
        *("by_query", "by_key", "by_selected_key", "gated_attention", "gate_gradients"),
    }
    assert {line[-1] for line in lines} == {"None"}
