"""Worlds worth training on: harder ones level by level, kept where some model solves them sometimes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fulmen.tasks.worlds.world import LEVELS, World, make_world

# Whether a model solves a world in one attempt, which has its number.
Attempt = Callable[[World, int], bool]


@dataclass(frozen=True)
class Rung:
    """One level.

    Attributes:
        level: from 1.
        kept: worlds that some model solved in some attempt: pass@n > 0.
        tried: how many there were.
    """

    level: int
    kept: tuple[World, ...]
    tried: int


def climb(
    models: Sequence[Attempt], per_level: int, attempts: int, first: int = 0, levels: int = LEVELS
) -> Iterator[Rung]:
    """Levels from the easiest on, to the first that nobody solves anything of.

    Args:
        models: each is asked until one has solved a world.
        per_level: worlds of each level.
        attempts: of each model at each world (n).
        first: the index of the first world.
        levels: at most so many.
    """
    for level in range(1, levels + 1):
        worlds = [make_world(index, level) for index in range(first, first + per_level)]
        kept = [
            world
            for world in worlds
            if any(model(world, attempt) for model in models for attempt in range(attempts))
        ]
        yield Rung(level, tuple(kept), len(worlds))
        if not kept:
            return
