"""Weights of a coarse level against the config: vLLM lets buffers be missing, and trips over extra ones."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from fulmen.config import CoarseShape
from fulmen.errors import CheckpointError
from fulmen.modeling.gqa.coarse import CoarseIndexer

REMEDY = "let 'dsa' in config.json say what the weights are (and no hf_overrides), or get the model anew"


def of_coarse_shape(
    weights: Iterable[tuple[str, Tensor]], shape: CoarseShape
) -> Iterator[tuple[str, Tensor]]:
    """The weights as they come.

    Raises CheckpointError for one of a coarse level of another shape, or where there is to be none.
    """
    rows = {"wk": shape.width, "wq": shape.query_heads * shape.width, "b_shift": shape.query_heads}
    for name, weight in weights:
        _, is_coarse, part = name.partition(".indexer.coarse.")
        if is_coarse and not shape.width:
            raise CheckpointError(f"weights have {name}, where the config says one level; {REMEDY}")
        if is_coarse and len(weight) != rows.get(part, len(weight)):
            raise CheckpointError(
                f"{name} has {len(weight)} rows, where coarse_head_dim={shape.width} and "
                f"coarse_n_heads={shape.heads} ask for {rows[part]}; {REMEDY}"
            )
        yield name, weight


def require_coarse_weights(model: nn.Module) -> None:
    """Raise CheckpointError for a coarse level that no weights came for: its keys are zeros as it is made."""
    for name, module in model.named_modules():
        if isinstance(module, CoarseIndexer) and not module.wk.any():
            raise CheckpointError(
                f"weights lack {name}.wk, where coarse_head_dim={module.width} asks for two levels; {REMEDY}"
            )
