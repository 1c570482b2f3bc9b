"""Layers with linear attention (Gated DeltaNet, arXiv 2412.06464) in place of softmax: they stay as they are.

Such a layer keeps a state of one size, whatever the text's length, in place of keys and values.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


class LinearCost(NamedTuple):
    """What one such layer costs a token.

    Attributes:
        weights: of its projections and its convolution.
        state: numbers of its state, in float32; 7 FLOPs each: it decays, is read by the key, written, and
            read by the query.
    """

    weights: int
    state: int

    @property
    def flops(self) -> int:
        """Beside those of the weights."""
        return 7 * self.state


def linear_layers(config: Any) -> list[int]:
    """Indices of the layers with linear attention."""
    kinds = getattr(config, "layer_types", None) or []
    return [layer for layer, kind in enumerate(kinds) if kind == "linear_attention"]


def linear_cost(config: Any) -> LinearCost:
    """Of each layer in `linear_layers`; nothing for a model without."""
    if not linear_layers(config):
        return LinearCost(0, 0)
    heads, hidden = config.linear_num_value_heads, config.hidden_size
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = heads * config.linear_value_head_dim
    # Queries, keys, values and gates; decay and learning rate of each head; the output.
    projections = hidden * (2 * keys + 2 * values + 2 * heads + values)
    convolution = (2 * keys + values) * config.linear_conv_kernel_dim
    return LinearCost(projections + convolution, values * config.linear_key_head_dim)


def read_documents_apart(module: nn.Module) -> None:
    """Let a layer of a DSA model begin each packed document with an empty state, as one that comes alone."""
    module.register_forward_pre_hook(_one_document_a_row, with_kwargs=True)
    module.register_forward_hook(_documents_in_a_row, with_kwargs=True)


def _one_document_a_row(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    lengths = _document_lengths(kwargs)
    if lengths is None:
        return None
    documents = kwargs["hidden_states"].flatten(0, 1).split(lengths)
    # Nothing comes after the padding of a row.
    return args, {**kwargs, "hidden_states": pad_sequence(list(documents), batch_first=True)}


def _documents_in_a_row(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out_NLC: Tensor
) -> Tensor | None:
    lengths = _document_lengths(kwargs)
    if lengths is None:
        return None
    tokens = torch.cat([out_LC[:length] for out_LC, length in zip(out_NLC, lengths, strict=True)])
    return tokens.unflatten(0, kwargs["visible"].start_BT.shape)


def _document_lengths(kwargs: dict[str, Any]) -> list[int] | None:
    """Of all documents, row by row; None where rows are one each: plain, padded, or behind a cache."""
    visible, padding = kwargs["visible"], kwargs.get("attention_mask")
    if visible.plain or padding is not None or kwargs.get("cache_params") is not None:
        return None
    position_T = torch.arange(visible.start_BT.shape[1], device=visible.start_BT.device)
    first_N = (visible.start_BT == position_T).flatten().nonzero()[:, 0].tolist()
    ends = [*first_N[1:], visible.start_BT.numel()]
    return [end - first for first, end in zip(first_N, ends, strict=True)]
