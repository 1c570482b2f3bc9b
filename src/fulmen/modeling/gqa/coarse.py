"""The coarse level of a GQA model's index: a small indexer that looks at every key before the other does."""

from typing import NamedTuple

import torch
import transformers.initialization as transformers_init
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from fulmen.config import CoarseShape
from fulmen.ops.common.rope import rotate_half_split


class ModelWidths(NamedTuple):
    """Numbers of a token's queries and keys, all heads, of its hidden state; rotary pairs of a head."""

    queries: int
    keys: int
    hidden: int
    rotary_pairs: int


class CoarseIndexer(nn.Module):
    """Coarse queries, keys and shifts (`fulmen.ops.two_level`): mixes of the model's own.

    A key head's rotary pair is a complex number, and all key heads' pairs of one frequency turn by one angle.
    So any complex mix of them turns with that frequency, too: a pair of the coarse key is such a mix, or it
    is two mixes of numbers that hardly turn, and is not rotated. The last query head is the mean of the
    others; it decides among keys that none of them wants.
    Weights are buffers: they are computed (`fulmen.modeling.gqa.inherit_coarse`), not trained.

    `rope_pairs` [N/2] names the rotary pair of each; the number of rotary pairs means "not rotated".
    """

    wq: Tensor
    wk: Tensor
    w_shift: Tensor
    b_shift: Tensor
    rope_pairs: Tensor

    def __init__(self, shape: CoarseShape, model: ModelWidths) -> None:
        super().__init__()
        self.n_heads, self.width = shape.query_heads, shape.width
        self.n_rotary_pairs = model.rotary_pairs
        self.register_buffer("wq", torch.zeros(self.n_heads * self.width, model.queries))
        self.register_buffer("wk", torch.zeros(self.width, model.keys))
        self.register_buffer("w_shift", torch.zeros(self.n_heads, model.hidden))
        self.register_buffer("b_shift", torch.zeros(self.n_heads))
        self.register_buffer("rope_pairs", self._first_rope_pairs())

    def queries(
        self, x_BTC: Tensor, q_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor
    ) -> tuple[Tensor, Tensor]:
        """coarse_q_BTMN, coarse_b_BTM from hidden states, the model's queries before RoPE and its table."""
        q_BTMN = linear(q_BTHD.flatten(2), self.wq).unflatten(-1, (self.n_heads, self.width))
        cos_BTP, sin_BTP = self._rotation(cos_BTR, sin_BTR)
        shift_BTM = linear(x_BTC, self.w_shift, self.b_shift.to(x_BTC.dtype))
        return rotate_half_split(q_BTMN, cos_BTP[:, :, None], sin_BTP[:, :, None]), shift_BTM

    def keys(self, k_BTGD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
        """coarse_k_BTN: what the cache keeps, packed."""
        return rotate_half_split(linear(k_BTGD.flatten(2), self.wk), *self._rotation(cos_BTR, sin_BTR))

    def _rotation(self, cos_BTR: Tensor, sin_BTR: Tensor) -> tuple[Tensor, Tensor]:
        half = cos_BTR.shape[-1] // 2
        cos_BTP = pad(cos_BTR[..., :half], (0, 1), value=1.0)[..., self.rope_pairs]
        sin_BTP = pad(sin_BTR[..., :half], (0, 1), value=0.0)[..., self.rope_pairs]
        return cos_BTP, sin_BTP

    def reset(self, std: float) -> None:
        """Random weights; used where no checkpoint and no model to inherit from says otherwise."""
        for matrix in (self.wq, self.wk, self.w_shift):
            transformers_init.normal_(matrix, mean=0.0, std=std)
        transformers_init.zeros_(self.b_shift)
        transformers_init.copy_(self.rope_pairs, self._first_rope_pairs())

    def _first_rope_pairs(self) -> Tensor:
        return torch.arange(self.width // 2).clamp(max=self.n_rotary_pairs)
