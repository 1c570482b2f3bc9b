"""vLLM as a guest in a process that trains: what it changes of the process is put back when it returns."""

import gc
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

# For the guest, while it works. A sampler's function would be compiled for seconds when it is first used.
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
# A user's own wish for servers, which would win over what is asked for here.
UNSET = ("VLLM_CPU_KVCACHE_SPACE",)
# What vLLM replaces on a CPU by functions that do nothing.
REPLACED = (
    (torch, "set_num_threads"),
    (torch.accelerator, "synchronize"),
    (torch.accelerator, "empty_cache"),
)
# By which ones, once it has run; it counts on finding them again.
_replacements: dict[str, Any] = {}


@contextmanager
def as_guest() -> Iterator[None]:
    """Within the block vLLM has the process as it wants it; afterwards all is as before.

    That is: environment variables, the random states of Python, NumPy and torch, threads and default dtype of
    torch, whether gradients are computed, functions of torch that vLLM replaces, and what the garbage
    collector looks at.
    """
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stack.enter_context(_own_environment())
        stack.enter_context(_own_random_states())
        stack.enter_context(_own_torch())
        yield


@contextmanager
def _own_environment() -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(SETTINGS)
    for name in UNSET:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before.items() - os.environ.items())


@contextmanager
def _own_random_states() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _own_torch() -> Iterator[None]:
    functions = [(module, name, getattr(module, name)) for module, name in REPLACED]
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    for module, name in REPLACED:
        setattr(module, name, _replacements.get(name, getattr(module, name)))
    eager = torch.compiler.set_stance("default" if torch.cuda.is_available() else "force_eager")
    try:
        with eager, torch.no_grad():
            yield
    finally:
        for module, name, function in functions:
            _replacements[name] = getattr(module, name)
            setattr(module, name, function)
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        gc.unfreeze()
