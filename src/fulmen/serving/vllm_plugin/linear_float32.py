"""Linear attention in float32 on a CPU, where vLLM's kernels take bfloat16 alone: by Transformers' functions.

vLLM's layer makes queries, keys, values and gates before, and the output after; what lies between is one
operation, on the states that it keeps for each request.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.ops.cpu import causal_conv1d, gdn_attention
from vllm.utils.torch_utils import _resolve_layer_name, vllm_lib

# vLLM's own.
OPERATION = "cpu_gdn_attention_core"


def take_its_place() -> None:
    """Compute vLLM's operation here, once it has a layer that needs it. May be called again."""
    vllm_lib.impl(OPERATION, linear_attention, dispatch_key="CPU", allow_override=True)


def linear_attention(mixed_qkv: Tensor, b: Tensor, a: Tensor, core_attn_out: Tensor, layer_name: Any) -> None:
    """In place of vLLM's operation of this signature, which it is for bfloat16."""
    context, name = get_forward_context(), _resolve_layer_name(layer_name)
    layer: Any = context.no_compile_layers[name]
    if mixed_qkv.dtype != torch.float32:
        gdn_attention.cpu_gdn_attention_core(mixed_qkv, b, a, core_attn_out, layer_name)
    elif context.attn_metadata is not None:  # else vLLM measures memory
        step: Any = context.attn_metadata
        _attend(layer, step[name], mixed_qkv, b, a, core_attn_out)


class _Requests(NamedTuple):
    """Some of a step's requests, in one layer of linear attention.

    Attributes:
        rows_B: of the states. start_Z: where each one's tokens begin, and the last one's end.
        x_TX: queries, keys and values before the convolution. out_THD: to be filled.
        g_TH, beta_TH: logarithms of decays, and learning rates.
        conv_RXL, state_RHED: all states, written in place.
    """

    rows_B: Tensor
    start_Z: Tensor
    x_TX: Tensor
    g_TH: Tensor
    beta_TH: Tensor
    conv_RXL: Tensor
    state_RHED: Tensor
    out_THD: Tensor


def _attend(layer: Any, step: Any, x_TX: Tensor, b_TH: Tensor, a_TH: Tensor, out_THD: Tensor) -> None:
    """Requests that decode come first, then those that read their prompts."""
    g_TH, beta_TH = -layer.A_log.exp() * softplus(a_TH + layer.dt_bias), b_TH.sigmoid()
    states = gdn_attention._conv_buffer_view(layer), gdn_attention._ssm_state_view(layer)
    rows_B, start_Z = step.non_spec_state_indices_tensor, step.non_spec_query_start_loc
    decoded, end = step.num_decodes, step.num_decodes + step.num_prefills
    if decoded:
        own = slice(decoded)
        tokens = (x_TX[own], g_TH[own], beta_TH[own])
        _decode(layer, _Requests(rows_B[own], start_Z[: decoded + 1], *tokens, *states, out_THD[own]))
    if end > decoded:
        start_Z = start_Z[decoded : end + 1]
        own = slice(int(start_Z[0]), int(start_Z[-1]))
        tokens = (x_TX[own], g_TH[own], beta_TH[own])
        new = _Requests(rows_B[decoded:end], start_Z - start_Z[0], *tokens, *states, out_THD[own])
        _read_prompts(layer, new, step.has_initial_state[decoded:end])


def _decode(layer: Any, new: _Requests) -> None:
    """One token each."""
    x_BX = causal_conv1d.causal_conv1d_update_cpu(
        new.x_TX.contiguous(),
        new.conv_RXL,
        layer.conv1d.weight[:, 0],
        layer.conv1d.bias,
        layer.activation,
        conv_state_indices=new.rows_B,
    )
    inputs = (x_BX[:, None], new.g_TH[:, None], new.beta_TH[:, None], new.state_RHED[new.rows_B])
    out_B1HD, new.state_RHED[new.rows_B] = _rule(torch_recurrent_gated_delta_rule, layer, *inputs)
    new.out_THD.copy_(out_B1HD[:, 0])


def _read_prompts(layer: Any, new: _Requests, continued_B: Tensor) -> None:
    """Several tokens each; those that are continued have a state."""
    x_TX = causal_conv1d.causal_conv1d_fn_cpu(
        new.x_TX.T,
        layer.conv1d.weight[:, 0],
        layer.conv1d.bias,
        new.conv_RXL,
        new.start_Z,
        new.rows_B,
        continued_B,
        layer.activation,
    ).T
    requests = zip(pairwise(new.start_Z.tolist()), new.rows_B, continued_B, strict=True)
    for (begin, end), row, continued in requests:
        own = slice(begin, end)
        # The blocks of a new request hold anything.
        state_1HED = new.state_RHED[row][None] if continued else None
        inputs = (x_TX[None, own], new.g_TH[None, own], new.beta_TH[None, own], state_1HED)
        out_1THD, last_1HED = _rule(torch_chunk_gated_delta_rule, layer, *inputs)
        new.out_THD[own], new.state_RHED[row] = out_1THD[0], last_1HED[0]


def _rule(
    rule: Callable[..., tuple[Tensor, Tensor]],
    layer: Any,
    x_BTX: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    state_BHED: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out_BTHD and the state after it, of queries, keys and values side by side."""
    keys, values = layer.key_dim // layer.tp_size, layer.value_dim // layer.tp_size
    q_BTX, k_BTX, v_BTX = x_BTX.split((keys, keys, values), -1)
    v_BTHD = v_BTX.unflatten(-1, (-1, layer.head_v_dim))
    q_BTHE, k_BTHE = (
        part.unflatten(-1, (-1, layer.head_k_dim)).repeat_interleave(
            layer.num_v_heads // layer.num_k_heads, 2
        )
        for part in (q_BTX, k_BTX)
    )
    asked = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    return rule(q_BTHE, k_BTHE, v_BTHD, g=g_BTH, beta=beta_BTH, initial_state=state_BHED, **asked)
