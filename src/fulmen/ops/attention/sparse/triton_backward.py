"""The backward pass of sparse attention by Triton kernels.

One kernel goes over the queries, as forward, and recomputes their probabilities from the saved log-sum-exp.
The gradients of keys and values are sums over the queries that selected a key. That kernel adds to them
atomically, in whichever order threads come; or, under `torch.use_deterministic_algorithms(True)`, a second
kernel adds them up key by key, over its queries in ascending order, and the same inputs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fulmen.ops.cpp.library import row_major
from fulmen.ops.triton_kit import (
    KERNEL_LOG2_E,
    compile_options,
    head_tiles,
    heads_of_program,
    kernel_sizes,
    load_rows,
    load_selected,
    on_device_of,
    places_of_keys,
    power_of_2,
    product,
    tanh_of,
)


def sparse_attention_gradients(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    topk_BTK: Tensor,
    dout_BTHV: Tensor,
    lse_BTH: Tensor,
    delta_BTH: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv in float32; `topk_BTK` contiguous int32."""
    dq_BTHD, dk_BSGD, dv_BSGV = (
        torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q_BTHD, k_BSGD, v_BSGV)
    )
    gradients = (dq_BTHD, dk_BSGD, dv_BSGV)
    if not lse_BTH.numel() or not topk_BTK.numel():
        return gradients
    by_key = torch.are_deterministic_algorithms_enabled()
    inputs = (q_BTHD.contiguous(), row_major(k_BSGD), row_major(v_BSGV), dout_BTHV.contiguous())
    rows = (lse_BTH.contiguous(), delta_BTH.contiguous())
    with on_device_of(q_BTHD):
        _launch_by_query(*inputs, topk_BTK, *rows, *gradients, scale, softcap, atomic=not by_key)
        if by_key:
            _launch_by_key(*inputs, topk_BTK, *rows, dk_BSGD, dv_BSGV, scale, softcap)
    return gradients


def _launch_by_query(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    dout_BTHV: Tensor,
    topk_BTK: Tensor,
    lse_BTH: Tensor,
    delta_BTH: Tensor,
    dq_BTHD: Tensor,
    dk_BSGD: Tensor,
    dv_BSGV: Tensor,
    scale: float,
    softcap: float | None,
    atomic: bool,
) -> None:
    programs, tiles = head_tiles("attend_backward", q_BTHD, v_BSGV)
    _by_query_kernel[q_BTHD.shape[1], len(q_BTHD) * programs](
        *(q_BTHD, k_BSGD, v_BSGV, dout_BTHV, topk_BTK, lse_BTH, delta_BTH, dq_BTHD, dk_BSGD, dv_BSGV),
        *(*k_BSGD.stride()[:3], *v_BSGV.stride()[:3]),
        *(k_BSGD.shape[1], topk_BTK.shape[-1], scale, softcap or 0.0),
        CAPPED=softcap is not None,
        ATOMIC=atomic,
        **tiles,
    )


