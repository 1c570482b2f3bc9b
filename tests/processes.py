"""What tests ask of other processes, and how they wait for them."""

import time

import psutil

# Far longer than anything takes, a start of vLLM on a busy machine included: what is not there by then hangs.
WAIT_S = 600


def until(holds):
    """Return what `holds()` returns as soon as that is true; fail if it never is."""
    deadline = time.monotonic() + WAIT_S
    while not (found := holds()):
        assert time.monotonic() < deadline, f"not within {WAIT_S} s"
        time.sleep(0.02)
    return found


def runs(process):
    """Whether a process is more than an entry that nobody has collected yet; it may end while it is asked."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def command_of(process):
    """Its words; none of a process that has ended, collected or not."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def family_of(pid):
    """The process and all below it; none if it has ended."""
    try:
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
