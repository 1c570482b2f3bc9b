"""Without a GPU, Triton interprets its kernels. It must be told before anything imports it, and torch may."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
