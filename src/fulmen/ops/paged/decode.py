"""One decoding step of a layer: one token of each of B sequences, over paged caches; no gradient.

The same as `project_and_store`, `paged_index_topk` and `paged_attention`, in one call: at one token a
sequence, some forty small operations would take the most time.
"""

import ctypes

import torch
from torch import Tensor

from fulmen.errors import ConfigError
from fulmen.ops.cpp.library import call_cpp_by_numbers
from fulmen.ops.dispatch import CACHE_DTYPES, implementation, implements
from fulmen.ops.paged import paged_attention
from fulmen.ops.paged.layer import NewTokens, PagedLayer, require_coarse
from fulmen.ops.paged.project import Projections, check_projected, check_rows, project_and_store
from fulmen.ops.paged.sparse import KeyRows, paged_sparse_attention


def paged_decode(
    layer: PagedLayer,
    projections: Projections,
    tokens: NewTokens,
    key_rows: KeyRows,
    qkv_TX: Tensor,
    all_qk_TX: Tensor,
    x_TC: Tensor,
    out_TX: Tensor,
) -> None:
    """Attention of each sequence's new token, whose keys and value are stored first.

    Args:
        tokens: one of each sequence, in the order of `key_rows`; there T = 1.
        qkv_TX: queries, keys and values before RoPE, head after head: X = (H + 2 G) D; of the cache's dtype.
        all_qk_TX, x_TC: what index heads are made of: queries and keys of all heads, and hidden states. The
            former is `qkv_TX` again, unless this process has but some of the heads; what follows is not read.
        out_TX: contiguous, written: X = H D.

    Raises:
        ConfigError: axes or dtypes that do not fit together.
        BackendError: a pinned backend that cannot run here.
    """
    _check_decode_inputs(layer, projections, tokens, key_rows, qkv_TX, all_qk_TX, x_TC, out_TX)
    backend = implementation("paged_decode", *layer.device_and_dtype)
    backend.run(layer, projections, tokens, key_rows, qkv_TX, all_qk_TX, x_TC, out_TX)


@implements("paged_decode", "cpp", dtypes=CACHE_DTYPES)
def paged_decode_cpp(
    layer: PagedLayer,
    projections: Projections,
    tokens: NewTokens,
    key_rows: KeyRows,
    qkv_TX: Tensor,
    all_qk_TX: Tensor,
    x_TC: Tensor,
    out_TX: Tensor,
) -> None:
    """By the C++ kernel."""
    assert out_TX.is_contiguous()
    call_cpp_by_numbers(
        "fulmen_paged_decode",
        *map(ctypes.addressof, (layer.struct, projections.struct, tokens.struct, key_rows.struct)),
        *(qkv_TX.data_ptr(), qkv_TX.stride(0), all_qk_TX.data_ptr(), all_qk_TX.stride(0)),
        *(x_TC.data_ptr(), x_TC.stride(0), out_TX.data_ptr()),
    )


def _check_decode_inputs(
    layer: PagedLayer,
    projections: Projections,
    tokens: NewTokens,
    key_rows: KeyRows,
    qkv_TX: Tensor,
    all_qk_TX: Tensor,
    x_TC: Tensor,
    out_TX: Tensor,
) -> None:
    """Little work if all fits, as it is done for every layer of every token."""
    check_projected(layer, projections, tokens, qkv_TX, all_qk_TX, x_TC)
    require_coarse(layer, key_rows.coarse_rows_BS, "coarse_rows_BS")
    count, dtype = tokens.count, layer.kv_RGC.dtype
    if key_rows.stop_BT.shape != (count, 1):
        raise ConfigError(
            f"{count} tokens belong to as many sequences of one query; "
            f"stop_BT has shape {tuple(key_rows.stop_BT.shape)}"
        )
    check_rows("out_TX", out_TX, count, layer.out_width, dtype)


@implements("paged_decode", "reference", "torch")
@torch.no_grad()
def paged_decode_composed(
    layer: PagedLayer,
    projections: Projections,
    tokens: NewTokens,
    key_rows: KeyRows,
    qkv_TX: Tensor,
    all_qk_TX: Tensor,
    x_TC: Tensor,
    out_TX: Tensor,
) -> None:
    """The specification, on any device."""
    # By the keys there are; to ask how many are seen would wait for the device.
    longest = key_rows.rows_BS.shape[1]
    q_BHD, index = project_and_store(layer, projections, tokens, qkv_TX, all_qk_TX, x_TC, longest)
    out_B1HD = out_TX.view(len(q_BHD), 1, *q_BHD.shape[1:])
    if index is None:
        inputs = (layer.kv_RGC, key_rows.rows_BS, key_rows.stop_BT, None, *layer.softmax)
        out_B1HD.copy_(paged_attention(q_BHD[:, None], *inputs))
    else:
        index_q_B1JE, w_B1J, b_B1J = (x[:, None] for x in index[:3])
        coarse = (None if x is None else x[:, None] for x in index[3:])
        paged_sparse_attention(layer, q_BHD[:, None], index_q_B1JE, w_B1J, b_B1J, key_rows, out_B1HD, *coarse)
