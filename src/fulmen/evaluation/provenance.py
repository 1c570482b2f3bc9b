"""What a reader needs to repeat a run: command, date, machine and versions."""

import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from fulmen.version import __version__


def about_run(model: str, command: Sequence[str] = ()) -> dict[str, str]:
    """What a reader needs to repeat the run: model, command, date, machine and versions.

    Args:
        model: its name.
        command: by default that of this process.
    """
    program, *arguments = command or sys.argv
    cores, threads = os.cpu_count(), torch.get_num_threads()
    return {
        "model": model,
        "command": " ".join((Path(program).name, *arguments)),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{processor_name()}, {cores} cores, {threads} threads, {_accelerator()}",
        "versions": f"fulmen {__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}",
    }


def processor_name() -> str:
    """The processor's name, which Python itself does not know on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _accelerator() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
