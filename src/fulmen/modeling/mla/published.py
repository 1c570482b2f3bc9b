"""The indexers of a block-FP8 model as DeepSeek-V3.2's own checkpoint has them.

`wq_b` and `wk` are FP8 in the blocks of the other projections, `weights_proj` is bfloat16, `k_norm` float32.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fulmen.modeling.quantization.fp8 import BLOCK_SCALE, fp8_blocks

_IN_BLOCKS = ("wq_b.weight", "wk.weight")
_KINDS = {"weights_proj": torch.bfloat16, "k_norm": torch.float32}


def is_published_in_fp8(settings: Mapping[str, Any]) -> bool:
    """Whether the settings of a quantization are those of DeepSeek's own files."""
    return settings.get("quant_method") == "fp8" and len(settings.get("weight_block_size") or ()) == 2


def published_indexers(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of all indexers as they are stored. settings: for which `is_published_in_fp8`."""
    rows, columns = settings["weight_block_size"]
    stored: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(_IN_BLOCKS):
            powers = settings.get("scale_fmt") == "ue8m0"
            codes, scale = fp8_blocks(tensor, (rows, columns), powers_of_two=powers)
            stored |= {name: codes, name.removesuffix("weight") + BLOCK_SCALE: scale}
        else:
            module = name.split(".")[-2]
            stored[name] = tensor.to(_KINDS.get(module, tensor.dtype))
    return stored
