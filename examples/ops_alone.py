"""Sparse attention without a model: an indexer scores, the best keys are selected, attention runs over those.

    python examples/ops_alone.py --length 2048 --topk 256

The indexer's queries and keys are the attention's own here, so that an eighth of the keys
hold most of the attention, where a window of as many holds little. The last lines check what
holds whatever is selected.
"""

import argparse

import torch

from fulmen.ops import dense_attention, index_topk, sparse_attention


def main(length: int, topk: int) -> None:
    """Select, attend, compare with dense attention, and take gradients."""
    torch.manual_seed(0)
    heads, width = 4, 64
    q = (3 * torch.randn(1, length, heads, width)).requires_grad_()
    k = torch.randn(1, length, 1, width)
    v = torch.randn(1, length, 1, width)

    weights = torch.full((1, length, heads), 1 / heads)
    indices = index_topk(q.detach(), k, weights, topk=topk)
    out = sparse_attention(q, k, v, indices)
    dense = dense_attention(q, k, v)
    window = (torch.arange(length)[:, None] - torch.arange(topk)).clamp(min=-1)  # -1: nothing
    recent = sparse_attention(q, k, v, window.int()[None])
    print(f"keys per query: {topk} of up to {length}")
    print(f"error against dense attention, by indexer: {error(out, dense):.3f}")
    print(f"error against dense attention, by window:  {error(recent, dense):.3f}")

    everything = index_topk(q.detach(), k, weights, topk=length)
    print(f"error with all keys selected: {error(sparse_attention(q, k, v, everything), dense):.1e}")

    out.square().sum().backward()
    print(f"gradient of the queries: {q.grad.norm():.2f}")


def error(out: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative to what was wanted."""
    return ((out - wanted).norm() / wanted.norm()).item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=2048, help="tokens")
    parser.add_argument("--topk", type=int, default=256, help="keys that each query keeps")
    main(**vars(parser.parse_args()))