def _launch_by_key(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGV: Tensor,
    dout_BTHV: Tensor,
    topk_BTK: Tensor,
    lse_BTH: Tensor,
    delta_BTH: Tensor,
    dk_BSGD: Tensor,
    dv_BSGV: Tensor,
    scale: float,
    softcap: float | None,
) -> None:
    batch, queries, heads, width = q_BTHD.shape
    n_keys, n_key_heads, value_width = v_BSGV.shape[1:]
    sizes = kernel_sizes("key_gradients", width)
    shared = heads // n_key_heads
    block_heads = min(power_of_2(shared), sizes["rows"])
    place_BN, begin_BS = places_of_keys(topk_BTK, n_keys)
    _by_key_kernel[n_keys, batch * n_key_heads](
        *(q_BTHD, k_BSGD, v_BSGV, dout_BTHV, place_BN // topk_BTK.shape[2], begin_BS, lse_BTH, delta_BTH),
        *(dk_BSGD, dv_BSGV),
        *(*k_BSGD.stride()[:3], *v_BSGV.stride()[:3]),
        *(queries, topk_BTK.shape[1] * topk_BTK.shape[2], scale, softcap or 0.0),
        CAPPED=softcap is not None,
        KEY_HEADS=n_key_heads,
        SHARED=shared,
        WIDTH=width,
        VALUE_WIDTH=value_width,
        BLOCK_QUERIES=sizes["rows"] // block_heads,
        BLOCK_HEADS=block_heads,
        HEAD_BLOCKS=triton.cdiv(shared, block_heads),
        BLOCK_WIDTH=power_of_2(width),
        BLOCK_VALUE=power_of_2(value_width),
        **compile_options(sizes),
    )


@triton.jit
def _by_query_kernel(
    q_BTHD,
    k_BSGD,
    v_BSGV,
    dout_BTHV,
    topk_BTK,
    lse_BTH,
    delta_BTH,
    dq_BTHD,
    dk_BSGD,
    dv_BSGV,
    k_stride_b,
    k_stride_s,
    k_stride_g,
    v_stride_b,
    v_stride_s,
    v_stride_g,
    n_keys,
    n_selected,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    ATOMIC: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_FIRST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    batch, key_head, row, head_H, present_H = heads_of_program(KEY_HEADS, SHARED, BLOCK_HEADS, HEAD_BLOCKS)
    k_base = k_BSGD + batch * k_stride_b + key_head * k_stride_g
    v_base = v_BSGV + batch * v_stride_b + key_head * v_stride_g

    q_HD = load_rows(q_BTHD, head_H * WIDTH, present_H, 0, WIDTH, BLOCK_FIRST, DTYPE)
    dout_HV = load_rows(dout_BTHV, head_H * VALUE_WIDTH, present_H, 0, VALUE_WIDTH, BLOCK_VALUE, DTYPE)
    lse_H = tl.load(lse_BTH + head_H, mask=present_H, other=0.0)
    delta_H = tl.load(delta_BTH + head_H, mask=present_H, other=0.0)
    dq_HD = tl.zeros([BLOCK_HEADS, BLOCK_FIRST], tl.float32)
    if BLOCK_REST > 0:
        q_HR = load_rows(q_BTHD, head_H * WIDTH, present_H, BLOCK_FIRST, WIDTH, BLOCK_REST, DTYPE)
        dq_HR = tl.zeros([BLOCK_HEADS, BLOCK_REST], tl.float32)
    for low in range(0, n_selected, BLOCK_KEYS):
        key_K, chosen_K = load_selected(topk_BTK + row * n_selected, low, n_selected, BLOCK_KEYS)
        k_KD = load_rows(k_base, key_K * k_stride_s, chosen_K, 0, WIDTH, BLOCK_FIRST, DTYPE)
        scores_HK = product(q_HD, tl.trans(k_KD))
        if BLOCK_REST > 0:
            k_KR = load_rows(k_base, key_K * k_stride_s, chosen_K, BLOCK_FIRST, WIDTH, BLOCK_REST, DTYPE)
            scores_HK += product(q_HR, tl.trans(k_KR))
        v_KV = load_rows(v_base, key_K * v_stride_s, chosen_K, 0, VALUE_WIDTH, BLOCK_VALUE, DTYPE)
        present_HK = present_H[:, None] & chosen_K[None, :]
        logits_HK = scores_HK * scale
        if CAPPED:
            capped_HK = tanh_of(logits_HK / softcap)
            logits_HK = capped_HK * softcap
        probs_HK = tl.exp2((logits_HK - lse_H[:, None]) * KERNEL_LOG2_E)
        probs_HK = tl.where(present_HK, probs_HK, 0.0)
        dscores_HK = probs_HK * (product(dout_HV, tl.trans(v_KV)) - delta_H[:, None])
        if CAPPED:
            dscores_HK *= 1 - capped_HK * capped_HK
        dscores_HK = tl.where(present_HK, dscores_HK, 0.0).to(DTYPE)
        dq_HD += product(dscores_HK, k_KD)
        if BLOCK_REST > 0:
            dq_HR += product(dscores_HK, k_KR)
        if ATOMIC:
            index_K = (batch * n_keys + key_K) * KEY_HEADS + key_head
            dv_KV = product(tl.trans(probs_HK.to(DTYPE)), dout_HV)
            _add_rows(dv_BSGV, index_K * VALUE_WIDTH, chosen_K, dv_KV, 0, VALUE_WIDTH, BLOCK_VALUE)
            dk_KD = product(tl.trans(dscores_HK), q_HD) * scale
            _add_rows(dk_BSGD, index_K * WIDTH, chosen_K, dk_KD, 0, WIDTH, BLOCK_FIRST)
            if BLOCK_REST > 0:
                dk_KR = product(tl.trans(dscores_HK), q_HR) * scale
                _add_rows(dk_BSGD, index_K * WIDTH, chosen_K, dk_KR, BLOCK_FIRST, WIDTH, BLOCK_REST)
    _store_rows(dq_BTHD, head_H * WIDTH, present_H, dq_HD * scale, 0, WIDTH, BLOCK_FIRST)
    if BLOCK_REST > 0:
        _store_rows(dq_BTHD, head_H * WIDTH, present_H, dq_HR * scale, BLOCK_FIRST, WIDTH, BLOCK_REST)


@triton.jit
def _by_key_kernel(
    q_BTHD,
    k_BSGD,
    v_BSGV,
    dout_BTHV,
    query_BN,
    begin_BS,
    lse_BTH,
    delta_BTH,
    dk_BSGD,
    dv_BSGV,
    k_stride_b,
    k_stride_s,
    k_stride_g,
    v_stride_b,
    v_stride_s,
    v_stride_g,
    n_queries,
    n_pairs,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):
    key, n_keys = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    batch, key_head = (tl.program_id(1) // KEY_HEADS).to(tl.int64), tl.program_id(1) % KEY_HEADS
    width_D, value_V = tl.arange(0, BLOCK_WIDTH), tl.arange(0, BLOCK_VALUE)
    k_row = k_BSGD + batch * k_stride_b + key * k_stride_s + key_head * k_stride_g
    v_row = v_BSGV + batch * v_stride_b + key * v_stride_s + key_head * v_stride_g
    k_D = tl.load(k_row + width_D, mask=width_D < WIDTH, other=0.0).to(tl.float32)
    v_V = tl.load(v_row + value_V, mask=value_V < VALUE_WIDTH, other=0.0).to(tl.float32)
    begin = tl.load(begin_BS + batch * (n_keys + 1) + key)
    end = tl.load(begin_BS + batch * (n_keys + 1) + key + 1)
    # R: pairs of a query that selected this key and a head that reads it
    pair_R = tl.arange(0, BLOCK_QUERIES * BLOCK_HEADS)
    dk_D = tl.zeros([BLOCK_WIDTH], tl.float32)
    dv_V = tl.zeros([BLOCK_VALUE], tl.float32)
    for low in range(begin, end, BLOCK_QUERIES):
        place_R = low + pair_R // BLOCK_HEADS
        query_R = tl.load(query_BN + batch * n_pairs + place_R, mask=place_R < end, other=0)
        for head_block in range(HEAD_BLOCKS):
            shared_R = head_block * BLOCK_HEADS + pair_R % BLOCK_HEADS
            present_R = (place_R < end) & (shared_R < SHARED)
            head_R = (batch * n_queries + query_R) * (KEY_HEADS * SHARED) + key_head * SHARED + shared_R
            q_RD = load_rows(q_BTHD, head_R * WIDTH, present_R, 0, WIDTH, BLOCK_WIDTH, tl.float32)
            dout_RV = load_rows(
                dout_BTHV, head_R * VALUE_WIDTH, present_R, 0, VALUE_WIDTH, BLOCK_VALUE, tl.float32
            )
            lse_R = tl.load(lse_BTH + head_R, mask=present_R, other=0.0)
            delta_R = tl.load(delta_BTH + head_R, mask=present_R, other=0.0)
            logits_R = tl.sum(q_RD * k_D[None, :], 1) * scale
            if CAPPED:
                capped_R = tanh_of(logits_R / softcap)
                logits_R = capped_R * softcap
            probs_R = tl.exp2((logits_R - lse_R) * KERNEL_LOG2_E)
            probs_R = tl.where(present_R, probs_R, 0.0)
            dscores_R = probs_R * (tl.sum(dout_RV * v_V[None, :], 1) - delta_R)
            if CAPPED:
                dscores_R *= 1 - capped_R * capped_R
            dscores_R = tl.where(present_R, dscores_R, 0.0)
            dk_D += tl.sum(dscores_R[:, None] * q_RD, 0)
            dv_V += tl.sum(probs_R[:, None] * dout_RV, 0)
    index = (batch * n_keys + key) * KEY_HEADS + key_head
    tl.store(dk_BSGD + index * WIDTH + width_D, dk_D * scale, mask=width_D < WIDTH)
    tl.store(dv_BSGV + index * VALUE_WIDTH + value_V, dv_V, mask=value_V < VALUE_WIDTH)


@triton.jit
def _store_rows(
    base, offsets_R, inside_R, x_RC, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    columns = FIRST + tl.arange(0, BLOCK)
    inside_RC = inside_R[:, None] & (columns < WIDTH)[None, :]
    tl.store(base + offsets_R[:, None] + columns[None, :], x_RC, mask=inside_RC)


@triton.jit
def _add_rows(base, offsets_R, inside_R, x_RC, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    columns = FIRST + tl.arange(0, BLOCK)
    inside_RC = inside_R[:, None] & (columns < WIDTH)[None, :]
    tl.atomic_add(base + offsets_R[:, None] + columns[None, :], x_RC, mask=inside_RC, sem="relaxed")
