"""Programs that start at once: forks of a process that has imported libraries, for each test process its own.

A fresh interpreter takes seconds to import torch and Transformers. A fork imports fulmen itself; it has a
number, signals, outputs and an environment of its own as well, and ends as any interpreter does.
"""

import atexit
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cached_property
from importlib import import_module

# What takes longest to import of what conversions, training and evaluation use.
LIBRARIES = (
    *("torch", "torch._dynamo", "torch.distributed.tensor", "datasets", "accelerate", "gguf", "peft"),
    *("transformers.trainer", "transformers.models.auto.modeling_auto", "transformers.models.llama"),
    "transformers.models.llama.modeling_llama",
)


class ForkServer:
    """A process that has imported libraries, in an environment with some variables more, and forks."""

    def __init__(self, libraries, environment):
        self._libraries, self._environment = libraries, environment

    @cached_property
    def connection(self):
        """A socket to it. It ends when this process does, and with it the other end."""
        ours, theirs = socket.socketpair()
        chosen = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **self._environment}
        command = [sys.executable, "-m", __name__, str(theirs.fileno()), *self._libraries]
        subprocess.Popen(command, env={**os.environ, **chosen}, pass_fds=[theirs.fileno()])
        theirs.close()
        return ours


TORCH = ForkServer(LIBRARIES, {})


class Forked:
    """A program that runs: `python -c CODE ARGUMENTS`, forked. `pid` is its own."""

    def __init__(self, code, *arguments, environment=None, stderr=None, server=TORCH):
        self._outputs = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]  # noqa: SIM115
        self._status, theirs = socket.socketpair()
        request = {"code": code, "arguments": list(map(str, arguments)), "cwd": os.getcwd()}
        request["environment"] = {**os.environ, **(environment or {})}
        out, err = (file.fileno() for file in self._outputs)
        message = json.dumps(request).encode()
        descriptors = [theirs.fileno(), out, err if stderr is None else stderr]
        socket.send_fds(server.connection, [len(message).to_bytes(4)], descriptors)
        server.connection.sendall(message)
        theirs.close()
        self._lines, self.returncode = self._status.makefile("rb", 0), None
        self.pid = int(self._lines.readline())

    def wait(self, timeout):
        """Wait for its end; return the exit status, less than 0 for a signal.

        Kills it after so many seconds, and raises TimeoutError.
        """
        if not select.select([self._status], [], [], timeout)[0]:
            os.kill(self.pid, signal.SIGKILL)
            raise TimeoutError(f"{self.pid} took more than {timeout} s")
        self.returncode = int(self._lines.readline())
        return self.returncode

    def communicate(self, timeout=600):
        """Wait for its end; return what it printed on stdout and stderr."""
        if self.returncode is None:
            self.wait(timeout)
        for file in self._outputs:
            file.seek(0)
        return tuple(file.read().decode() for file in self._outputs)


def _next_program(connection):
    """Fork for each request; return in the fork, which has become that program but for its code."""
    while True:
        size, descriptors, *_ = socket.recv_fds(connection, 4, 3)
        if not size:
            os._exit(0)
        request = json.loads(connection.recv(int.from_bytes(size), socket.MSG_WAITALL))
        if os.fork() == 0:
            connection.close()
            status, *outputs = descriptors
            if child := os.fork():
                _tell(status, child)
            os.close(status)
            for number, descriptor in enumerate(outputs, 1):
                os.dup2(descriptor, number)
                os.close(descriptor)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.chdir(request["cwd"])
            os.environ.clear()
            os.environ.update(request["environment"])
            sys.argv = ["-c", *request["arguments"]]
            return request["code"]
        for descriptor in descriptors:
            os.close(descriptor)


def _tell(status, child):
    """Write the program's number and, in the end, how it ended."""
    with os.fdopen(status, "w") as file:
        print(child, file=file, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=file, flush=True)
    os._exit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for library in sys.argv[2:]:
        import_module(library)
    gc.freeze()
    atexit.register(gc.unfreeze)  # else libraries complain of leaks
    CODE = _next_program(socket.socket(fileno=int(sys.argv[1])))
    exec(compile(CODE, "<string>", "exec"), {"__name__": "__main__"})
