"""Several processes of one run (`accelerate launch`): the first writes and speaks, the others follow it."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

Result = TypeVar("Result")


def processes() -> PartialState:
    """All processes of the run, connected. Accelerate's bare `PartialState()` may leave those of a machine
    without a GPU unconnected, each then taking itself for the first."""
    return PartialState(cpu=not torch.cuda.is_available())


def is_main_process() -> bool:
    """Whether this is the process that writes: the only one, or number 0 of those a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def are_many() -> bool:
    """Whether a launcher started more than one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def wait_for_all() -> None:
    """Go on when every process is here."""
    if are_many():
        processes().wait_for_everyone()


def main_process_first(work: Callable[[], Result]) -> Result:
    """`work()` in the first process while the others wait, then in these: they find it done."""
    if not is_main_process():
        wait_for_all()
        return work()
    result = work()
    wait_for_all()
    return result


def broadcast_from_main(value: Result) -> Result:
    """The first process's `value`, in all of them."""
    if not are_many():
        return value
    processes()
    return broadcast_object_list([value])[0]
