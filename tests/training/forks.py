"""Runs in processes of their own: one fresh interpreter imports everything, then forks for each.

The functions stand at the top of a module, which must not train when imported: threads do not survive a fork.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

# Prints how each ended: the exit status, or less than 0 for a signal.
SCRIPT = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from {module} import {function}
children = []
for environment, arguments in {calls!r}:
    if (child := os.fork()) == 0:
        os.environ.update(environment)
        try:
            {function}(*arguments)
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    children.append(child)
print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""
LAUNCH = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def run_killed(function: Callable, cases: Sequence[tuple]) -> None:
    """Call `function(*case)` for each case; each must `die`."""
    _run_forks(function, [({}, case) for case in cases], -signal.SIGKILL)


def die() -> None:
    """What `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def run_two_processes(function: Callable, arguments: tuple, *options: str) -> None:
    """Call `function(*arguments)` in two processes of one run, as `accelerate launch` with these options.

    The environment is the launcher's own; that it starts processes is shown where `fulmen train` runs.
    """
    args = launch_command_parser().parse_args(["--num_processes", "2", *LAUNCH, *options, "script"])
    launcher = prepare_multi_gpu_env(_validate_launch_command(args)[0])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    _run_forks(function, [(rank, arguments) for rank in ranks], 0, launcher)


def _run_forks(
    function: Callable,
    calls: list[tuple[dict, tuple]],
    expected: int,
    environment: dict[str, str] | None = None,
) -> None:
    script = SCRIPT.format(module=function.__module__, function=function.__name__, calls=calls)
    paths = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parents[2])],
        env={**os.environ, **(environment or {}), **paths},
        capture_output=True,
        text=True,
        timeout=240,
    )
    ends = done.stdout.split()[-len(calls) :]
    assert ends == [str(int(expected))] * len(calls), done.stdout + done.stderr[-3000:]
