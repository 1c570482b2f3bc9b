"""The operations of DeepSeek Sparse Attention on torch tensors: a library of its own.

`functional.py` documents the functions; `with pin_backend("reference"):` chooses what computes them.
"""

from fulmen.ops.dispatch import BACKENDS, pin_backend
from fulmen.ops.functional import (
    dense_attention,
    index_scores,
    index_topk,
    indexer_loss,
    indexer_loss_selected,
    select_topk,
    selection_loss,
    sparse_attention,
)
from fulmen.ops.losses.indexer.reference import IndexerLoss
from fulmen.ops.paged.decode import paged_decode  # the operations on caches, for serving, register themselves
from fulmen.ops.paged.requests import attend_requests  # likewise
from fulmen.ops.two_level import two_level_topk  # likewise: for fulmen's models

__all__ = [
    "BACKENDS",
    "IndexerLoss",
    "dense_attention",
    "index_scores",
    "index_topk",
    "indexer_loss",
    "indexer_loss_selected",
    "pin_backend",
    "select_topk",
    "selection_loss",
    "sparse_attention",
]
