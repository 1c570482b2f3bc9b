"""The selection loss in blocks of queries, each recomputed in the backward pass; plain torch, any device."""

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fulmen.ops.common.tiles import LEAST_LOSS_ROWS
from fulmen.ops.dispatch import implements
from fulmen.ops.losses.selection.reference import selection_loss_reference

# Numbers in a block's logits, all heads.
SELECTION_BLOCK_LOGITS = 2**21


@implements("selection_loss", "torch")
def selection_loss_blocked(
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
    softcap: float | None,
    sinks_H: Tensor | None,
    out_gate_BTN: Tensor | None,
) -> Tensor:
    """See `fulmen.ops.losses.selection.selection_loss`."""
    batch, queries, heads, _ = attn_q_BTHD.shape
    constants = (topk, scale, temperature, softcap, sinks_H)
    n_rows = max(SELECTION_BLOCK_LOGITS // (heads * max(k_BSIE.shape[1], 1)), LEAST_LOSS_ROWS)
    # Zeros with a gradient: no text at all can be trained on too.
    loss_BT = w_BTJ[..., :0].sum(-1)
    for b in range(batch):
        one = slice(b, b + 1)
        keys = (k_BSIE[one], attn_k_BSGD[one], attn_v_BSGV[one])
        for low in range(0, queries, n_rows):
            rows = slice(low, low + n_rows)
            own = (q_BTJE[one, rows], w_BTJ[one, rows], None if b_BTJ is None else b_BTJ[one, rows])
            ends = (start_BT[one, rows], stop_BT[one, rows])
            gate = None if out_gate_BTN is None else out_gate_BTN[one, rows]
            block = (own, keys, attn_q_BTHD[one, rows], out_weight_CN, ends, (*constants, gate))
            loss_BT[one, rows] = checkpoint(
                _loss_of_rows, *block, use_reentrant=False, preserve_rng_state=False
            )
    return loss_BT


def _loss_of_rows(
    own: tuple, keys: tuple, attn_q_1TQD: Tensor, out_weight_CN: Tensor, ends: tuple, constants: tuple
) -> Tensor:
    q_1TJE, w_1TJ, b_1TJ = own
    k_1SIE, attn_k_1SGD, attn_v_1SGV = keys
    # Keys that no row of the block sees are left out.
    last = int(ends[1].max().clamp(min=1))
    index = (q_1TJE, k_1SIE[:, :last], w_1TJ, b_1TJ)
    attention = (attn_q_1TQD, attn_k_1SGD[:, :last], attn_v_1SGV[:, :last], out_weight_CN)
    return selection_loss_reference(*index, *attention, *ends, *constants).loss_BT
