"""A step of vLLM's scheduler, with its tensors on the CPU and on another device.

The other device is "meta", whose tensors hold no numbers: what passes there has asked for none. `OneDevice`
watches that nothing of a step lies elsewhere, is made elsewhere, or is read back by the host.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fulmen.ops.dispatch import pin_backend
from fulmen.ops.paged.layer import CoarseCache, PagedLayer
from fulmen.ops.paged.project import Projections

BLOCK = 16
HEADS, KEY_HEADS, WIDTH, HIDDEN = 4, 2, 32, 24
INDEX_HEADS, INDEX_WIDTH, COARSE_HEADS, COARSE_WIDTH = 4, 16, 2, 8
TOPK = 8
# Where each request's queries start, and how many keys it has: some with padding, requests without a query.
STEPS = {
    "decodes": ([0, 1, 2, 3], [40, 23, 9]),
    "short decodes": ([0, 1, 2], [8, 3]),
    "prompt": ([0, 7], [30]),
    "short prompt": ([0, 7], [7]),
    "long prompt": ([0, 12], [30]),
    "both": ([0, 1, 2, 9, 10], [40, 5, 27, 20]),
    "drafts": ([0, 3, 6], [33, 18]),
    "padded": ([0, 1, 2, 2, 2], [40, 23, 0, 0]),
}
every_step = pytest.mark.parametrize("name", STEPS)
levels = pytest.mark.parametrize("coarse", [False, True], ids=["one level", "two levels"])


@pytest.fixture
def vllm_step():
    """The module, imported here: every test process would import vLLM to find the tests of this file."""
    return pytest.importorskip("fulmen.serving.vllm_plugin.step", reason="needs the extra serve-cpu")


@pytest.fixture
def triton_on_meta(monkeypatch):
    """The registry refuses "meta", where nothing can be computed; here nothing is to be: the kernels that
    would start are noted, with their grids.
    """
    pytest.importorskip("triton")
    from fulmen.ops import triton_kit
    from fulmen.ops.paged import (
        triton_attend,
        triton_candidates,
        triton_dense,
        triton_scores,
        triton_select,
        triton_store,
    )

    # As of many keys.
    monkeypatch.setattr(triton_candidates, "_few_are_left", lambda *sizes: False)
    started = []

    def noted(kernel, grid, *arguments, **options):
        started.append((kernel.__name__.removeprefix("_paged_").removesuffix("_kernel"), grid))
        triton_kit.launch(kernel, grid, *arguments, **options)

    stages = (triton_scores, triton_candidates, triton_select, triton_attend, triton_dense)
    for module in (triton_store, *stages):
        monkeypatch.setattr(module, "launch", noted)
    monkeypatch.setattr("fulmen.ops.dispatch.reason_against_backend", lambda *given: None)
    with pin_backend("triton"):
        yield started


class HostRead(Exception):
    """The host asks for numbers, or for a size that depends on them."""


class OneDevice(TorchDispatchMode):
    """Raises HostRead for an operation by which the host would wait for "meta", and fails for one with
    tensors, scalars aside, that lie or come to lie elsewhere. `ran` has the names of all.
    """

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.ran.append(func.overloadpacket.__name__)
        if reads_back(func, args, kwargs):
            raise HostRead(str(func))
        result = func(*args, **kwargs)
        found = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor) and x.ndim]
        assert {x.device.type for x in found} <= {"meta"}, func
        return result


def reads_back(func, args, kwargs):
    if func.overloadpacket is torch.ops.aten.index:  # by masks alone is its size a matter of numbers
        return any(x.dtype == torch.bool for x in args[1] if x is not None)
    if func.overloadpacket is torch.ops.aten._to_copy and kwargs.get("device") is not None:
        return torch.device(kwargs["device"]).type != "meta"
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


def step_of(starts, lengths, device, too_many=0):
    """By vLLM's own classes. The host takes each request for `too_many` keys longer than it is."""
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from fulmen.serving.vllm_plugin.step import StepBuilder

    n_blocks, length_B = -(-(max(lengths) + too_many) // BLOCK), torch.tensor(lengths, dtype=torch.int32)
    block_BN = 1 + torch.arange(len(lengths) * n_blocks, dtype=torch.int32).view(-1, n_blocks)
    start_B = torch.tensor(starts, dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=start_B.to(device),
        query_start_loc_cpu=start_B,
        seq_lens=length_B.to(device),
        num_reqs=len(lengths),
        num_actual_tokens=starts[-1],
        max_query_len=int(start_B.diff().max()),
        max_seq_len=max(lengths) + too_many,
        block_table_tensor=block_BN.to(device),
        slot_mapping=slots_of(starts, lengths, block_BN).to(device),
        seq_lens_cpu_upper_bound=length_B + too_many,
    )
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=KEY_HEADS, head_size=WIDTH, dtype=torch.float32)
    return StepBuilder(spec, ["layer"], None, torch.device(device)).build(0, common)


