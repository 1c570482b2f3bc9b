"""Scores of replies elsewhere: what the files that `fulmen export-rl` writes ask fulmen for."""

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

from fulmen.tasks.catalog import named
from fulmen.tasks.rewards import GuardedTask


@cache
def _task(name: str) -> GuardedTask:
    return GuardedTask(named(name))


def score_row(metadata: Mapping[str, Any], reply: str) -> float:
    """A reply's strict score, 0 to 1; 0 where it cannot be scored, which another trainer could not leave out.

    Args:
        metadata: of a row that was exported: `task`, a name with parameters, and `index`.

    Raises ConfigError for a task that is not known here, EndpointError for a judge that is down.
    """
    task = _task(metadata["task"])
    worth = task.score(task.problem(int(metadata["index"])), reply).strict
    return 0.0 if math.isnan(worth) else worth
