"""Compile every Triton kernel for a GPU that is not here: `python compile_triton.py cuda 80 gqa v3.2`.

The interpreter accepts much that the compiler refuses. Prints, a line each, the kernel and its bytes of
shared memory. Nothing is launched: results are garbage.
"""

import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fulmen.ops.attention.sparse.triton import sparse_attention_triton
from fulmen.ops.scores.triton import index_scores_triton
from fulmen.ops.topk.triton import index_topk_triton

# H, G, D, V and J, I, E. "small" takes every branch of every kernel, and the least time to compile.
SHAPES = {
    "small": ((8, 2, 48, 32), (4, 2, 48)),
    "gqa": ((32, 8, 128, 128), (8, 8, 48)),
    "v3.2": ((128, 1, 576, 512), (64, 1, 128)),
}
T, S, K = 20, 3000, 512


class AbsentGpu:
    """What Triton asks a driver before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(self, *args, grid, warmup, **kwargs):
    kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
    print(self.__name__, kernel.metadata.shared, flush=True)


def compile_for(heads: tuple[int, ...], index_heads: tuple[int, ...], dtype: torch.dtype) -> None:
    (H, G, D, V), (J, index_keys, E) = heads, index_heads
    interval = torch.zeros(1, T, dtype=torch.int32), torch.full((1, T), S, dtype=torch.int32)
    index = [
        torch.zeros(*s, dtype=dtype) for s in [(1, T, J, E), (1, S, index_keys, E), (1, T, J), (1, T, J)]
    ]
    index_topk_triton(*index, *interval, K)
    index_scores_triton(*index[:3], None, *interval)
    qkv = [
        torch.zeros(*s, dtype=dtype, requires_grad=True) for s in [(1, T, H, D), (1, S, G, D), (1, S, G, V)]
    ]
    topk = torch.zeros(1, T, K, dtype=torch.int32)
    for softcap in (None, 50.0):
        sparse_attention_triton(qkv[0][:, :1], *qkv[1:], topk[:, :1], 1.0, softcap)
        out, _ = sparse_attention_triton(*qkv, topk, 1.0, softcap)
        for by_key in (False, True):
            torch.use_deterministic_algorithms(by_key)
            torch.autograd.grad(out.sum(), qkv, retain_graph=True)
        torch.use_deterministic_algorithms(False)


if __name__ == "__main__":
    backend, architecture, *shapes = sys.argv[1:]
    target = (
        GPUTarget(backend, int(architecture), 32)
        if backend == "cuda"
        else GPUTarget(backend, architecture, 64)
    )
    driver.set_active(AbsentGpu(target))
    launch, JITFunction.run = JITFunction.run, compile_only
    for shape in shapes:
        compile_for(*SHAPES[shape], torch.bfloat16)
