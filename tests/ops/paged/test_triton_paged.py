"""The paged Triton kernels against the specification: on a GPU if there is one, else interpreted."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fulmen import ConfigError
from fulmen.errors import BackendError
from fulmen.ops.common.index_keys import unpack_index_keys
from fulmen.ops.dispatch import pin_backend
from fulmen.ops.paged.layer import store_tokens
from fulmen.ops.paged.requests import require_paged_kernels
from fulmen.ops.scores.reference import index_scores_reference
from fulmen.ops.topk.reference import select_topk_reference
from tests.ops.ops_cases import assert_near, normal
from tests.ops.paged.request_cases import (
    DEVICE,
    INDEX_APART,
    PADDING,
    REQUEST_SHAPES,
    REQUEST_STEPS,
    attended,
    request_case,
    rows_in,
    there,
)
from tests.ops.paged.test_paged_decode import SHAPES, copied, decode_case

ROOT = Path(__file__).parents[3]
TOPK, DENSE_UP_TO = 6, 9
pytestmark = pytest.mark.usefixtures("triton_runs")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("step", "shape", "dtype", "changed"),
    [
        ("decodes", REQUEST_SHAPES[0], torch.float32, True),
        ("drafts", REQUEST_SHAPES[2], torch.bfloat16, False),
        ("prompt", REQUEST_SHAPES[1], torch.bfloat16, True),
        ("mixed", REQUEST_SHAPES[3], torch.float32, False),
        ("padded", REQUEST_SHAPES[1], torch.float32, False),
    ],
    ids=str,
)
def test_a_step_is_that_of_the_reference(step, shape, dtype, changed):
    """Caches are poisoned where no key lies; padding is 0."""
    more = {"softcap": 1.5, "sinks_H": normal(shape[0], seed=9, dtype=dtype)} if changed else {}
    case = request_case(shape, REQUEST_STEPS[step], TOPK, DENSE_UP_TO, dtype, **more)
    expected = attended("reference", *case)
    assert not expected[-PADDING:].any()
    assert_near(attended("triton", *map(there, case)).cpu(), expected, dtype)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", ["numbers", "plateaus", "nan"])
def test_selection_in_rounds_is_that_of_the_reference(kind):
    """Tiles of 32: of 150 keys five leave each its best, and of those two tiles theirs, and one of these."""
    from fulmen.ops.paged.triton_blocks import Queries
    from fulmen.ops.paged.triton_select import launch_paged_select

    step = [(2, 150), (1, 40), (1, 6), (0, 0)]
    _, requests, *_ = request_case(REQUEST_SHAPES[1], step, TOPK, TOPK)
    scores = {"numbers": normal(4, 150), "plateaus": normal(4, 150).relu().round() * -1}.get(kind)
    if scores is None:
        scores = normal(4, 150).round()
        scores = scores / (0 * scores)
    stop = torch.tensor([149, 150, 40, 6])
    visible = torch.where(torch.arange(150) < stop[:, None], scores, torch.inf)  # poisoned beyond
    for topk in (1, 7):
        chosen = torch.full((4, topk), -7, dtype=torch.int32, device=DEVICE)
        queries = Queries(there(requests), slice(0, 4), 7, 150)
        launch_paged_select(visible.to(DEVICE), queries, topk, chosen)
        expected = select_topk_reference(scores[None], torch.zeros(1, 4).long(), stop[None], topk)[0]
        assert torch.equal(chosen[:3].cpu(), expected[:3])
        assert (chosen[3] == -7).all()  # sees too few to select


@pytest.mark.usefixtures("small_tiles")
def test_scores_from_packed_rows_are_those_of_the_numbers_and_of_no_others():
    from fulmen.ops.paged.triton_blocks import Queries
    from fulmen.ops.paged.triton_scores import PagedIndex, launch_paged_scores

    step = [(1, 61), (3, 40), (1, 5)]
    layer, requests, _, index = request_case(REQUEST_SHAPES[0], step, TOPK, DENSE_UP_TO)
    index.q_TJE[2, 1, 3] = torch.inf
    scores = torch.full((3, 61), -7.0, device=DEVICE)
    scored = PagedIndex(*there(index)[:3], layer.packed_RX.to(DEVICE), requests.index_rows_per_block)
    launch_paged_scores(scored, Queries(there(requests), slice(0, 3), DENSE_UP_TO, 61), scores)
    for token, request, stop in [(0, 0, 61), (1, 1, 38), (2, 1, 39)]:
        packed = layer.packed_RX[rows_in(requests, request, torch.arange(stop), INDEX_APART)]
        k_1SIE = unpack_index_keys(packed.unflatten(-1, (3, -1)))[None]
        own = (x[None, token : token + 1] for x in index[:3])
        q_11JE, w_11J, b_11J = own
        interval = (torch.zeros(1, 1).long(), torch.tensor([[stop]]))
        expected = index_scores_reference(q_11JE, k_1SIE, w_11J, b_11J, *interval).scores_BTS[0, 0]
        assert_near(scores[token, :stop].cpu(), expected, torch.float32)
        assert (scores[token, stop:] == -7).all()


@pytest.mark.usefixtures("small_tiles")
def test_prompts_are_selected_for_some_tokens_at_a_time(monkeypatch):
    from fulmen.ops.paged import triton_requests

    layer, requests, _, index = map(there, request_case(REQUEST_SHAPES[3], [(1, 30), (12, 50)], TOPK, 9))
    expected = triton_requests.select_keys(layer, requests, index)[:13]
    monkeypatch.setattr(triton_requests, "HELD_PAGED_SCORES", 5 * 50)
    assert torch.equal(triton_requests.select_keys(layer, requests, index)[:13], expected)


@pytest.mark.usefixtures("small_tiles")
def test_a_request_has_the_same_bits_alone_and_in_a_batch():
    layer, requests, q_THD, index = map(
        there, request_case(REQUEST_SHAPES[1], [(1, 40), (1, 7), (2, 44)], 6, 9)
    )
    together = attended("triton", layer, requests, q_THD, index)
    one = dataclasses.replace(
        requests,
        block_BN=requests.block_BN[2:],
        start_Z=requests.start_Z[2:] - 2,
        length_B=requests.length_B[2:],
        most_keys=48,
    )
    own = (None if x is None else x[2:4] for x in index)
    assert torch.equal(attended("triton", layer, one, q_THD[2:4], type(index)(*own)), together[2:4])


def test_keys_that_weigh_nothing_are_no_number_and_others_are():
    """All logits of a query -inf: NaN; those of one part of its keys alone: as the rest has it."""
    layer, requests, q_THD, index = request_case(REQUEST_SHAPES[1], [(1, 6), (1, 6)], TOPK, DENSE_UP_TO)
    layer.kv_RGC[..., 0] = 1
    q_THD[0, :, :] = 0
    q_THD[0, :, 0] = -torch.inf
    out = attended("triton", *map(there, (layer, requests, q_THD, index))).cpu()
    assert out[0].isnan().all()
    assert not out[1:].isnan().any()


@pytest.mark.parametrize(
    ("shape", "dtype"), [(SHAPES[0], torch.float32), (SHAPES[2], torch.bfloat16)], ids=str
)
def test_tokens_are_stored_to_the_bit_and_padding_is_not(shape, dtype):
    layer, (_, tokens, _), _ = decode_case(shape, 300, 8, 8, dtype)
    names = ("q", "k", "v", "index_q", "index_k")
    heads = [normal(2, *layer.shapes[name], seed=i, dtype=dtype) for i, name in enumerate(names)]
    heads[4][0, 0, 1] = torch.nan
    heads[2] = heads[2].mT.contiguous().mT
    ours = there(copied(layer))
    with pin_backend("torch"):
        expected = store_tokens(layer, tokens, *heads)
    with pin_backend("triton"):
        found = store_tokens(ours, there(tokens), *map(there, heads))
        nowhere = dataclasses.replace(
            tokens, rows_T=tokens.rows_T - 10**6, index_rows_T=tokens.rows_T - 10**6
        )
        store_tokens(ours, there(nowhere), *map(there, [2 * x for x in heads]))
    assert torch.equal(found[0].cpu(), expected[0])
    assert torch.equal(found[1].cpu(), expected[1])
    assert torch.equal(ours.kv_RGC.cpu(), layer.kv_RGC)
    numbers = [
        unpack_index_keys(x.packed_RX.cpu().unflatten(-1, (shape[4], -1))).nan_to_num(-7)
        for x in (ours, layer)
    ]
    assert torch.equal(*numbers)


def test_what_has_no_kernel_is_refused_with_what_would_work(monkeypatch):
    layer, requests, q_THD, index = request_case(REQUEST_SHAPES[1], [(1, 30)], TOPK, DENSE_UP_TO)
    monkeypatch.setattr("fulmen.ops.paged.requests.reason_against_backend", lambda *given: None)
    for shape, message in (
        ((320, 64), "head_dim=320 has no kernel, widths up to 256 have; serve it on a CPU"),
        ((64, 9000), "topk=9000 has no kernel, up to 8192 have; convert with a lower --topk"),
    ):
        with pytest.raises(BackendError, match=rf"layer 3 cannot be served on device 'cuda': {message}"):
            require_paged_kernels("layer 3", "cuda", torch.bfloat16, *shape)
    require_paged_kernels("layer 3", "cuda", torch.bfloat16, 256, 8192)
    with pytest.raises(BackendError, match="'triton' cannot run attend_requests: topk=9000 has no kernel"):
        attended("triton", dataclasses.replace(layer, topk=9000), requests, q_THD, index)
    with pytest.raises(ConfigError, match="most_keys=30 is above dense_up_to=9: give `index`"):
        attended("triton", layer, requests, q_THD, None)
    with pytest.raises(ConfigError, match="start_Z has 1 numbers; 1 requests need one more"):
        dataclasses.replace(requests, start_Z=requests.start_Z[:1])
    with pytest.raises(ConfigError, match="most_keys=99; the blocks of block_BN hold 36"):
        dataclasses.replace(requests, most_keys=99)
    with pytest.raises(ConfigError, match=r"q_THD has shape \(4, 4, 19\)"):
        attended("triton", layer, requests, q_THD[..., :19], index)


@pytest.mark.skipif(DEVICE == "cuda", reason="counted by the interpreter")
def test_decoding_loads_and_stores_little_more_than_it_must():
    """Figures of other lengths and models: docs/gpu.md, by the same program."""
    from benchmarks.gpu.shapes import MODELS
    from benchmarks.gpu.traffic import decode_traffic

    shape = MODELS["smollm2"]._replace(topk=128)
    assert decode_traffic(shape, 4096).over_floor < 1.25
    two_levels = MODELS["smollm2-two-level"]._replace(topk=192)
    assert decode_traffic(two_levels, 8192).over_floor < 1.25


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled when they run")
def test_every_kernel_of_a_step_compiles_for_a_gpu_without_spilling():
    """Other GPUs and models: docs/gpu.md, by the same program, which fails if one spills."""
    # In two levels every kernel of one level starts, too.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    steps = "compile_model('sm_90', 'qwen3-8b-two-level', ('decode', 'prompt'))"
    program = f"from benchmarks.gpu.compiled import *\nfor x in {steps}: print(*x)"
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
    kernels = {tuple(line.split()[2:4]): line.split()[4:] for line in run.stdout.splitlines()}
    always = {"paged_store", "paged_index", "paged_scores", "paged_select", "paged_attend"}
    always |= {"paged_count", "paged_candidates", "paged_fine"}
    assert kernels.keys() == {
        *(("decode", name) for name in (*always, "paged_merge")),
        *(("prompt", name) for name in (*always, "paged_dense")),
    }
    for registers, spilled, shared in kernels.values():
        assert int(registers) <= 255
        assert int(spilled) == 0
        assert int(shared) <= 227 * 1024
