"""Keeps one engine: starts it, and ends all of its processes when the gateway ends, however that does.

Run by its path, so that it needs next to nothing and is there before the engine is:

    python -P keeper.py LIFELINE PARENT FOLDER COMMAND...

LIFELINE is the reading end of a pipe whose other end the gateway, the process PARENT, holds: the kernel
closes that even for a process that is killed. A byte in it means "end the engine now". FOLDER has the
engine's sockets, and goes with the gateway. SIGTERM is handed on to the engine; its exit code comes back.
"""

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil

POLL_MS, WAIT_S = 250, 0.02
# Python's own process that frees shared memory of others, when all of them have ended.
TRACKER, TRACKER_S = "multiprocessing.resource_tracker", 2.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LINUX = sys.platform == "linux"


def keep(lifeline: int, parent: int, folder: str, command: list[str]) -> int:
    """Start `command` and stay until it has ended, or is to end; return its exit code."""
    if _LINUX:
        # Whoever loses its parent below this process becomes its child, wherever it has gone meanwhile.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    code = 0
    if os.getppid() == parent:
        engine = subprocess.Popen(command, preexec_fn=_end_with(os.getpid()) if _LINUX else None)
        signal.signal(signal.SIGTERM, lambda *_: engine.terminate())
        _until_end(engine, lifeline, parent)
        _end_all(engine)
        code = engine.returncode
    if _is_gone(lifeline, parent):
        shutil.rmtree(folder, ignore_errors=True)
    return code if code >= 0 else 128 - code


def _until_end(engine: "subprocess.Popen[bytes]", lifeline: int, parent: int) -> None:
    """Return when the engine has ended or is to end."""
    poller = select.poll()
    poller.register(lifeline, select.POLLIN)
    with contextlib.suppress(AttributeError, OSError):  # not in older kernels, and on Linux only
        poller.register(os.pidfd_open(engine.pid), select.POLLIN)
    # Should another process have got hold of the pipe, the parent's number tells.
    while engine.poll() is None and os.getppid() == parent:
        if any(file == lifeline for file, _ in poller.poll(POLL_MS)):
            return


def _end_all(engine: "subprocess.Popen[bytes]") -> None:
    """Kill what is left, until nothing is: a process may just be starting another one."""
    spare_until = time.monotonic() + TRACKER_S
    while engine.poll() is None or psutil.Process().children():
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if time.monotonic() > spare_until or not any(TRACKER in part for part in process.cmdline()):
                    process.kill()
        time.sleep(WAIT_S)
        if engine.poll() is not None:
            _collect()


def _collect() -> None:
    """Forget processes that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _is_gone(lifeline: int, parent: int) -> bool:
    """Whether the gateway has ended, not just asked for the engine's end."""
    if os.getppid() != parent:
        return True
    return bool(select.select([lifeline], [], [], 0)[0]) and os.read(lifeline, 1) == b""


def _end_with(keeper: int) -> Callable[[], None]:
    """For the engine, before it is the engine: to be killed with this process."""

    def prepare() -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:
            os._exit(1)

    return prepare


if __name__ == "__main__":
    sys.exit(keep(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:]))
