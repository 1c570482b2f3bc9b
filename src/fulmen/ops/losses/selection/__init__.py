"""The loss that trains an indexer to keep what its model's output needs."""

from typing import Any

from torch import Tensor

from fulmen.config import require_positive_int
from fulmen.errors import ConfigError
from fulmen.ops.common.checks import (
    check_axes,
    check_floating,
    check_loss_inputs,
    check_same_device,
    check_softmax_changes,
)
from fulmen.ops.common.precision import math_dtype, outside_autocast
from fulmen.ops.dispatch import implementation, implements_by_name
from fulmen.ops.losses.selection.reference import selection_loss_reference
from fulmen.ops.losses.selection.torch_blocked import selection_loss_blocked

implements_by_name("selection_loss", "triton", "fulmen.ops.losses.selection.triton:selection_loss_triton")


def selection_loss(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    attn_q_BTHD: Tensor,
    attn_k_BSGD: Tensor,
    attn_v_BSGV: Tensor,
    out_weight_CN: Tensor,
    start_BT: Tensor,
    stop_BT: Tensor,
    topk: int,
    scale: float,
    temperature: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    out_gate_BTN: Tensor | None = None,
) -> Tensor:
    """Relative squared change of the attention's output if keys fade out softly at the cut of the selection.

    With g[t,s] = sigmoid((I[t,s] - cut[t]) / temperature), cut[t] being the mean of the scores ranked k/2 to
    3k/2, each head's softmax runs over l[t,s] + log g[t,s]. The loss is ||W (o' - o)||² / ||W o||² with o the
    dense output of all heads and o' the one with the keys' gates. Where the attention has a gate u of its own
    on the output (Qwen3-Next), u * o stands for o: what u closes costs nothing. Unlike a KL to the mean
    attention the loss weighs keys by what their values do, head by head, and asks nothing of the order within
    the set. A query with at most `topk` keys has loss 0. (fulmen's own; no paper.)

    Args:
        q_BTJE, k_BSIE, w_BTJ, b_BTJ: the indexer's inputs, as for `index_scores`; they carry the gradient.
        attn_q_BTHD, attn_k_BSGD, attn_v_BSGV: the attention's own after RoPE; no gradient.
        out_weight_CN: the output projection W, N = H V.
        start_BT, stop_BT: int32 or int64; query t sees the keys start <= s < stop.
        topk: size of the selection (k).
        scale: factor on q.k of the attention.
        temperature: width of the cut, in units of the index score.
        softcap, sinks_H: of the attention, as for `dense_attention`; l is capped, and a sink has no gate.
        out_gate_BTN: u, the attention's gate on the outputs of all heads; no gradient. None: there is none.

    Returns:
        loss_BT, float32 (float64 for float64 inputs); differentiable in the indexer's inputs.

    Raises:
        ConfigError: axes, heads, dtypes or devices that do not fit together, or a topk below 1.
        BackendError: a pinned backend that cannot run here.
    """
    require_positive_int("topk", topk)
    index_inputs = {"q_BTJE": q_BTJE, "k_BSIE": k_BSIE, "w_BTJ": w_BTJ, "b_BTJ": b_BTJ}
    attention_inputs = {"attn_q_BTHD": attn_q_BTHD.detach(), "attn_k_BSGD": attn_k_BSGD.detach()}
    check_loss_inputs(index_inputs, attention_inputs, start_BT=start_BT, stop_BT=stop_BT)
    # Of dtypes of their own: under autocast, values and weights may differ from what RoPE has touched.
    outputs = {"attn_v_BSGV": attn_v_BSGV, "out_weight_CN": out_weight_CN}
    if out_gate_BTN is not None:
        outputs["out_gate_BTN"] = out_gate_BTN
    check_axes(**attention_inputs, **outputs)
    check_floating(**outputs)
    check_same_device(**attention_inputs, **outputs)
    check_softmax_changes(attn_q_BTHD, softcap, sinks_H)
    if out_weight_CN.shape[1] != (n := attn_q_BTHD.shape[2] * attn_v_BSGV.shape[3]):
        raise ConfigError(
            f"out_weight_CN has N={out_weight_CN.shape[1]}, the heads' values {n}; make them equal"
        )
    dtype = math_dtype(q_BTJE.dtype)
    index = [None if x is None else x.to(dtype) for x in (q_BTJE, k_BSIE, w_BTJ, b_BTJ)]
    attention = [x.detach().to(dtype) for x in (attn_q_BTHD, attn_k_BSGD, attn_v_BSGV, out_weight_CN)]
    ends = (start_BT.clamp(min=0), stop_BT.clamp(max=k_BSIE.shape[1]))
    sinks_H, out_gate_BTN = (None if x is None else x.detach().to(dtype) for x in (sinks_H, out_gate_BTN))
    arguments: Any = (*index, *attention, *ends, topk, scale, temperature, softcap, sinks_H, out_gate_BTN)
    backend = implementation("selection_loss", q_BTJE.device, q_BTJE.dtype)
    with outside_autocast(q_BTJE.device):
        return backend.run(*arguments)
