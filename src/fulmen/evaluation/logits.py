"""How many logits are alive at once."""

from typing import Any

CHUNK_LOGITS = 2**23


def rows_of_chunk(lm_head: Any) -> int:
    """Tokens whose logits are made together, so that they take 32 MB in float32."""
    return max(CHUNK_LOGITS // lm_head.weight.shape[0], 1)
