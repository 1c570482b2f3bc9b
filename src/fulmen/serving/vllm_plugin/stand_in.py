"""Imports of a language model from a module that has a model for images, too."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType

# As Transformers' code for images imports them.
TORCHVISION = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2")


@contextmanager
def torchvision_or_nothing() -> Iterator[None]:
    """Let torchvision be imported where it is not installed: empty, as long as the block lasts.

    Its builds want CUDA, and break an installation for CPUs. What reads texts alone asks nothing of it.
    """
    if "torchvision" in sys.modules or find_spec("torchvision") is not None:
        yield
        return
    modules = {name: ModuleType(name) for name in TORCHVISION}
    modules[TORCHVISION[-1]].functional = None  # type: ignore[attr-defined]
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
