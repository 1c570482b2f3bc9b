"""No operation ever creates a tensor of size T x S, let alone T x S x heads."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fulmen.ops.attention.dense import dense_attention
from fulmen.ops.attention.sparse import sparse_attention
from fulmen.ops.losses.indexer import indexer_loss, indexer_loss_selected
from fulmen.ops.topk import index_topk, select_topk
from tests.ops.ops_cases import causal, normal

pytestmark = pytest.mark.usefixtures("backend")

T = S = 1600
K, H, G, D, J, E = 16, 4, 2, 4, 4, 4
INDEX_KEYS = 2


class LargestTensor(TorchDispatchMode):
    """Remembers the most numbers that any operation, forward or backward, put into one tensor."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.numbers = max(self.numbers, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


def attention_inputs():
    shapes = [(1, T, H, D), (1, S, G, D), (1, S, G, D)]
    return [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def index_inputs():
    shapes = [(1, T, J, E), (1, S, INDEX_KEYS, E), (1, T, J), (1, T, J)]
    return [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def selection():
    return torch.arange(S - K, S).expand(1, T, K).clone()


def run_dense():
    return dense_attention(*attention_inputs(), *causal(1, T, S), 0.5)[0]


def run_sparse():
    return sparse_attention(*attention_inputs(), selection(), 0.5)[0]


def run_loss():
    q, k, _ = attention_inputs()
    return indexer_loss(*index_inputs(), q, k, *causal(1, T, S), 0.5).kl_BT


def run_loss_selected():
    q, k, _ = attention_inputs()
    return indexer_loss_selected(*index_inputs(), q, k, selection(), 0.5).kl_BT


def run_index_topk():
    return index_topk(*index_inputs(), *causal(1, T, S), K)


@pytest.mark.parametrize("run", [run_dense, run_sparse, run_loss, run_loss_selected, run_index_topk])
def test_largest_tensor_is_a_block(run):
    with LargestTensor() as largest:
        out = run()
        if out.requires_grad:
            out.sum().backward()
    assert 0 < largest.numbers < T * S


def test_selection_from_given_scores_adds_only_a_block():
    scores = normal(1, T, S)
    with LargestTensor() as largest:
        select_topk(scores.clone(), *causal(1, T, S), K)
    assert largest.numbers <= T * S
