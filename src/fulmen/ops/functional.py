"""The operations with plain argument names: causal unless told otherwise, attention scaled by D**-0.5.

For code of one's own; fulmen's models call what lies behind these doors. Axes: B batch, T queries, S keys,
H heads, G key/value heads, D head dim, V value dim, J index heads, I index key heads, E index head dim,
K selected. J is a multiple of I, and H of G: neighbouring heads share a key head.

Without `start` and `stop` query t of T sees the keys 0 <= s <= S - T + t: the queries are the last tokens of
their texts (one before the first key sees none). Either may be given, int32 or int64 `[B, T]`: query t then
sees start <= s < stop, clipped to 0..S.

All raise ConfigError, in a line that names the argument, for types, shapes, dtypes and devices that do not
fit together, and BackendError where a pinned backend cannot run. The README beside this has the formulas.
"""

from typing import Any, Literal, overload

from torch import Tensor

from fulmen.config import require_positive_int
from fulmen.errors import ConfigError
from fulmen.ops import scores, topk
from fulmen.ops.attention import dense, sparse
from fulmen.ops.common.plain_checks import (
    causal_or_given,
    check_above_zero,
    check_plain_attention,
    check_plain_index,
    check_plain_losses,
    check_plain_scores,
    scale_or_default,
    softcap_or_none,
    with_key_head_axis,
)
from fulmen.ops.losses import indexer, selection
from fulmen.ops.losses.indexer.reference import IndexerLoss

# Arguments have the names of these modules.
_score, _select, _select_by_index = scores.index_scores, topk.select_topk, topk.index_topk


def index_scores(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    start: Tensor | None = None,
    stop: Tensor | None = None,
) -> Tensor:
    """The lightning indexer's score of every key: sum_j w[j] ReLU(q[j] . k E**-0.5 + b[j]).

    DeepSeek-V3.2 (arXiv 2512.02556, equation 1) has one index key head and no `b`. Without gradient: an
    indexer is trained by `indexer_loss`. The result has T x S numbers; `index_topk` never holds them.

    Args:
        q: index queries [B, T, J, E]. k: index keys [B, S, I, E], of the dtype of `q` (any floating one);
            [B, S, E] where there is one index key head, as in V3.2.
        w, b: weight and shift of each index head, [B, T, J], any floating dtype.

    Returns:
        [B, T, S] in float32 (float64 for float64 inputs), -inf for keys that a query does not see.
    """
    k = with_key_head_axis(k)
    sizes = check_plain_index(q, k, w, b, start=start, stop=stop)
    return _score(q, k, w, b, *causal_or_given(q, sizes, start, stop))


def select_topk(
    scores: Tensor, *, topk: int, start: Tensor | None = None, stop: Tensor | None = None
) -> Tensor:
    """Which keys have the `topk` largest scores; of equal ones the more recent, NaN below every number.

    Args:
        scores: [B, T, S], any floating dtype, compared in float32 (float64 in float64).

    Returns:
        indices [B, T, min(topk, S)], int32: ascending, then -1 where a query sees fewer keys.
    """
    require_positive_int("topk", topk)
    sizes = check_plain_scores(scores, start=start, stop=stop)
    return _select(scores, *causal_or_given(scores, sizes, start, stop), topk)


def index_topk(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    topk: int,
    start: Tensor | None = None,
    stop: Tensor | None = None,
) -> Tensor:
    """`select_topk(index_scores(q, k, w, b), topk=topk)`, block by block: the selection of DSA.

    Args: as `index_scores` and `select_topk`.

    Returns:
        indices [B, T, min(topk, S)], int32: ascending, then -1 where a query sees fewer keys.
    """
    require_positive_int("topk", topk)
    k = with_key_head_axis(k)
    sizes = check_plain_index(q, k, w, b, start=start, stop=stop)
    return _select_by_index(q, k, w, b, *causal_or_given(q, sizes, start, stop), topk)


@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    scale: float | None = None,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    scale: float | None = None,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    scale: float | None = None,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each query over its selected keys, one selection for all heads.

    DeepSeek-V3.2 (arXiv 2512.02556, section 2.1). Differentiable in q, k, v and sinks.

    Args:
        q: [B, T, H, D]. k: [B, S, G, D]. v: [B, S, G, V]. All of one floating dtype.
        indices: [B, T, K], int32 or int64, below S, distinct within a row, in any order; negative: nothing.
            What is selected is attended to, whether causal or not.
        scale: factor on q . k; None: D**-0.5.
        softcap: c of logits c tanh(l / c), l = scale q . k, as in Gemma 2; None: l as it is.
        sinks: [H], any floating dtype: a logit of each head that takes part in its softmax and has no value,
            as in gpt-oss; None: there is none.

    Returns:
        out [B, T, H, V] in the dtype of q, 0 for a query without keys; with `return_lse` also the natural
        log of the softmax's denominator [B, T, H], sinks included, float32 (float64 for float64 inputs), -inf
        (or the sink) there.
    """
    check_plain_attention(q, k, v, sinks, indices=indices)
    scale, softcap = scale_or_default(scale, q), softcap_or_none(softcap)
    out, lse = sparse.sparse_attention(q, k, v, indices, scale, softcap, sinks)
    return (out, lse) if return_lse else out


@overload
def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    start: Tensor | None = None,
    stop: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    start: Tensor | None = None,
    stop: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    start: Tensor | None = None,
    stop: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each query over all keys that it sees. Differentiable in q, k, v and sinks.

    Args and Returns: as `sparse_attention`.
    """
    sizes = check_plain_attention(q, k, v, sinks, start=start, stop=stop)
    intervals = causal_or_given(q, sizes, start, stop)
    scale, softcap = scale_or_default(scale, q), softcap_or_none(softcap)
    out, lse = dense.dense_attention(q, k, v, *intervals, scale, softcap, sinks)
    return (out, lse) if return_lse else out


