"""How the layers of a GQA model share the budget of k keys.

Layers differ by two orders of magnitude in what the best k keys miss: in SmolLM2's first layer attention is
spread thin, in most others a fraction of k would do. With the mean of the layers' k held fixed, the cost is
that of an even split, and the loss over dense is a fifth to a quarter smaller (docs/log.md). For layer i

    e_i(k) = ||o_i(k) - o_i||² / ||o_i||² * (||o_i|| / ||r_i||)

with o_i the attention's output (Gemma's normed, as it enters the stream), o_i(k) the same over the k keys
that the layer's own inherited index ranks first, r_i the residual stream it is added to: an error counts by
its size in the output and by what the output is to the stream. The ratios minimise the sum of e_i(k_i). Texts
that are spread over the context (`calibration`) decide where there are any: an index that finds less far out
gets more keys.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fulmen.modeling.gqa.calibration import read_densely
from fulmen.modeling.gqa.inherit import Observation, fit_index, logits_of, observe, ranking_scores
from fulmen.modeling.selectors import dsa_attentions
from fulmen.ops.attention.sinks import softmax_with_sinks
from fulmen.ops.common.intervals import selection_mask

# Budgets tried, in units of k, and the least that a layer gets.
TRIED_RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
LEAST_RATIO = 0.5
STEP_RATIO = 0.125
# Queries of a text, all from its second half.
MEASURED_QUERIES = 24


def fit_topk_ratios(
    model: PreTrainedModel,
    input_ids_BT: Tensor,
    topk: int,
    on_layer: Callable[[int], None] = lambda _: None,
) -> tuple[float, ...]:
    """Each converted layer's k in units of `topk`, mean 1, from one dense pass over some sequences.

    Args:
        input_ids_BT: int64 token ids of B sequences; 1.0 for all layers if T is below 4 `topk`.
        on_layer: called with the number of layers measured after each, for progress.
    """
    tried = ratios_to_try(input_ids_BT.shape[1], topk)
    if not tried:
        return (1.0,) * len(dsa_attentions(model))
    errors: list[list[float]] = []

    def note(_: int, found: list[float]) -> None:
        errors.append(found)
        on_layer(len(errors))

    measure_topk_errors(model, input_ids_BT, topk, tried, note)
    return least_error_ratios(np.array(errors), np.array(tried))


def ratios_to_try(length: int, topk: int) -> list[float]:
    """Budgets in units of `topk`, ascending, that texts of `length` tokens tell apart; none: they do not."""
    tried = [ratio for ratio in TRIED_RATIOS if ratio * topk <= length // 2 and round(ratio * topk) > 0]
    return tried if max(tried, default=0) >= 2 else []


@torch.no_grad()
def measure_topk_errors(
    model: PreTrainedModel,
    input_ids_BT: Tensor,
    topk: int,
    tried: Sequence[float],
    on_layer: Callable[[int, list[float]], None],
) -> None:
    """One dense pass; `on_layer` is told each layer's number and its error at each ratio of `tried`."""

    def measure(attention: Any, kwargs: dict, position_BT: Tensor) -> None:
        heads = attention.heads(**kwargs)
        observations = observe(attention, kwargs["hidden_states"], heads, topk, position_BT)
        gates = [None] * len(observations) if heads.gate_BTN is None else list(heads.gate_BTN)
        # A spread text keeps a smaller share: that of the context.
        least = min(one.topk for one in observations)
        with _kept(attention.indexer):
            fit_index(attention, observations)
            found = [
                _errors(attention, one, v_TGV.float(), gate_TN, stream_TC.float(), tried)
                for one, v_TGV, gate_TN, stream_TC in zip(
                    observations, heads.v_BTGD, gates, stream["BTC"], strict=True
                )
                if one.topk == least
            ]
        on_layer(attention.layer_idx, torch.stack(found).mean(0).tolist())

    with _streams(model) as stream:
        read_densely(model, input_ids_BT, measure)


