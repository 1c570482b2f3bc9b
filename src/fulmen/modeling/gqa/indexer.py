"""The lightning indexer of GQA models: small queries and keys made from the model's own."""

from typing import NamedTuple

import torch
import transformers.initialization as transformers_init
from torch import Tensor, nn
from transformers import PreTrainedConfig

from fulmen.config import CoarseShape, DsaConfig
from fulmen.modeling.gqa.coarse import CoarseIndexer, ModelWidths
from fulmen.modeling.rope_tables import full_attention_rope
from fulmen.ops.common.rope import rotate_half_split


class IndexInputs(NamedTuple):
    """What `fulmen.ops.scores` takes; index head j reads index key head j // (J // I)."""

    q_BTJE: Tensor
    k_BTIE: Tensor
    w_BTJ: Tensor
    b_BTJ: Tensor


class IndexRotation(NamedTuple):
    """Cosine and sine of every index pair, per index key head; 1 and 0 where a pair is not rotated."""

    cos_BTIP: Tensor
    sin_BTIP: Tensor


class IndexProjection(nn.Module):
    """x @ weight.T + bias, with the names of `nn.Linear`, which it is not on purpose.

    Tools that adapt or quantise "all linear layers" leave it alone: a language model's loss has no gradient
    in an indexer, so that adapters there would never learn.
    """

    bias: Tensor  # or None, as in nn.Linear

    def __init__(self, n_inputs: int, n_outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_outputs, n_inputs))
        self.register_parameter("bias", nn.Parameter(torch.empty(n_outputs)) if bias else None)
        self.reset_parameters(n_inputs**-0.5)

    def reset_parameters(self, std: float) -> None:
        """Normal weights and no bias; those that a checkpoint has filled stay."""
        transformers_init.normal_(self.weight, mean=0.0, std=std)
        if self.bias is not None:
            transformers_init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n_inputs] -> [..., n_outputs]"""
        return nn.functional.linear(x, self.weight, self.bias)


class GqaIndexer(nn.Module):
    """Index queries, keys, weights and shifts (DeepSeek-V3.2, arXiv 2512.02556, section 2.1), in groups.

    Reads the hidden state x and the model's own queries and keys, after their bias or norm and before RoPE:
    an inherited indexer is a choice among directions that the model has learned already.

    `rope_pairs` [I, E/2] names, for each index pair (dims p and p + E/2), the rotary pair of the model's own
    table that rotates it; the number of rotary pairs means "not rotated".
    """

    rope_pairs: Tensor
    coarse: CoarseIndexer | None

    def __init__(self, config: PreTrainedConfig, dsa: DsaConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = dsa.index_n_heads, dsa.index_n_kv_heads
        self.head_dim = dsa.index_head_dim
        model_head_dim = model_head_width(config)
        n_q, n_k = config.num_attention_heads * model_head_dim, config.num_key_value_heads * model_head_dim
        self.n_rotary_pairs = rotary_width(config) // 2
        self.wq = IndexProjection(n_q, self.n_heads * self.head_dim, bias=False)
        self.wk = IndexProjection(n_k, self.n_kv_heads * self.head_dim, bias=False)
        self.weights_proj = IndexProjection(config.hidden_size, self.n_heads)
        self.shift_proj = IndexProjection(config.hidden_size, self.n_heads)
        self.register_buffer("rope_pairs", self._first_rope_pairs())
        self.set_coarse(dsa.coarse)

    def set_coarse(self, shape: CoarseShape) -> None:
        """A coarse level of this shape before this one, weights to be filled in; of no width: none."""
        self.coarse = None
        if shape.width:
            n_q, n_k, n_x = (part.weight.shape[1] for part in (self.wq, self.wk, self.shift_proj))
            widths = ModelWidths(n_q, n_k, n_x, self.n_rotary_pairs)
            self.coarse = CoarseIndexer(shape, widths).to(self.wq.weight)

    def forward(
        self, x_BTC: Tensor, q_BTHD: Tensor, k_BTGD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor
    ) -> IndexInputs:
        """Index inputs of T tokens from the model's hidden states, queries, keys and RoPE table."""
        rotation = self.rotation(cos_BTR, sin_BTR)
        q_BTJE, w_BTJ, b_BTJ = self.queries(x_BTC, q_BTHD, rotation)
        return IndexInputs(q_BTJE, self.keys(k_BTGD, rotation), w_BTJ, b_BTJ)

    def rotation(self, cos_BTR: Tensor, sin_BTR: Tensor) -> IndexRotation:
        """Pick each index pair's angle from the model's table, whose two halves of R are the same."""
        half = cos_BTR.shape[-1] // 2
        cos_BTP = nn.functional.pad(cos_BTR[..., :half], (0, 1), value=1.0)
        sin_BTP = nn.functional.pad(sin_BTR[..., :half], (0, 1), value=0.0)
        return IndexRotation(cos_BTP[..., self.rope_pairs], sin_BTP[..., self.rope_pairs])

    def queries(
        self, x_BTC: Tensor, q_BTHD: Tensor, rotation: IndexRotation
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q_BTJE, w_BTJ and b_BTJ: what scoring needs beside the keys."""
        grouped = (self.n_kv_heads, self.n_heads // self.n_kv_heads, self.head_dim)
        q_BTIME = self.wq(q_BTHD.flatten(2)).unflatten(-1, grouped)
        cos_BTI1P, sin_BTI1P = rotation.cos_BTIP.unsqueeze(3), rotation.sin_BTIP.unsqueeze(3)
        q_BTJE = rotate_half_split(q_BTIME, cos_BTI1P, sin_BTI1P).flatten(2, 3)
        return q_BTJE, self.weights_proj(x_BTC), self.shift_proj(x_BTC)

    def keys(self, k_BTGD: Tensor, rotation: IndexRotation) -> Tensor:
        """k_BTIE: what the cache keeps."""
        k_BTIE = self.wk(k_BTGD.flatten(2)).unflatten(-1, (self.n_kv_heads, self.head_dim))
        return rotate_half_split(k_BTIE, rotation.cos_BTIP, rotation.sin_BTIP)

    def reset_rope_pairs(self) -> None:
        """Let index pair p rotate with rotary pair p; used where no checkpoint says otherwise."""
        transformers_init.copy_(self.rope_pairs, self._first_rope_pairs())

    def _first_rope_pairs(self) -> Tensor:
        pairs = torch.arange(self.head_dim // 2).clamp(max=self.n_rotary_pairs)
        return pairs.repeat(self.n_kv_heads, 1)


def model_head_width(config: PreTrainedConfig) -> int:
    """Width D of the model's own heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rotary_width(config: PreTrainedConfig) -> int:
    """How many dims of a head RoPE turns: the first R, mostly all of them."""
    share: float = full_attention_rope(config).get("partial_rotary_factor") or 1.0
    return int(model_head_width(config) * share)
