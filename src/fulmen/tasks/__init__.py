"""Problems that a program can check: what post-training rewards and evaluations count.

A task makes problems from an index, the same ones each time, and scores replies to them.
"""

from fulmen.tasks.catalog import named, task_names

__all__ = ["named", "task_names"]