def least_error_ratios(errors_LK: np.ndarray, tried_K: np.ndarray) -> tuple[float, ...]:
    """Shares of mean 1 with the least sum of errors, step by step to the layer that gains most.

    Args:
        errors_LK: error of each layer at each ratio of `tried_K` (ascending); power laws in between.
    """
    log_errors_LK = np.log(np.maximum(np.minimum.accumulate(errors_LK, axis=1), 1e-12))

    def error(layer: int, ratio: float) -> float:
        return float(np.exp(np.interp(np.log(ratio), np.log(tried_K), log_errors_LK[layer])))

    def gain(layer: int) -> float:
        more = ratios[layer] + STEP_RATIO
        return error(layer, ratios[layer]) - error(layer, more) if more <= tried_K[-1] else -1.0

    n_layers = len(errors_LK)
    ratios = [LEAST_RATIO] * n_layers
    gains = [gain(layer) for layer in range(n_layers)]
    for _ in range(round(n_layers * (1 - LEAST_RATIO) / STEP_RATIO)):
        best = int(np.argmax(gains))
        ratios[best] += STEP_RATIO
        gains[best] = gain(best)
    return tuple(ratios)


@contextmanager
def _streams(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """While the model runs: the residual stream that enters the decoder layer at hand, as "BTC"."""
    stream: dict[str, Tensor] = {}

    def note(_: Any, args: tuple, kwargs: dict) -> None:
        stream["BTC"] = args[0] if args else kwargs["hidden_states"]

    decoder_layers = [module for module in model.modules() if hasattr(module, "self_attn")]
    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in decoder_layers]
    try:
        yield stream
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _kept(indexer: nn.Module) -> Iterator[None]:
    """Let an indexer be changed in the `with` block, and be as it was after it."""
    before = {name: tensor.clone() for name, tensor in indexer.state_dict().items()}
    try:
        yield
    finally:
        for name, tensor in indexer.state_dict().items():
            tensor.copy_(before[name])


def _errors(
    attention: Any,
    observation: Observation,
    v_TGV: Tensor,
    gate_TN: Tensor | None,
    stream_TC: Tensor,
    tried: Sequence[float],
) -> Tensor:
    """e(k) of one layer in one text for each ratio, the mean over queries of its second half."""
    rows_R = observation.rows_R
    late_R = (rows_R >= len(v_TGV) // 2).nonzero()[:, 0]
    some_R = late_R[torch.linspace(0, len(late_R) - 1, MEASURED_QUERIES).long().unique()]
    logits_HRS = logits_of(attention, observation, some_R)
    gate_RN = None if gate_TN is None else gate_TN[rows_R[some_R]].float()
    output = partial(_output, attention, v_SGV=v_TGV[: logits_HRS.shape[-1]], gate_RN=gate_RN)
    dense_RC = output(logits_HRS)
    ks = [max(1, round(ratio * observation.topk)) for ratio in tried]
    scores_RS = ranking_scores(attention, observation, some_R)
    best_RK = scores_RS.topk(min(max(ks), scores_RS.shape[-1]), dim=-1).indices
    size = dense_RC.norm() * stream_TC[rows_R[some_R]].norm()
    errors = []
    for k in ks:
        left_out_RS = ~selection_mask(best_RK[:, :k], logits_HRS.shape[-1])
        sparse_RC = output(logits_HRS.masked_fill(left_out_RS, -torch.inf))
        errors.append((sparse_RC - dense_RC).square().sum() / size.clamp_min(1e-30))
    return torch.stack(errors)


def _output(attention: Any, logits_HRS: Tensor, v_SGV: Tensor, gate_RN: Tensor | None) -> Tensor:
    """What the attention adds to the residual stream, `[R, C]`."""
    probs_HRS = softmax_with_sinks(logits_HRS, attention.softmax[2])
    probs_GMRS = probs_HRS.unflatten(0, (v_SGV.shape[1], -1))
    heads_RN = torch.einsum("gmrs,sgv->rgmv", probs_GMRS, v_SGV).flatten(1)
    if gate_RN is not None:
        heads_RN = heads_RN * gate_RN
    return attention.to_stream(heads_RN @ attention.o_proj.weight.float().T)
