"""The Triton kernels against the specification: on a GPU if there is one, else interpreted, hence small."""

import os
import subprocess
import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fulmen.errors import BackendError
from fulmen.ops import dispatch
from fulmen.ops.attention.sparse import sparse_attention
from fulmen.ops.attention.sparse.reference import sparse_attention_reference
from fulmen.ops.dispatch import pin_backend, resolve
from fulmen.ops.scores import index_scores
from fulmen.ops.scores.reference import index_scores_reference
from fulmen.ops.topk import index_topk, select_topk
from fulmen.ops.topk.reference import select_topk_reference
from fulmen.ops.triton_support import triton_reason
from tests.ops.ops_cases import assert_near, causal, gradients, normal, ragged, random_selection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Interpreted, float16 is as bfloat16.
DTYPES = [torch.float32, torch.bfloat16, *([torch.float16] if DEVICE == "cuda" else [])]
# J, I, E: several heads a key head, odd numbers; V3.2's single key head
INDEX_HEADS = [(9, 3, 20), (8, 1, 64)]
# H, G, D, V: grouped; absorbed latents, wider than a power of 2; one head a key head
HEADS = [(6, 2, 8, 8), (4, 1, 40, 32), (3, 3, 12, 7)]


@pytest.fixture(scope="module", autouse=True)
def _triton():
    if reason := triton_reason(DEVICE):
        pytest.skip(f"triton: {reason}")
    with pin_backend("triton"):
        yield


@pytest.fixture
def _small_tiles(monkeypatch):
    """Several tiles, chunks and parts at sizes that can be interpreted."""
    from fulmen.ops import triton_kit

    kernels = [import_module(f"fulmen.ops.{name}.triton") for name in ("topk", "attention.sparse")]
    monkeypatch.setitem(triton_kit.KERNEL_SIZES["select"], "columns", 64)
    monkeypatch.setattr(triton_kit, "WIDE_HEAD", 16)
    monkeypatch.setattr(kernels[0], "HELD_SCORES", 900)
    monkeypatch.setattr(kernels[1], "PART_KEYS", 32)


def here(*tensors):
    return [x.to(DEVICE) for x in tensors]


def index_inputs(B, T, S, heads, dtype=torch.float32):
    J, index_keys, E = heads
    shapes = [(B, T, J, E), (B, S, index_keys, E), (B, T, J), (B, T, J)]
    return here(*(normal(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes)))


