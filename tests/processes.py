"""What tests ask of other processes."""

import psutil


def runs(process):
    """Whether a process is more than an entry that nobody has collected yet; it may end while it is asked."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
