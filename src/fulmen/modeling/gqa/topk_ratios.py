"""How the layers of a GQA model share the budget of k keys.

Layers differ by two orders of magnitude in what the best k keys miss: in SmolLM2's first layer attention is
spread thin, in most others a fraction of k would do. With the mean of the layers' k held fixed, the cost is
that of an even split, and the loss over dense is a fifth to a quarter smaller (docs/log.md). For layer i

    e_i(k) = ||o_i(k) - o_i||² / ||o_i||² * (||o_i|| / ||r_i||)

with o_i the attention's output (Gemma's normed, as it enters the stream), o_i(k) the same over the k keys of
most mean attention, r_i the residual stream it is added to: an error counts by its size in the output and by
what the output is to the stream. The ratios minimise the sum of e_i(k_i).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fulmen.modeling.gqa.own_logits import own_logits
from fulmen.modeling.selectors import DenseSelector, dsa_attentions, use_selector
from fulmen.ops.attention.sinks import softmax_with_sinks
from fulmen.ops.common.intervals import selection_mask
from fulmen.ops.common.rope import apply_rope

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
    ks = [round(ratio * topk) for ratio in tried]
    with use_selector(model, DenseSelector()), _streams(model) as stream:

        def measure(attention: Any, _: Any, kwargs: dict) -> None:
            on_layer(attention.layer_idx, _errors(attention, kwargs, stream["BTC"], ks))

        layers = dsa_attentions(model)
        hooks = [layer.register_forward_pre_hook(measure, with_kwargs=True) for layer in layers]
        try:
            model.base_model(input_ids_BT, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()


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


def _errors(attention: Any, kwargs: dict, stream_BTC: Tensor, ks: list[int]) -> list[float]:
    """e(k) of one layer for each k, the mean over sequences and queries."""
    heads = attention.heads(**kwargs)
    q_BTHD, k_BTGD = (apply_rope(x, *heads.rotary).float() for x in heads[:2])
    length = q_BTHD.shape[1]
    rows_R = torch.linspace(length // 2, length - 1, MEASURED_QUERIES, device=q_BTHD.device).long().unique()
    gate_BRN = [None] * len(q_BTHD) if heads.gate_BTN is None else heads.gate_BTN[:, rows_R].float()
    logits = (attention.softmax[0], attention.softmax[1])
    found = [
        _sequence_errors(attention, own_logits(q, k, rows_R, *logits), v.float(), gate, r[rows_R], ks)
        for q, k, v, gate, r in zip(q_BTHD, k_BTGD, heads.v_BTGD, gate_BRN, stream_BTC.float(), strict=True)
    ]
    return torch.stack(found).mean(0).tolist()


def _sequence_errors(
    attention: Any,
    logits_HRS: Tensor,
    v_TGV: Tensor,
    gate_RN: Tensor | None,
    stream_RC: Tensor,
    ks: list[int],
) -> Tensor:
    output = partial(_output, attention, v_SGV=v_TGV[: logits_HRS.shape[-1]], gate_RN=gate_RN)
    dense_RC = output(logits_HRS)
    best_RK = softmax_with_sinks(logits_HRS, attention.softmax[2]).mean(0).topk(max(ks), dim=-1).indices
    size = dense_RC.norm() * stream_RC.norm()
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