def attention_inputs(B, T, S, heads, dtype=torch.float32):
    H, G, D, V = heads
    shapes = [(B, T, H, D), (B, S, G, D), (B, S, G, V)]
    return tuple(
        x.requires_grad_() for x in here(*(normal(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes)))
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", INDEX_HEADS, ids=str)
def test_scores_match_the_reference(heads, dtype):
    q, k, w, b = index_inputs(2, 7, 150, heads, dtype)
    interval = here(*ragged(2, 7, 150))
    for shift in (b, None):
        scores = index_scores(q, k, w, shift, *interval)
        assert scores.dtype == torch.float32
        # Both compute in float32 from the same rounded inputs.
        assert_near(scores, index_scores_reference(q, k, w, shift, *interval).scores_BTS, torch.float32)


@pytest.mark.parametrize("heads", INDEX_HEADS, ids=str)
def test_a_score_has_the_same_bits_alone_in_a_batch_and_among_others(heads):
    q, k, w, b = index_inputs(2, 7, 150, heads)
    start, stop = here(*causal(2, 7, 150))
    together = index_scores(q, k, w, b, start, stop)
    for t in (0, 6):
        own = (x[1:, t : t + 1] for x in (w, b, start, stop))
        assert torch.equal(index_scores(q[1:, t : t + 1], k[1:], *own), together[1:, t : t + 1])


def test_a_key_that_is_not_finite_makes_nan_of_its_own_scores_alone():
    q, k, w, b = index_inputs(1, 4, 60, (9, 3, 20))
    interval = here(*causal(1, 4, 60))
    bad = k.clone()
    bad[:, 5, 1] = torch.nan
    scores, clean = index_scores(q, bad, w, b, *interval), index_scores(q, k, w, b, *interval)
    assert scores[..., 5].isnan().all()
    scores[..., 5] = clean[..., 5]
    assert torch.equal(scores, clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_query_that_is_not_finite_scores_nan_and_of_no_other(dtype):
    q, k, w, b = index_inputs(1, 4, 60, (9, 3, 20))
    q, k, interval = q.to(dtype), k.to(dtype), here(*causal(1, 4, 60))
    clean = index_scores(q, k, w, b, *interval)
    for bad in (torch.nan, torch.inf, -torch.inf):
        poisoned = q.clone()
        poisoned[0, 2, 7, 5] = bad
        scores = index_scores(poisoned, k, w, b, *interval)
        assert scores[0, 2, :59].isnan().all()
        scores[0, 2] = clean[0, 2]
        assert torch.equal(scores, clean)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("kind", ["normal", "integers", "zeros", "constant", "nan and inf", "denormal"])
def test_selection_matches_the_reference(kind):
    numbers = normal(1, 3, 150)
    scores = {
        "normal": numbers,
        "integers": numbers.round(),
        "zeros": numbers.relu() * -1,  # -0.0 is 0.0
        "constant": numbers * 0 + 3,
        "nan and inf": numbers.round().div(0 * numbers.round()),
        "denormal": numbers.round() * 1e-45,
    }[kind]
    for topk in (1, 40, 200):
        for interval in (ragged(1, 3, 150, seed=2), causal(1, 3, 150)):
            chosen = select_topk(*here(scores, *interval), topk)
            assert torch.equal(chosen.cpu(), select_topk_reference(scores, *interval, topk))


@pytest.mark.usefixtures("_small_tiles")
def test_index_topk_selects_from_the_index_scores_in_chunks_of_queries_and_of_sequences():
    """900 scores at a time: chunks of 6 queries of one sequence; then, of one query, 6 sequences at once."""
    for B, T in [(2, 8), (7, 1)]:
        q, k, w, b = index_inputs(B, T, 150, (6, 2, 16))
        interval = here(*causal(B, T, 150))
        # A low shift shuts most ReLUs: plateaus of exact zeros.
        scores = index_scores(q, k, w, b - 2, *interval)
        for topk in (9, 1000):
            chosen = index_topk(q, k, w, b - 2, *interval, topk)
            assert torch.equal(chosen.cpu(), select_topk_reference(scores.cpu(), *causal(B, T, 150), topk))


@pytest.mark.usefixtures("_small_tiles")
def test_index_topk_holds_no_more_scores_than_it_may():
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            # The interpreter copies by bytes.
            if isinstance(result, torch.Tensor) and result.is_floating_point():
                self.numbers = max(self.numbers, result.numel())
            return result

    inputs = index_inputs(1, 14, 150, (2, 1, 4))
    interval = here(*causal(1, 14, 150))
    with Largest() as largest:
        index_topk(*inputs, *interval, 9)
    assert largest.numbers <= 900


@contextmanager
def deterministic(by_key):
    """Gradients key by key instead of by atomic sums, if `by_key`."""
    torch.use_deterministic_algorithms(by_key)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize(
    ("heads", "dtype"),
    [*((heads, torch.float32) for heads in HEADS), *((HEADS[0], dtype) for dtype in DTYPES[1:])],
    ids=str,
)
def test_attention_matches_the_reference_forward_and_backward(heads, dtype):
    tolerance = torch.bfloat16 if dtype == torch.float16 else dtype
    for sizes, orders in [((2, 4, 20, 12), (False, True)), ((1, 1, 75, 70), (False,))]:  # one part; three
        qkv, (topk,) = attention_inputs(*sizes[:3], heads, dtype), here(random_selection(*sizes))
        expected = sparse_attention_reference(*qkv, topk, 0.3)
        out, lse = sparse_attention(*qkv, topk, 0.3)
        assert out.dtype == dtype
        assert lse.dtype == torch.float32
        assert_near(out, expected.out_BTHV, tolerance)
        assert_near(lse, expected.lse_BTH, tolerance)
        wanted = gradients((expected.out_BTHV, expected.lse_BTH), qkv)
        for by_key in orders:
            with deterministic(by_key):
                found = gradients((out, lse), qkv)
            for gradient, want in zip(found, wanted, strict=True):
                assert_near(gradient, want, tolerance)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize(
    ("sizes", "by_key"),
    [((1, 3, 24, 16), False), ((1, 3, 24, 16), True), ((1, 1, 90, 70), False)],
    ids=["atomic", "deterministic", "in parts"],
)
def test_capped_logits_and_sinks_match_the_reference_forward_and_backward(sizes, by_key):
    qkv, (topk,) = attention_inputs(*sizes[:3], HEADS[0]), here(random_selection(*sizes))
    (sinks,) = here(normal(6, seed=5))
    inputs = (*qkv, sinks.requires_grad_())
    expected = sparse_attention_reference(*qkv, topk, 0.5, 2.0, sinks)
    out, lse = sparse_attention(*qkv, topk, 0.5, 2.0, sinks)
    assert_near(out, expected.out_BTHV, torch.float32)
    assert_near(lse, expected.lse_BTH, torch.float32)
    wanted = gradients((expected.out_BTHV, expected.lse_BTH), inputs)
    try:
        torch.use_deterministic_algorithms(by_key)
        found = gradients((out, lse), inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    for gradient, want in zip(found, wanted, strict=True):
        assert_near(gradient, want, torch.float32)


@pytest.mark.usefixtures("_small_tiles")
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch_prefilled_or_decoded():
    for sizes in [(3, 9, 40, 9), (3, 1, 90, 70)]:
        qkv, (topk,) = attention_inputs(*sizes[:3], HEADS[0]), here(random_selection(*sizes))
        together = sparse_attention(*qkv, topk, 0.3)
        alone = sparse_attention(*(x[1:2] for x in (*qkv, topk)), 0.3)
        assert torch.equal(together[0][1:2], alone[0])
        assert torch.equal(together[1][1:2], alone[1])


def test_poison_stays_with_the_queries_that_select_it():
    clean = attention_inputs(1, 6, 20, (2, 1, 8, 8))
    # The first 3 queries select among the first 10 keys, the others among the rest; query 0 key 3 alone.
    topk = torch.arange(7).expand(1, 6, 7) + torch.tensor([2, 2, 5, 10, 12, 15])[:, None]
    topk[..., -2:] = -1
    topk[:, 0] = torch.tensor([-1, 3, -1, -1, -1, -1, -1])
    (topk,) = here(topk)
    out, wanted = out_and_gradients(clean, topk)
    for poisoned in range(3):
        bad = [x.detach().clone() for x in clean]
        bad[poisoned][:, 3 if poisoned else 0] = torch.nan
        bad_out, found = out_and_gradients([x.requires_grad_() for x in bad], topk)
        assert bad_out[:, 0].isnan().all()
        assert torch.equal(bad_out[:, 3:], out[:, 3:])
        for bad_gradient, want, first in zip(found, wanted, 2 * (3, 10, 10), strict=True):
            assert torch.equal(bad_gradient[:, first:], want[:, first:])


def out_and_gradients(qkv, topk):
    """The output, and the gradients of q, k and v: by atomic sums, then key by key."""
    out, found = sparse_attention(*qkv, topk, 0.3)[0], []
    for by_key in (False, True):
        with deterministic(by_key):
            found.extend(torch.autograd.grad(out.sum(), qkv, retain_graph=True))
    return out, found


def test_a_query_whose_scores_are_all_minus_infinity_is_no_number():
    qkv, (topk,) = attention_inputs(1, 4, 40, HEADS[0]), here(random_selection(1, 4, 40, 9))
    q, k, v = (x.detach().clone() for x in qkv)
    k[..., 0] = 1
    clean = sparse_attention(q, k, v, topk, 0.3)[0]
    q[:, 1] = 0
    q[:, 1, :, 0] = -torch.inf
    out, lse = sparse_attention(q, k, v, topk, 0.3)
    assert out[:, 1].isnan().all()
    assert not lse[:, 1].isfinite().any()
    for t in (0, 2, 3):
        assert torch.equal(out[:, t], clean[:, t])


def test_memory_layout_does_not_matter():
    qkv, (topk,) = attention_inputs(2, 3, 30, HEADS[0]), here(random_selection(2, 3, 30, 9))
    plain = sparse_attention(*qkv, topk, 0.3)
    wanted = gradients(plain, qkv)
    as_caches_keep_it = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]
    strided = [torch.stack([x, x], -1)[..., 1] for x in qkv]
    for layout in (as_caches_keep_it, strided):
        out = sparse_attention(*layout, topk.long().transpose(0, 1).contiguous().transpose(0, 1), 0.3)
        assert torch.equal(out[0], plain[0])
        for gradient, want in zip(gradients(out, qkv), wanted, strict=True):
            assert_near(gradient, want, torch.float32)


def test_no_queries_and_no_keys_are_allowed():
    q, k, v = here(torch.ones(2, 0, 2, 4), torch.ones(2, 5, 1, 4), torch.ones(2, 5, 1, 4))
    (nothing,) = here(torch.ones(2, 0, 3, dtype=torch.int32))
    assert sparse_attention(q, k, v, nothing, 1.0)[0].shape == (2, 0, 2, 4)
    q, k, v = (
        x.requires_grad_()
        for x in here(torch.ones(2, 3, 2, 4), torch.ones(2, 0, 1, 4), torch.ones(2, 0, 1, 4))
    )
    (nothing,) = here(torch.zeros(2, 3, 0, dtype=torch.int32))
    out, lse = sparse_attention(q, k, v, nothing, 1.0)
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert not torch.autograd.grad(out.sum(), q)[0].any()
    w, zero, scores = here(torch.ones(2, 3, 2), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 0))
    assert index_topk(q.detach(), k.detach(), w, w, zero, zero, 5).shape == (2, 3, 0)
    assert select_topk(scores, zero, zero, 5).shape == (2, 3, 0)


def test_pinned_triton_raises_where_it_has_no_kernel():
    for name, dtype, reason in [
        ("dense_attention", torch.float32, "it has kernels for attend_requests, index_scores, .* alone"),
        ("index_topk", torch.float64, r"compute in float32, dtype torch\.float64 needs more"),
    ]:
        with pytest.raises(BackendError, match=reason):
            resolve(name, DEVICE, dtype)


@pytest.mark.parametrize(
    ("device", "reason"),
    [("cpu", "run on a GPU, not on device 'cpu'.*TRITON_INTERPRET=1"), ("cuda", "has no GPU")],
)
def test_pinned_triton_raises_where_nothing_can_run_it(device, reason, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        BackendError, match=rf"'triton' \(pinned by pin_backend\) cannot run index_topk: .*{reason}"
    ):
        resolve("index_topk", device, torch.float32)


def test_triton_is_the_default_on_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(dispatch, "_pinned_backends", [])
    monkeypatch.delenv("FULMEN_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "triton_reason", lambda device: None)
    losses = ("indexer_loss", "indexer_loss_selected", "selection_loss")
    for name in ("index_scores", "select_topk", "index_topk", "sparse_attention", *losses):
        assert resolve(name, "cuda", torch.bfloat16) == "triton"
        assert resolve(name, "cpu", torch.bfloat16) != "triton"
    assert resolve("dense_attention", "cuda", torch.bfloat16) == "torch"
    assert resolve("index_topk", "cuda", torch.float64) == "torch"


def test_without_triton_everything_else_works_and_the_reason_says_what_to_install():
    program = """
import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
sys.modules["triton"] = None
import torch
from fulmen.ops.dispatch import resolve
from fulmen.ops.triton_support import triton_reason
assert "pip install 'fulmen[gpu]'" in triton_reason("cuda"), triton_reason("cuda")
assert resolve("index_topk", "cuda", torch.float32) == "torch"
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled when they run")
def test_every_kernel_compiles_for_a_gpu_and_fits_its_shared_memory():
    program = Path(__file__).with_name("compile_triton.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(program), "cuda", "80", "small"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    kernels = [line.split() for line in run.stdout.splitlines()]
    assert len({name for name, _ in kernels}) == 6
    # An A100 has 163 KB for a block of threads.
    assert max(int(shared) for _, shared in kernels) <= 163 * 1024
