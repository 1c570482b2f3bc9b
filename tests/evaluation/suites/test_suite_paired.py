"""McNemar's test against counting all outcomes, bootstrap intervals against the normal limit."""

import math
import random
from itertools import product

import pytest

from fulmen.errors import ConfigError
from fulmen.evaluation.suites.paired import (
    bootstrap_ratio_interval,
    mcnemar_exact,
    paired_points,
    points_in_words,
)


def by_counting(only_first, only_second):
    """Share of all coin sequences that are at least as uneven."""
    n, gap = only_first + only_second, abs(only_first - only_second)
    outcomes = list(product((0, 1), repeat=n))
    return sum(abs(2 * sum(outcome) - n) >= gap for outcome in outcomes) / len(outcomes)


@pytest.mark.parametrize("only_first", range(6))
@pytest.mark.parametrize("only_second", range(6))
def test_mcnemar_is_the_share_of_outcomes_as_uneven(only_first, only_second):
    agreed = [(True, True)] * 3 + [(False, False)] * 2
    pairs = [(True, False)] * only_first + [(False, True)] * only_second + agreed
    first, second = zip(*pairs, strict=True)
    assert mcnemar_exact(first, second) == pytest.approx(by_counting(only_first, only_second))
    assert mcnemar_exact(first, second) == mcnemar_exact(second, first)


def test_mcnemar_known_values():
    assert mcnemar_exact([True] * 6, [False] * 6) == pytest.approx(2 / 64)
    assert mcnemar_exact([], []) == mcnemar_exact([True], [True]) == 1


def test_bootstrap_of_a_ratio_comes_near_the_normal_limit():
    draw = random.Random(1)
    bottoms = [draw.uniform(50, 150) for _ in range(400)]
    tops = [1.02 * bottom + draw.gauss(0, 5) for bottom in bottoms]
    interval = bootstrap_ratio_interval(tops, bottoms, seed=3)
    assert interval.estimate == sum(tops) / sum(bottoms)
    half = 1.96 * 5 / math.sqrt(400) / 100
    assert interval.high - interval.estimate == pytest.approx(half, rel=0.15)
    assert interval.estimate - interval.low == pytest.approx(half, rel=0.15)
    assert interval == bootstrap_ratio_interval(tops, bottoms, seed=3)
    assert interval != bootstrap_ratio_interval(tops, bottoms, seed=4)


def test_bootstrap_at_its_limits():
    same = bootstrap_ratio_interval([2.0, 4.0], [1.0, 2.0])
    assert (same.low, same.estimate, same.high) == (2, 2, 2)
    assert bootstrap_ratio_interval([2.0], [1.0]) == (2, -math.inf, math.inf)
    assert bootstrap_ratio_interval([0.0, 3.0], [0.0, 2.0]).high == 1.5
    for empty in ([], [0.0]):
        with pytest.raises(ConfigError, match="use more or longer texts"):
            bootstrap_ratio_interval(empty, empty)


def test_points_say_a_width():
    dense = [True] * 18 + [False] * 2
    same = paired_points(dense, dense)
    assert (same["estimate"], same["p"], same["only_dsa"], same["only_dense"], same["n"]) == (0, 1, 0, 0, 20)
    words = points_in_words(same)
    assert words.startswith(f"no difference within ±{max(-same['low'], same['high']):.1f} points: ")
    assert "20 questions" in words
    worse = paired_points([False] * 20, dense)
    assert (worse["estimate"], worse["only_dense"]) == (-90, 18)
    assert points_in_words(worse).startswith("a difference: DSA − dense -90.0 points")
