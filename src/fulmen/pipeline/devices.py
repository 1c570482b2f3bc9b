"""Where models compute: a device by name, or the best that this machine has."""

import os

import torch
from transformers import PreTrainedModel

from fulmen.errors import ConfigError
from fulmen.pipeline.arguments import refused
from fulmen.pipeline.settings import AUTO_DEVICE

CPU = torch.device("cpu")


def device_of(device: object) -> torch.device | None:
    """A torch device that is here; "auto" is an accelerator if there is one; None stays.

    Raises ConfigError.
    """
    if device is None:
        return None
    if device == AUTO_DEVICE:
        return _best_device()
    try:
        found: torch.device = torch.device(device)  # type: ignore[call-overload]
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise refused("device", device, "name a device of this machine, as 'cpu' or 'cuda'") from error
    if found.type == "meta":
        raise refused("device", device, "name a device that holds weights, as 'cpu' or 'cuda'")
    return found


def move(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model on a device. Raises ConfigError if it has no room."""
    try:
        moved: PreTrainedModel = model.to(device)  # type: ignore[arg-type]
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"device={str(device)!r} has no room for {model.num_parameters():,} parameters; free some, "
            "or use a smaller dtype",
            arguments=["device"],
        ) from error
    return moved


def training_device(device: object) -> torch.device:
    """`device_of`, where inherit and Transformers' Trainer run too.

    Raises ConfigError for one without float64, and for a GPU that Trainer would not take.
    """
    found = device_of(device) or CPU
    if not _has_float64(found):
        raise refused("device", device, "it has no float64, which inherit computes in; use 'cpu'")
    if found.index not in (None, _local_rank()):
        raise refused(
            "device", device, f"use {found.type!r}; CUDA_VISIBLE_DEVICES={found.index} says which one that is"
        )
    return found


def _best_device() -> torch.device:
    """An accelerator if there is one that can do what inherit needs, which is float64; else the CPU."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return CPU
    own = torch.device(kind.type, _local_rank())
    return own if _has_float64(own) else CPU


def _has_float64(device: torch.device) -> bool:
    try:
        return bool(torch.empty(1, dtype=torch.float64, device=device).numel())
    except (RuntimeError, TypeError):
        return False


def _local_rank() -> int:
    """Number of this process among those that a launcher started on this machine: each takes its own GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))