def indexer_loss(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    attn_q: Tensor,
    attn_k: Tensor,
    start: Tensor | None = None,
    stop: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> IndexerLoss:
    """KL(p || softmax(index scores)) of each query, p the mean over heads of its dense attention.

    DeepSeek-V3.2 (arXiv 2512.02556, equation 3, dense warm-up). Differentiable in q, k, w and b; p carries no
    gradient.

    Args:
        q, k, w, b: as `index_scores`.
        attn_q, attn_k: the attention's own after RoPE, [B, T, H, D] and [B, S, G, D].
        scale, softcap, sinks: of the attention, as `dense_attention`. With sinks p is what they leave to the
            keys, divided by its sum.

    Returns:
        `kl_BT` and `target_entropy_BT` [B, T], nats, float32 (float64 for float64 inputs).
    """
    index, attn = (
        (q, with_key_head_axis(k), w, b),
        {"attn_q BTHD": attn_q, "attn_k BSGD": attn_k, "sinks H": sinks},
    )
    sizes = check_plain_losses(index, attn, {"start": start, "stop": stop})
    intervals = causal_or_given(q, sizes, start, stop)
    scale, softcap = scale_or_default(scale, attn_q), softcap_or_none(softcap)
    return indexer.indexer_loss(*index, attn_q, attn_k, *intervals, scale, softcap, sinks)


def indexer_loss_selected(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    attn_q: Tensor,
    attn_k: Tensor,
    indices: Tensor,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> IndexerLoss:
    """`indexer_loss` over the selected keys alone (equation 4, sparse stage).

    Args: as `indexer_loss`, and `indices` as `sparse_attention`.
    """
    index, attn = (
        (q, with_key_head_axis(k), w, b),
        {"attn_q BTHD": attn_q, "attn_k BSGD": attn_k, "sinks H": sinks},
    )
    check_plain_losses(index, attn, {"indices": indices})
    scale, softcap = scale_or_default(scale, attn_q), softcap_or_none(softcap)
    return indexer.indexer_loss_selected(*index, attn_q, attn_k, indices, scale, softcap, sinks)


def selection_loss(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    attn_q: Tensor,
    attn_k: Tensor,
    attn_v: Tensor,
    out_weight: Tensor,
    topk: int,
    temperature: float,
    start: Tensor | None = None,
    stop: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out_gate: Tensor | None = None,
) -> Tensor:
    """Relative squared change of the attention's output if keys fade out softly at the cut of the selection.

    fulmen's own. Differentiable in q, k, w and b.

    Args:
        q, k, w, b, attn_q, attn_k, softcap, sinks: as `indexer_loss`. attn_v: [B, S, G, V].
        out_weight: the output projection [C, H V].
        out_gate: what the heads' outputs are multiplied with before it, [B, T, H V]; None: nothing.
        topk: size of the selection; a query that sees no more keys has loss 0.
        temperature: width of the cut, in units of the index score; above 0.

    Returns:
        [B, T], float32 (float64 for float64 inputs).
    """
    require_positive_int("topk", topk)
    check_above_zero("temperature", temperature)
    index, attn = (
        (q, with_key_head_axis(k), w, b),
        {"attn_q BTHD": attn_q, "attn_k BSGD": attn_k, "attn_v BSGV": attn_v, "sinks H": sinks},
    )
    output = {"out_weight CN": out_weight, "out_gate BTN": out_gate}
    sizes = check_plain_losses(index, {**attn, **output}, {"start": start, "stop": stop})
    if sizes["N"] != (n := sizes["H"] * sizes["V"]):
        raise ConfigError(f"out_weight has {sizes['N']} columns, the heads {n} values; make them equal")
    intervals, scale = causal_or_given(q, sizes, start, stop), scale_or_default(scale, attn_q)
    attention, softcap = (attn_q, attn_k, attn_v, out_weight), softcap_or_none(softcap)
    cut: Any = (topk, scale, temperature, softcap, sinks, out_gate)
    return selection.selection_loss(*index, *attention, *intervals, *cut)
