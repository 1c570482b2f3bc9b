"""What every benchmark says about the machine it ran on."""

import os
import platform
import sys
from pathlib import Path
from typing import Any


def describe_machine() -> dict[str, Any]:
    """The command, the processor, cores, memory, what else kept them busy, and Python's version."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.split(": ")[1] for line in lines if line.startswith("model name"))
    return {
        "command": " ".join(sys.argv),
        "cpu": next(names, platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "memory GiB": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "load before": os.getloadavg()[0],
        "python": platform.python_version(),
    }
