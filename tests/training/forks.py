"""Runs in processes of their own. The functions stand at the top of a module."""

import os
import signal
import socket
from collections.abc import Callable, Sequence

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from tests.fork_server import Forked

CALL = """
import torch
from {module} import {function}
{function}(*{arguments!r})
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""
# Ports that were found free: nobody else is given one as long as it is bound, and a rank may listen there.
HELD: list[socket.socket] = []
LAUNCH = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def run_killed(function: Callable, cases: Sequence[tuple]) -> None:
    """Call `function(*case)` for each case; each must `die`."""
    _run_forks(function, [({}, case) for case in cases], -signal.SIGKILL)


def die() -> None:
    """What `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def run_two_processes(function: Callable, arguments: tuple, *options: str) -> None:
    """Call `function(*arguments)` in two processes of one run, as `accelerate launch` with these options."""
    launcher = launchers_environment(*options)
    _run_forks(function, [({**launcher, **rank}, arguments) for rank in two_ranks()], 0)


def launchers_environment(*options: str) -> dict[str, str]:
    """What `accelerate launch` tells its two processes alike."""
    args = launch_command_parser().parse_args(["--num_processes", "2", *LAUNCH, *options, "script"])
    return prepare_multi_gpu_env(_validate_launch_command(args)[0])


def two_ranks() -> list[dict[str, str]]:
    """What any launcher tells each of two processes. `fulmen train` is tested with a real one."""
    free = socket.socket()
    free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    free.bind(("127.0.0.1", 0))
    HELD.append(free)
    port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


def _run_forks(function: Callable, calls: list[tuple[dict, tuple]], expected: int) -> None:
    programs = []
    for environment, arguments in calls:
        code = CALL.format(module=function.__module__, function=function.__name__, arguments=arguments)
        programs.append(Forked(code, environment=environment))
    said = [program.communicate(timeout=240) for program in programs]
    ends = [program.returncode for program in programs]
    assert ends == [int(expected)] * len(calls), "\n".join(out + err[-3000:] for out, err in said)
