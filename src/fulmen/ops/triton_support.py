"""Whether the Triton kernels (`<operation>/triton.py`) can run here.

Triton is optional, and a checkpoint's own copy of this source holds no kernel: so those modules are imported
by name, where they compute (`implements_by_name`), and `triton_reason` says why they cannot be.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch

from fulmen.ops.common.interpreter import INTERPRET_VARIABLE, is_interpreted

# Ampere: the first with bfloat16 matrix units.
LEAST_CAPABILITY = (8, 0)


def triton_reason(device: torch.device | str) -> str | None:
    """Why the Triton kernels cannot run on `device`; None if they can."""
    if reason := _import_reason():
        return reason
    kind = torch.device(device).type
    if kind == "cuda" and not torch.cuda.is_available():
        return "this machine (or this build of torch) has no GPU"
    if is_interpreted():
        return None
    if kind == "cpu":
        return f"its kernels run on a GPU, not on device 'cpu'; to test them there set {INTERPRET_VARIABLE}=1"
    if kind == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return f"its kernels need a GPU of compute capability {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}"
    return None


@cache
def _import_reason() -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed; pip install 'fulmen[gpu]'"
    try:
        import_module("fulmen.ops.triton_kit")
    except ImportError as error:
        return f"its kernels cannot be imported ({error}); pip install 'fulmen[gpu]'"
    return None
