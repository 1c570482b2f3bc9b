"""The paged kernels on this machine's GPU against the specification, before anything is timed."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.shapes import ModelShape, decoding_step
from fulmen.ops.dispatch import pin_backend
from fulmen.ops.paged.layer import NewTokens, PagedLayer, store_tokens
from fulmen.ops.paged.requests import attend_requests
from fulmen.ops.paged.triton_blocks import Queries
from fulmen.ops.paged.triton_requests import coarse_index, select_keys
from fulmen.ops.paged.triton_scores import PagedIndex, launch_paged_fine, launch_paged_scores
from fulmen.ops.topk.reference import select_topk_reference

# Near in bfloat16, whose results are rounded to 8 bits.
CLOSE = 2e-2


def check_attention(shape: ModelShape, device: str, queries: int, length: int) -> str | None:
    """A step of three requests of unequal lengths, one of them padding."""
    layer, requests, q_THD, index = decoding_step(shape, 3, length, device, queries)
    start_Z = torch.tensor([0, queries, 2 * queries, 2 * queries], dtype=torch.int32, device=device)
    lengths = [length, max(length // 3, queries), 0]
    length_B = torch.tensor(lengths, dtype=torch.int32, device=device)
    requests = dataclasses.replace(requests, start_Z=start_Z, length_B=length_B)
    found, wanted = torch.full_like(q_THD, torch.nan), torch.empty_like(q_THD)
    with pin_backend("triton"):
        attend_requests(layer, requests, q_THD, index, found)
    with pin_backend("torch"):
        attend_requests(layer, requests, q_THD, index, wanted)
    # Two keys that score within a rounding may change places; then a query differs a little, and few do.
    differs_T = (found.float() - wanted.float()).abs().amax((1, 2)) > CLOSE
    differs_T |= found.isnan().any(-1).any(-1)
    return f"{int(differs_T.sum())} of {len(found)} queries differ" if differs_T.any() else None


def check_selection(shape: ModelShape, device: str, length: int) -> str | None:
    """Of the kernels' own scores, whose ties are many: exactly the rule's."""
    layer, requests, _, index = decoding_step(shape, 1, length, device, queries=2)
    index = index._replace(b_TJ=index.b_TJ - 2)
    chosen_TK = select_keys(layer, requests, index)
    stop_T = torch.tensor([length - 1, length])
    queries = Queries(requests, slice(0, 2), layer.topk, length)
    fine = PagedIndex(*index[:3], layer.packed_RX, requests.index_rows_per_block)
    if layer.coarse is None:
        positions_TC = torch.arange(length).expand(2, -1)
        wanted_TK = best_of(scores_of(fine, queries), positions_TC, stop_T, layer.topk)
    else:
        coarse_TS = scores_of(coarse_index(layer, requests, index), queries)
        count, everywhere_TS = layer.coarse.n_candidates, torch.arange(length).expand(2, -1)
        candidates_TC = best_of(coarse_TS, everywhere_TS, stop_T, count)
        fine_TC = torch.empty(candidates_TC.shape, device=device)
        launch_paged_fine(fine, queries, candidates_TC.to(device), fine_TC)
        wanted_TK = best_of(fine_TC, candidates_TC, torch.full((2,), count), layer.topk)
    return None if torch.equal(chosen_TK.cpu(), wanted_TK) else "other keys are selected than by the rule"


def scores_of(index: PagedIndex, queries: Queries) -> Tensor:
    """The kernel's scores of all keys."""
    size = (queries.n_tokens, queries.most_keys)
    scores_TS = torch.full(size, -torch.inf, device=index.q_TJE.device)
    launch_paged_scores(index, queries, scores_TS)
    return scores_TS


def best_of(scores_TS: Tensor, positions_TS: Tensor, stop_T: Tensor, topk: int) -> Tensor:
    """int32, on the host: the positions of the `topk` best of the first `stop_T` scores, by the rule."""
    given = (scores_TS[None].cpu(), torch.zeros_like(stop_T)[None], stop_T[None])
    return positions_TS.gather(1, select_topk_reference(*given, topk)[0].long()).int()


def check_store(shape: ModelShape, device: str) -> str | None:
    """Rotated queries, keys, values and packed index keys, to the bit."""
    layer, _, _, _ = decoding_step(shape, 1, 64, device)
    generator = torch.Generator(device).manual_seed(1)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=torch.bfloat16)

    rows_T = torch.randperm(64, generator=generator, device=device)[:5]
    angles_TP = normal(5, shape.width // 2).float()
    angles = (angles_TP.cos().bfloat16(), angles_TP.sin().bfloat16())
    tokens, names = NewTokens(rows_T, rows_T, *angles), ["q", "k", "v", "index_q", "index_k"]
    if layer.coarse is not None:
        tokens, names = NewTokens(rows_T, rows_T, *angles, rows_T), [*names, "coarse_q", "coarse_k"]
    heads = [normal(5, *layer.shapes[name]) for name in names]
    made = []
    for backend in ("torch", "triton"):
        own = _with_own_caches(layer)
        with pin_backend(backend):
            rotated = store_tokens(own, tokens, *heads)
        coarse_RX = None if own.coarse is None else own.coarse.packed_RX
        made.append((*rotated, own.kv_RGC, own.packed_RX, coarse_RX))
    parts = ("q", "index_q", "coarse_q", "kv", "index keys", "coarse keys")
    wrong = [name for name, a, b in zip(parts, *made, strict=True) if a is not None and not _same(a, b)]
    return f"not the same bits: {', '.join(wrong)}" if wrong else None


def check_graph(shape: ModelShape, device: str, length: int) -> str | None:
    """A CUDA graph, captured for one step, replays another one's numbers."""
    layer, requests, q_THD, index = decoding_step(shape, 2, length, device)
    out_THD = torch.empty_like(q_THD)

    def step() -> None:
        with pin_backend("triton"):
            attend_requests(layer, requests, q_THD, index, out_THD)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    requests.length_B.copy_(torch.tensor([length // 2, 5], dtype=torch.int32))
    graph.replay()
    replayed = out_THD.clone()
    step()
    return None if torch.equal(replayed, out_THD) else "a replay gives other numbers than an eager step"


def _with_own_caches(layer: PagedLayer) -> PagedLayer:
    coarse = layer.coarse
    if coarse is not None:
        coarse = dataclasses.replace(coarse, packed_RX=coarse.packed_RX.clone())
    kv_RGC, packed_RX = layer.kv_RGC.clone(), layer.packed_RX.clone()
    return dataclasses.replace(layer, kv_RGC=kv_RGC, packed_RX=packed_RX, coarse=coarse)


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a.nan_to_num(-7), b.nan_to_num(-7)) if a.is_floating_point() else torch.equal(a, b)


def failure_of(check: Callable[..., str | None], *arguments: Any) -> str | None:
    """What a check found; what it raises is a failure too, as a kernel that does not compile."""
    try:
        return check(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
