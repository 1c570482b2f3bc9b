"""The loss that trains an indexer to find the keys its own model attends to."""

from torch import Tensor

from fulmen.ops.common.checks import check_loss_inputs, check_softmax_changes, check_topk_below
from fulmen.ops.common.precision import cast_as_autocast, outside_autocast
from fulmen.ops.dispatch import implementation, implements_by_name
from fulmen.ops.losses.indexer.reference import (
    IndexerLoss,
    indexer_loss_reference,
    indexer_loss_selected_reference,
)
from fulmen.ops.losses.indexer.torch_blocked import indexer_loss_blocked, indexer_loss_selected_blocked

implements_by_name("indexer_loss", "triton", "fulmen.ops.losses.indexer.triton:indexer_loss_triton")
implements_by_name(
    "indexer_loss_selected", "triton", "fulmen.ops.losses.indexer.triton:indexer_loss_selected_triton"
)


def indexer_loss(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    attn_q_BTHD: Tensor,
    attn_k_BSGD: Tensor,
    start_BT: Tensor,
    stop_BT: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> IndexerLoss:
    """KL(p[t] || softmax(I[t])) over the interval; p[t] is the mean over heads of query t's dense attention.

    DeepSeek-V3.2 (arXiv 2512.02556, equation 3, dense warm-up). Each head has one joint softmax over all its
    visible keys. The target p carries no gradient; the loss is differentiable in q, k, w, b of the indexer
    (recomputed block by block). The queries may be a sample: T need not be S.

    Args:
        q_BTJE, k_BSIE, w_BTJ, b_BTJ: the indexer's inputs, as for `index_scores`.
        attn_q_BTHD, attn_k_BSGD: the attention's queries and keys after RoPE; H a multiple of G.
        start_BT, stop_BT: int32 or int64; query t sees the keys start <= s < stop, clipped to 0..S.
        scale: factor on q.k of the attention, usually D ** -0.5.
        softcap, sinks_H: of the attention, as for `dense_attention`. With sinks a head's probabilities add up
            to less than 1: p is their mean over heads, divided by its sum over the keys. So a head counts by
            what it takes from the keys, and the indexer, which has no sink, is not asked for what goes there.

    Returns:
        IndexerLoss(kl_BT, target_entropy_BT), in nats; a query without keys has 0 and 0.

    Raises:
        ConfigError: axes, heads, dtypes or devices that do not fit together.
        BackendError: a pinned backend that cannot run here.
    """
    q_BTJE, k_BSIE, attn_q_BTHD, attn_k_BSGD = cast_as_autocast(q_BTJE, k_BSIE, attn_q_BTHD, attn_k_BSGD)
    attn_q_BTHD, attn_k_BSGD = attn_q_BTHD.detach(), attn_k_BSGD.detach()
    index_inputs = {"q_BTJE": q_BTJE, "k_BSIE": k_BSIE, "w_BTJ": w_BTJ, "b_BTJ": b_BTJ}
    attention_inputs = {"attn_q_BTHD": attn_q_BTHD, "attn_k_BSGD": attn_k_BSGD}
    check_loss_inputs(index_inputs, attention_inputs, start_BT=start_BT, stop_BT=stop_BT)
    check_softmax_changes(attn_q_BTHD, softcap, sinks_H)
    arguments = (
        q_BTJE,
        k_BSIE,
        w_BTJ,
        b_BTJ,
        attn_q_BTHD,
        attn_k_BSGD,
        start_BT,
        stop_BT,
        scale,
        softcap,
        sinks_H,
    )
    backend = implementation("indexer_loss", q_BTJE.device, q_BTJE.dtype)
    with outside_autocast(q_BTJE.device):
        return backend.run(*arguments)


def indexer_loss_selected(
    q_BTJE: Tensor,
    k_BSIE: Tensor,
    w_BTJ: Tensor,
    b_BTJ: Tensor | None,
    attn_q_BTHD: Tensor,
    attn_k_BSGD: Tensor,
    topk_BTK: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> IndexerLoss:
    """`indexer_loss` over the selected set alone: both sides are gathered to `topk_BTK`, in the same order.

    DeepSeek-V3.2 (arXiv 2512.02556, equation 4, sparse stage). The softmax of each head, and that of I, run
    over the selected keys.

    Args:
        topk_BTK: int32 or int64, below S, distinct within a row, in any order; negative means nothing.
        The others, Returns, Raises: as `indexer_loss`; ConfigError also for an index beyond the keys, on a
        GPU an assertion of the device.
    """
    q_BTJE, k_BSIE, attn_q_BTHD, attn_k_BSGD = cast_as_autocast(q_BTJE, k_BSIE, attn_q_BTHD, attn_k_BSGD)
    attn_q_BTHD, attn_k_BSGD = attn_q_BTHD.detach(), attn_k_BSGD.detach()
    index_inputs = {"q_BTJE": q_BTJE, "k_BSIE": k_BSIE, "w_BTJ": w_BTJ, "b_BTJ": b_BTJ}
    attention_inputs = {"attn_q_BTHD": attn_q_BTHD, "attn_k_BSGD": attn_k_BSGD}
    sizes = check_loss_inputs(index_inputs, attention_inputs, topk_BTK=topk_BTK)
    check_softmax_changes(attn_q_BTHD, softcap, sinks_H)
    backend = implementation("indexer_loss_selected", q_BTJE.device, q_BTJE.dtype)
    check_topk_below(topk_BTK, sizes["S"])
    arguments = (q_BTJE, k_BSIE, w_BTJ, b_BTJ, attn_q_BTHD, attn_k_BSGD, topk_BTK, scale, softcap, sinks_H)
    with outside_autocast(q_BTJE.device):
        return backend.run(*arguments)
