"""What runs in the sandbox, as a program of its own: `python -I -S sandbox_guest.py`.

It reads a request of `fulmen.tasks.sandbox` from its standard input, shuts itself in, runs the code, and
writes what came of it. It imports nothing but the standard library, all of it before it is shut in.
"""

import ctypes
import io
import json
import os
import resource
import sys
from contextlib import suppress
from typing import Any

NOBODY = 65534
STARTED = b"\n>"
# Of linux/sched.h, sys/mount.h, sys/prctl.h and linux/capability.h.
_NEW_MOUNTS, _NEW_UTS, _NEW_IPC = 0x00020000, 0x04000000, 0x08000000
_NEW_USER, _NEW_PIDS, _NEW_NET = 0x10000000, 0x20000000, 0x40000000
_READ_ONLY, _NO_SUID, _NO_DEVICES, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_DETACH = 2
_DIE_WITH_PARENT, _DUMPABLE, _DROP_BOUNDING, _NO_NEW_PRIVILEGES = 1, 4, 24, 38
_CAPABILITY_VERSION = 0x20080522


def main() -> None:
    """Serve one request: `source`, `function`, `calls`, limits, and `root`, where it is to be shut in."""
    request = json.loads(sys.stdin.buffer.read())
    if request["root"] is not None:
        _enter_namespaces(request["root"], request["library"], request["disk_bytes"])
    _limit(request)
    sys.stdout = sys.stderr = io.StringIO()
    os.write(1, STARTED)  # the clock of the code begins here
    os.write(1, json.dumps(_called(request)).encode())
    os._exit(0)


def _called(request: dict) -> dict:
    try:
        namespace: dict = {"__name__": "solution"}
        exec(compile(request["source"], "solution.py", "exec"), namespace)
        function = namespace[request["function"]]
        calls = [unpacked(arguments) for arguments in request["calls"]]
        return {"values": [packed(function(*arguments)) for arguments in calls]}
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {str(error)[:200]}"}


def packed(value: Any) -> Any:
    """A value as JSON has it, with marks where JSON has no such kind. Raises TypeError for other objects."""
    if isinstance(value, dict):
        return {"dict": [[packed(key), packed(one)] for key, one in value.items()]}
    if isinstance(value, (tuple, set, frozenset)):
        return {"tuple" if isinstance(value, tuple) else "set": [packed(one) for one in value]}
    if isinstance(value, list):
        return [packed(one) for one in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} is no plain value")


def unpacked(value: Any) -> Any:
    """What `packed` was given."""
    if isinstance(value, list):
        return [unpacked(one) for one in value]
    if isinstance(value, dict):
        ((kind, items),) = value.items()
        kinds: dict = {"dict": dict, "tuple": tuple, "set": set}
        return kinds[kind]([unpacked(one) for one in items])
    return value


def _limit(request: dict) -> None:
    limits = {
        resource.RLIMIT_AS: request["memory_bytes"],
        resource.RLIMIT_CPU: int(request["seconds"]) + 1,
        resource.RLIMIT_FSIZE: request["disk_bytes"],
        resource.RLIMIT_NPROC: 1,  # this process: no other one, no thread
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))


def _enter_namespaces(root: str, library: list[str], disk_bytes: int) -> None:
    """Go on as a process that has no network, no other processes and none of the user's files."""
    libc = ctypes.CDLL(None, use_errno=True)
    from_child, to_parent = os.pipe()
    from_parent, to_child = os.pipe()
    child = os.fork()
    if child:
        os.close(to_parent)  # so that the end of a child is read as one
        os.read(from_child, 1)
        with suppress(OSError):  # the child finds that it has no identity
            _map_users(child)
        os.write(to_child, b".")
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)
    _check(libc.prctl(_DIE_WITH_PARENT, 9, 0, 0, 0))
    _check(libc.unshare(_NEW_MOUNTS | _NEW_UTS | _NEW_IPC | _NEW_USER | _NEW_PIDS | _NEW_NET))
    os.write(to_parent, b".")
    os.read(from_parent, 1)
    for end in (from_child, to_parent, from_parent, to_child):
        os.close(end)
    _fork_and_wait(libc)
    _change_root(libc, root, library, disk_bytes)
    _give_up_rights(libc)
    # The first process of a namespace takes all others of it with it, and none of them can harm it: what
    # runs the code is its child, and ends with it whatever it does to get away.
    _check(libc.prctl(_DUMPABLE, 0, 0, 0, 0))
    _fork_and_wait(libc)


def _fork_and_wait(libc: ctypes.CDLL) -> None:
    """Go on in a child; the parent waits for it, ends as it does, and takes it along if it is killed."""
    child = os.fork()
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)
    _check(libc.prctl(_DIE_WITH_PARENT, 9, 0, 0, 0))


def _map_users(child: int) -> None:
    """Who the child is: nobody. Root's child is root until it has mounted what only root may see."""
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        users = groups = f"0 0 1\n{NOBODY} {NOBODY} 1"
    else:
        users, groups = f"{NOBODY} {uid} 1", f"{NOBODY} {gid} 1"
        _write(f"/proc/{child}/setgroups", "deny")
    _write(f"/proc/{child}/uid_map", users)
    _write(f"/proc/{child}/gid_map", groups)


def _change_root(libc: ctypes.CDLL, root: str, library: list[str], disk_bytes: int) -> None:
    """A file system that has Python's library, read-only, and a small /tmp in memory; nothing else."""
    _check(libc.mount(None, b"/", None, _RECURSIVE | _PRIVATE, None))
    options = f"size={disk_bytes},nr_inodes=1000,mode=755".encode()
    _check(libc.mount(b"none", root.encode(), b"tmpfs", _NO_SUID | _NO_DEVICES, options))
    for path in library:
        inside = root + path
        os.makedirs(inside)
        _check(libc.mount(path.encode(), inside.encode(), None, _BIND | _RECURSIVE, None))
        flags = _REMOUNT | _BIND | _READ_ONLY | _NO_SUID | _NO_DEVICES
        _check(libc.mount(None, inside.encode(), None, flags, None))
    os.makedirs(f"{root}/old")
    os.makedirs(f"{root}/tmp")
    os.chmod(f"{root}/tmp", 0o777)
    _check(libc.pivot_root(root.encode(), f"{root}/old".encode()))
    os.chdir("/")
    _check(libc.umount2(b"/old", _DETACH))
    os.rmdir("/old")
    os.chdir("/tmp")


def _give_up_rights(libc: ctypes.CDLL) -> None:
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
    capability = 0
    while libc.prctl(_DROP_BOUNDING, capability, 0, 0, 0) == 0:
        capability += 1
    if os.getuid() == 0:
        os.setresuid(NOBODY, NOBODY, NOBODY)
    assert os.getuid() == NOBODY
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    _check(libc.capset(header, (ctypes.c_uint32 * 6)()))
    _check(libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0))


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _check(returned: int) -> None:
    if returned != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    main()
