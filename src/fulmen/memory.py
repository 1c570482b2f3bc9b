"""How much memory this process may take."""

from pathlib import Path

import psutil
import torch

# Where Linux keeps the limit of a container: the second version of control groups, and the first.
GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def available_bytes(device: torch.device | None = None) -> int:
    """What can be had without swapping, within a container's limit; what a GPU has free, if that is less."""
    free = min([int(psutil.virtual_memory().available), *_left_of_limits()])
    if device is not None and device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(device)[0])
    return free


def _left_of_limits() -> list[int]:
    """What containers leave; files that are only cached do not count as used."""
    found = []
    for limit, used, cached in GROUPS:
        try:
            most = int(Path(limit).read_text())
            stat = dict(
                line.split() for line in Path(limit).with_name("memory.stat").read_text().splitlines()
            )
            found.append(most - int(Path(used).read_text()) + int(stat.get(cached, 0)))
        except (OSError, ValueError):
            continue  # no such limit, or the word "max"
    return found
