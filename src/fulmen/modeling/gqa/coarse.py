"""The coarse level of a GQA model's index: one small head that looks at every key before the indexer does."""

import torch
import transformers.initialization as transformers_init
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from fulmen.ops.common.rope import rotate_half_split


class CoarseIndexer(nn.Module):
    """Coarse queries and keys (`fulmen.ops.two_level`): mixes of the model's own, each of one frequency.

    A key head's rotary pair is a complex number, and all key heads' pairs of one frequency turn by one angle.
    So any complex mix of them turns with that frequency, too: a pair of the coarse head is such a mix.
    Weights are buffers: they are computed (`fulmen.modeling.gqa.inherit_coarse`), not trained.

    `rope_pairs` [N/2] names the rotary pair of each; the number of rotary pairs means "not rotated".
    """

    wq: Tensor
    wk: Tensor
    rope_pairs: Tensor

    def __init__(self, n_queries: int, n_keys: int, width: int, n_rotary_pairs: int) -> None:
        super().__init__()
        self.width, self.n_rotary_pairs = width, n_rotary_pairs
        self.register_buffer("wq", torch.zeros(width, n_queries))
        self.register_buffer("wk", torch.zeros(width, n_keys))
        self.register_buffer("rope_pairs", self._first_rope_pairs())

    def queries(self, q_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
        """coarse_q_BTN from the model's queries before RoPE and its RoPE table."""
        return self._rotated(linear(q_BTHD.flatten(2), self.wq), cos_BTR, sin_BTR)

    def keys(self, k_BTGD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
        """coarse_k_BTN: what the cache keeps, packed."""
        return self._rotated(linear(k_BTGD.flatten(2), self.wk), cos_BTR, sin_BTR)

    def _rotated(self, x_BTN: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
        half = cos_BTR.shape[-1] // 2
        cos_BTP = pad(cos_BTR[..., :half], (0, 1), value=1.0)[..., self.rope_pairs]
        sin_BTP = pad(sin_BTR[..., :half], (0, 1), value=0.0)[..., self.rope_pairs]
        return rotate_half_split(x_BTN, cos_BTP, sin_BTP)

    def reset(self, std: float) -> None:
        """Random weights; used where no checkpoint and no model to inherit from says otherwise."""
        transformers_init.normal_(self.wq, mean=0.0, std=std)
        transformers_init.normal_(self.wk, mean=0.0, std=std)
        transformers_init.copy_(self.rope_pairs, self._first_rope_pairs())

    def _first_rope_pairs(self) -> Tensor:
        return torch.arange(self.width // 2).clamp(max=self.n_rotary_pairs)
