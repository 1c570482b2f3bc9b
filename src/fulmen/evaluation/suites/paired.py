"""Tests and intervals for results in pairs: dense and DSA on the same questions or texts."""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from fulmen.errors import ConfigError
from fulmen.evaluation.statistics import CONFIDENCE, Interval, interval_row, paired_difference_interval

RESAMPLES = 2_000


def mcnemar_exact(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided p of "both are right equally often", from the questions where only one is right.

    Of these, the number that the first answers is binomial with 1/2; doubled smaller tail, at most 1.
    Source: Q. McNemar, Psychometrika 12 (1947), 153-157, in its exact form.
    """
    assert len(first) == len(second), (len(first), len(second))
    only_first = sum(bool(a) and not b for a, b in zip(first, second, strict=True))
    only_second = sum(bool(b) and not a for a, b in zip(first, second, strict=True))
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1))
    return min(2 * tail / 2**n, 1.0)


def bootstrap_ratio_interval(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Percentile interval of sum(numerators) / sum(denominators), with whole pairs drawn again.

    A pair is one text, whose tokens are not independent; so texts are drawn, not tokens. The same seed gives
    the same interval. Source: B. Efron, Ann. Stat. 7 (1979), 1-26.

    Raises ConfigError without pairs, or if the denominators sum to 0. One pair has no finite limits.
    """
    assert len(numerators) == len(denominators), (len(numerators), len(denominators))
    if not numerators or sum(denominators) == 0:
        raise ConfigError(f"{len(numerators)} texts give no ratio of losses; use more or longer texts")
    estimate = sum(numerators) / sum(denominators)
    if len(numerators) < 2:
        return Interval(estimate, -math.inf, math.inf)
    draw, indices = random.Random(seed), range(len(numerators))
    ratios = []
    for _ in range(resamples):
        drawn = draw.choices(indices, k=len(numerators))
        if bottom := sum(denominators[index] for index in drawn):
            ratios.append(sum(numerators[index] for index in drawn) / bottom)
    ratios.sort()
    cut = (1 - confidence) / 2 * (len(ratios) - 1)
    return Interval(estimate, ratios[math.floor(cut)], ratios[math.ceil(len(ratios) - 1 - cut)])


def paired_points(dsa: Sequence[bool], dense: Sequence[bool]) -> dict[str, Any]:
    """DSA minus dense in points, with 95 % interval, McNemar's p, and the counts where only one is right."""
    interval = Interval(*(100 * value for value in paired_difference_interval(dsa, dense)))
    pairs = list(zip(dsa, dense, strict=True))
    return {
        **interval_row(interval),
        "p": mcnemar_exact(dsa, dense),
        "only_dsa": sum(bool(a) and not b for a, b in pairs),
        "only_dense": sum(bool(b) and not a for a, b in pairs),
        "n": len(pairs),
    }


def points_in_words(points: Mapping[str, Any]) -> str:
    """A paired difference as a statement with a width."""
    low, high = points["low"], points["high"]
    limits = (
        f"{points['estimate']:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}, "
        f"McNemar p = {points['p']:.2g}, {points['n']} questions"
    )
    if low > 0 or high < 0:
        return f"a difference: DSA − dense {limits}"
    return f"no difference within ±{max(-low, high):.1f} points: DSA − dense {limits}"
