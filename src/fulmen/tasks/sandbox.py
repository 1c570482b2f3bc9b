"""Generated Python, run where it can do no harm.

    ran = run_calls("def f(x): return 2 * x", "f", [[1], [2]])
    assert ran.values == (2, 4)

A process of its own in Linux namespaces (users, mounts, processes, network, IPC): no network, no file but
Python's library, read-only, and a small /tmp in memory, no other process, nobody's rights, limits on time,
memory, files and output, no environment. Where the system does not let it be made, nothing is run. What the
code should have returned never enters: values come out and are compared outside, so that no trick within can
make an answer right.
"""

import json
import os
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fulmen.errors import ConfigError, SandboxError
from fulmen.tasks import sandbox_guest
from fulmen.tasks.sandbox_guest import STARTED, packed, unpacked

ISOLATIONS = ("namespaces", "limits")
_GUEST = Path(sandbox_guest.__file__)
_SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
# Starting Python and the namespaces is not the code's time.
_START_S = 30.0


@dataclass(frozen=True)
class SandboxLimits:
    """What code may use.

    Attributes:
        seconds: of the clock, for all calls together.
        memory_bytes: address space of the process, Python's own (about 40 MB) included.
        disk_bytes: of all files it writes.
        output_bytes: of what it returns, as JSON.
    """

    seconds: float = 5.0
    memory_bytes: int = 512 << 20
    disk_bytes: int = 16 << 20
    output_bytes: int = 1 << 20


@dataclass(frozen=True)
class CallResults:
    """What came of code: `values`, one a call, plain Python values, or None and why."""

    values: tuple[Any, ...] | None
    reason: str = ""


def run_calls(
    source: str,
    function: str,
    calls: Sequence[Sequence[Any]],
    limits: SandboxLimits = SandboxLimits(),
    isolation: str = "namespaces",
) -> CallResults:
    """Run `source` in the sandbox and call a function that it defines, once for each list of arguments.

    Args:
        source: Python of unknown origin.
        function: a name that it defines.
        calls: arguments of each call: plain values, as numbers, strings, lists, tuples, sets and dicts.
        isolation: "namespaces"; or "limits", which is no sandbox: the code is held to its limits, but may
            read and write what you may, and use the network.

    Raises SandboxError where namespaces cannot be had, ConfigError for another isolation. Whatever the
    code does is a `CallResults`.
    """
    require_isolation(isolation)
    return _run(source, function, calls, limits, isolation)


def require_isolation(isolation: str) -> None:
    """Raises SandboxError, with the reason, if code cannot be isolated here; ConfigError for another word."""
    if isolation not in ISOLATIONS:
        raise ConfigError(f"isolation={isolation!r} cannot be; use {' or '.join(ISOLATIONS)}")
    reason = _reason_against() if isolation == "namespaces" else None
    if reason:
        raise SandboxError(
            f"generated code cannot be isolated here ({reason}), so none is run; allow user namespaces "
            "(sysctl kernel.apparmor_restrict_unprivileged_userns=0, or a container that permits it), or "
            "accept isolation=limits, which protects none of your files"
        )


@cache
def _reason_against() -> str | None:
    if sys.platform != "linux":
        return f"{sys.platform} has no namespaces"
    ran = _run("def f(): return 1", "f", [[]], SandboxLimits(), "namespaces", keep_errors=True)
    return None if ran.values == (1,) else ran.reason


def _run(
    source: str,
    function: str,
    calls: Sequence[Sequence[Any]],
    limits: SandboxLimits,
    isolation: str,
    keep_errors: bool = False,
) -> CallResults:
    with tempfile.TemporaryDirectory(prefix="fulmen-sandbox-") as root:
        request = {
            **vars(limits),
            **{"source": source, "function": function, "calls": [packed(list(call)) for call in calls]},
            **{"root": root if isolation == "namespaces" else None, "library": _library()},
        }
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_GUEST)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if keep_errors else subprocess.DEVNULL,
            cwd=root,
            env={},
            start_new_session=True,
        )
        try:
            output, reason = _exchange(process, json.dumps(request).encode(), limits)
        finally:
            _end(process)
    return CallResults(None, reason) if reason else _read(output)


def _exchange(process: subprocess.Popen[bytes], request: bytes, limits: SandboxLimits) -> tuple[bytes, str]:
    """The process's output, and why it was cut short, if it was."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(request)
        process.stdin.close()
    except OSError:
        return b"", "it did not start"
    output, deadline, started = b"", time.monotonic() + _START_S, False
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
            return output, f"it took more than {limits.seconds if started else _START_S:g} s"
        piece = os.read(process.stdout.fileno(), 1 << 16)
        output += piece
        if not piece:
            return output, ""
        if not started and STARTED in output:
            output, started = output.partition(STARTED)[2], True
            deadline = time.monotonic() + limits.seconds
        if len(output) > limits.output_bytes:
            return output, f"it wrote more than {limits.output_bytes} bytes"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of it. Its children die with it, in namespaces."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None and not pipe.closed:
            pipe.close()


def _read(output: bytes) -> CallResults:
    try:
        result = json.loads(output)
        if "values" in result:
            return CallResults(tuple(map(unpacked, result["values"])))
        return CallResults(None, str(result["error"])[:300])
    except (ValueError, TypeError, KeyError, RecursionError):
        said = output.decode(errors="replace").strip().splitlines()
        return CallResults(None, said[-1][:200] if said else "it ended without a result")


@cache
def _library() -> list[str]:
    """Directories that Python needs, no one of them within another."""
    own = [
        os.path.dirname(os.__file__),
        sysconfig.get_config_var("DESTSHARED") or "",
        f"{sys.base_prefix}/lib",
    ]
    wanted = [*own, *_SYSTEM_LIBRARIES]
    found = sorted({os.path.realpath(path) for path in wanted if os.path.isdir(path)})
    return [path for path in found if not any(path.startswith(f"{other}/") for other in found)]
