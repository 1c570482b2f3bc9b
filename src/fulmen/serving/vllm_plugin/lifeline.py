"""vLLM's processes below its first one end with it, where `fulmen serve` started them.

The keeper ends all of them; this is for the case that somebody kills it together with the gateway.
"""

import multiprocessing
import os
import threading
from functools import cache

# A variable of the engine's environment.
KEPT = "FULMEN_ENGINE_IS_KEPT"


def end_with_parent() -> None:
    """Watch the process that started this one, in a thread; one, however often this is called."""
    _watch_parent_of(os.getpid())


@cache  # by number: a fork of this process has a copy of the cache
def _watch_parent_of(_pid: int) -> None:
    parent = multiprocessing.parent_process()
    if parent is None or KEPT not in os.environ:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="fulmen-lifeline", daemon=True).start()