def slots_of(starts, lengths, block_BN):
    return torch.tensor(
        [
            int(block_BN[r, s // BLOCK]) * BLOCK + s % BLOCK
            for r, (length, low, high) in enumerate(zip(lengths, starts, starts[1:], strict=False))
            for s in range(length - (high - low), length)
        ]
    )


def attention_over_caches(device, coarse):
    """A converted layer as far as it depends on a step, over caches of random numbers."""
    from fulmen.serving.vllm_plugin.attention import DsaAttention, Kept

    generator, rows = torch.Generator().manual_seed(0), 20 * BLOCK

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    def packed(width):
        return torch.randint(-9, 9, (rows, width + 2), generator=generator, dtype=torch.int8).to(device)

    pairs_P = torch.arange(INDEX_WIDTH // 2).to(device)
    first = (packed(COARSE_WIDTH), pairs_P[: COARSE_WIDTH // 2], COARSE_HEADS, 2 * TOPK, 2 * TOPK)
    budget = (HEADS, INDEX_HEADS, TOPK, TOPK, WIDTH**-0.5, CoarseCache(*first) if coarse else None)
    caches = (random(rows, KEY_HEADS, 2 * WIDTH), packed(INDEX_WIDTH), pairs_P[None])
    layer = PagedLayer(*caches, *budget)
    matrices = [random(n, width) for n, width in zip(layer.index_rows, projected_from(), strict=False)]
    rotary = SimpleNamespace(cos_sin_cache=random(64, WIDTH))

    class OverCaches(DsaAttention):
        def __init__(self):
            torch.nn.Module.__init__(self)
            apart = (BLOCK, BLOCK, BLOCK if coarse else 0)
            cache = SimpleNamespace(kv_cache=layer.kv_RGC)
            buffers = ({"rope_pairs": layer.rope_pairs_IP}, {"rope_pairs": first[1]})
            self._kept = Kept(layer, apart, rotary, cache, layer.kv_RGC, *buffers)
            projections = Projections(*matrices[:3], random(layer.index_rows[2]), *matrices[3:])
            self._weights = SimpleNamespace(hold=True, projections=projections)
            self._ranks, self.topk, self.layer_topk, self.told = 1, TOPK, TOPK, None
            self.heads, self.head_dim, self.n_candidates = HEADS, WIDTH, 2 * TOPK
            self.coarse_name, self._bounds = "coarse_keys" if coarse else None, (1000, 4)

    return OverCaches()


def projected_from():
    """Widths of what the indexer's matrices read, in their order."""
    return HEADS * WIDTH, KEY_HEADS * WIDTH, HIDDEN, HEADS * WIDTH, KEY_HEADS * WIDTH


def tokens_of(step, device):
    """qkv, hidden states, positions, and where the attention goes."""
    count, generator = step.n_tokens, torch.Generator().manual_seed(1)
    shapes = ((count, (HEADS + 2 * KEY_HEADS) * WIDTH), (count, HIDDEN))
    numbers = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    return *numbers, torch.arange(count).to(device), torch.zeros(count, HEADS * WIDTH).to(device)


def attend(attention, step, tokens, coarse):
    *inputs, out_TX = tokens
    attention.attend(*inputs, step, (step, step if coarse else None), out_TX)
    return out_TX


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value if isinstance(value, list | tuple) else getattr(value, "__dict__", {}).values()
    return [tensor for part in parts for tensor in tensors_in(part)]


@every_step
def test_a_step_is_laid_out_where_its_caches_are_and_reads_nothing_back(vllm_step, name):
    starts, lengths = STEPS[name]
    rotary = SimpleNamespace(cos_sin_cache=torch.zeros(8192, 64, device="meta"))
    position_T = torch.zeros(starts[-1], dtype=torch.int64, device="meta")
    step = step_of(starts, lengths, "meta")
    with OneDevice():
        # Of three caches that are cut differently.
        layout = step.layout((step, step), (BLOCK, 24, 48), rotary, position_T, torch.bfloat16)
    found = tensors_in(layout) + [span.stop_BT for span in step.spans]
    assert len(found) >= 5 + 4 * len(step.spans)
    assert {tensor.device.type for tensor in found} == {"meta"}


@every_step
@pytest.mark.parametrize("too_many", [0, 5])
def test_every_query_sees_the_tokens_up_to_itself(vllm_step, name, too_many):
    starts, lengths = STEPS[name]
    step = step_of(starts, lengths, "cpu", too_many)
    counted = [
        list(range(length - (high - low) + 1, length + 1))
        for length, low, high in zip(lengths, starts, starts[1:], strict=False)
        if high > low
    ]
    assert [rows for span in step.spans for rows in span.stop_BT.tolist()] == counted
    for span in step.spans:
        assert span.stop_BT.dtype == torch.int64
        assert span.longest == int(span.stop_BT.max()) + too_many
    assert sum(span.tokens.stop - span.tokens.start for span in step.spans) == step.n_tokens


@every_step
@levels
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_how_many_drafts_were_taken_need_not_be_known_on_the_host(vllm_step, name, coarse, backend):
    outs = []
    for too_many in (0, 5):
        step = step_of(*STEPS[name], "cpu", too_many)
        attention, tokens = attention_over_caches("cpu", coarse), tokens_of(step, "cpu")
        with pin_backend(backend):
            outs.append(attend(attention, step, tokens, coarse))
    assert outs[0].abs().sum() > 0
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-6)


@every_step
@levels
def test_all_of_a_layer_on_a_device_reads_nothing_back(vllm_step, triton_on_meta, name, coarse):
    """Projections, RoPE and stores, scores, selection and attention, up to the launch of each kernel."""
    starts, lengths = STEPS[name]
    step = step_of(starts, lengths, "meta")
    attention, tokens = attention_over_caches("meta", coarse), tokens_of(step, "meta")
    with OneDevice() as watched:
        attend(attention, step, tokens, coarse)
    names = [kernel for kernel, _ in triton_on_meta]
    storing = ["store", "index", "index"] if coarse else ["store", "index"]
    choosing = ["scores", *["count"] * 4, "candidates", "scores", "fine"] if coarse else ["scores"]
    selecting = [*choosing, "select"] if max(lengths) > TOPK else []
    # Queries of a prompt that keep all of their keys share them.
    sharing = ["dense"] if name == "long prompt" else []
    assert names == [*storing, *selecting, *sharing, "attend"]
    assert not {"index_select", "gather"} & set(watched.ran)


@levels
def test_what_starts_depends_on_sizes_alone(vllm_step, triton_on_meta, coarse):
    """As for a CUDA graph, which is captured once for all requests of a size: same kernels, same grids."""
    started = []
    for starts, lengths in [([0, 1, 2], [40, 40]), ([0, 1, 1], [40, 0]), ([0, 1, 2], [1, 40])]:
        step = step_of(starts, lengths, "meta")
        step.n_tokens, step._common.slot_mapping = 2, torch.zeros(2, dtype=torch.int64, device="meta")
        attention, tokens = attention_over_caches("meta", coarse), tokens_of(step, "meta")
        triton_on_meta.clear()
        attend(attention, step, tokens, coarse)
        started.append(list(triton_on_meta))
    assert started[0] == started[1] == started[2]


def test_while_memory_is_measured_both_levels_take_theirs(vllm_step, triton_on_meta):
    made = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            made.append(result.numel())
            return result

    taken = []
    for coarse in (False, True):
        attention, out_TX = (
            attention_over_caches("meta", coarse),
            torch.empty(9, HEADS * WIDTH, device="meta"),
        )
        made.clear()
        with Made():
            attention.reserve(out_TX)
        taken.append(max(made))
    # Of each query: scores of all keys; in two levels also of those not chosen from, and of candidates.
    assert taken[0] == 9 * 4 * 1000
    assert taken[1] > 9 * 4 * (1000 + 8 * TOPK + 2 * TOPK)


def test_decoding_can_be_captured_with_short_keys(vllm_step):
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from fulmen.serving.vllm_plugin.step import StepBuilder

    common = step_of([0, 2, 4], [40, 30], "cpu")._common
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=KEY_HEADS, head_size=WIDTH, dtype=torch.float32)
    builder = StepBuilder(spec, ["layer"], None, torch.device("cpu"))
    assert builder.get_cudagraph_support(None, spec) == AttentionCGSupport.UNIFORM_BATCH
    builder.build_for_cudagraph_capture(common)
    assert common.seq_lens.tolist() == [2, 2]


def test_vllm_cuts_the_graphs_that_it_captures_at_this_attention(vllm_step):
    from vllm.compilation.backends import split_graph
    from vllm.config import CompilationConfig, CompilationMode

    from fulmen.serving.vllm_plugin.attention import keep_out_of_graphs

    def layer(x_TX, out_TX):
        torch.ops.vllm.fulmen_dsa_attention(2 * x_TX, x_TX, x_TX, out_TX, "layer")
        return out_TX + 1

    found = {}
    for mode in (CompilationMode.VLLM_COMPILE, CompilationMode.DYNAMO_TRACE_ONCE):  # a GPU's, a CPU's
        compilation = CompilationConfig(mode=mode)
        compilation.set_splitting_ops_for_v1("naive")
        for _layer in range(2):
            keep_out_of_graphs(compilation)
        pieces = split_graph(torch.fx.symbolic_trace(layer), compilation.splitting_ops)[1]
        found[mode] = [piece.is_splitting_graph for piece in pieces]
        assert len(set(compilation.splitting_ops)) == len(compilation.splitting_ops)
    assert found == {
        CompilationMode.VLLM_COMPILE: [False, True, False],
        CompilationMode.DYNAMO_TRACE_ONCE: [False],
    }


def test_the_watch_sees_what_it_is_for():
    x_N = torch.zeros(4, device="meta")
    with OneDevice():
        for read in (x_N.tolist, x_N.cpu, x_N.sum().item, x_N.nonzero, lambda: x_N[x_N > 0]):
            with pytest.raises(HostRead):
                read()
        for elsewhere in (lambda: torch.arange(4), lambda: torch.zeros(4).copy_(x_N)):
            with pytest.raises(AssertionError):
                elsewhere()
