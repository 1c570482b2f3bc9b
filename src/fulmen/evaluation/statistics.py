"""Intervals for shares, paired differences, means and paired ratios: what a report writes after ±."""

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist, fmean
from typing import NamedTuple, TypedDict

from fulmen.errors import ConfigError

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """An estimate and the limits of its confidence interval, in the unit of the values given."""

    estimate: float
    low: float
    high: float


class IntervalRow(TypedDict):
    """An `Interval` as JSON, which has no infinity: a limit that does not exist is null."""

    estimate: float
    low: float | None
    high: float | None


def interval_row(interval: Interval) -> IntervalRow:
    """The interval as JSON."""
    estimate, *limits = interval
    low, high = (limit if math.isfinite(limit) else None for limit in limits)
    return {"estimate": estimate, "low": low, "high": high}


def wilson_interval(successes: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Score interval of a share; it stays within [0, 1] and holds at 0 and n successes too.

    Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927), 209-212. Raises ConfigError if n is 0.
    """
    _require_values("shares", n)
    assert 0 <= successes <= n, (successes, n)
    z = _normal_quantile(confidence)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the limit is the share itself, which rounding would miss by an ulp.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(share, low, high)


def paired_difference_interval(
    first: Sequence[bool], second: Sequence[bool], confidence: float = CONFIDENCE
) -> Interval:
    """Interval of share(first) - share(second), where both answered the same questions in the same order.

    Wilson's limits of both shares, joined by the square-and-add rule with the correlation of the answers.
    Source: R. G. Newcombe, Stat. Med. 17 (1998), 2635-2650, method 10. Raises ConfigError without answers.
    """
    assert len(first) == len(second), (len(first), len(second))
    share_1, low_1, high_1 = wilson_interval(sum(map(bool, first)), len(first), confidence)
    share_2, low_2, high_2 = wilson_interval(sum(map(bool, second)), len(second), confidence)
    correlation = _newcombe_correlation(first, second)

    def joined(below: float, above: float) -> float:
        return math.sqrt(max(below**2 - 2 * correlation * below * above + above**2, 0))

    difference = share_1 - share_2
    low = difference - joined(share_1 - low_1, high_2 - share_2)
    high = difference + joined(high_1 - share_1, share_2 - low_2)
    return Interval(difference, low, high)


def clustered_difference_interval(
    first: Sequence[bool],
    second: Sequence[bool],
    clusters: Sequence[Hashable],
    confidence: float = CONFIDENCE,
) -> Interval:
    """`paired_difference_interval` for questions that share texts: answers within a cluster may be alike.

    Each limit is the farther one of two: Newcombe's, which takes the questions for independent but holds
    where the two hardly ever differ; and that of the cluster totals as a ratio to the cluster sizes, which
    takes the clusters for independent. No finite limits for a single cluster of several questions.

    Args:
        clusters: of each question; all different: the result is about Newcombe's.

    Source: W. G. Cochran, Sampling Techniques, 3rd ed. (1977), chapter 9A.
    Raises ConfigError without answers.
    """
    assert len(first) == len(clusters), (len(first), len(clusters))
    alone = paired_difference_interval(first, second, confidence)
    totals: dict[Hashable, list[int]] = {}
    for one, two, cluster in zip(first, second, clusters, strict=True):
        difference, size = totals.get(cluster, (0, 0))
        totals[cluster] = [difference + bool(one) - bool(two), size + 1]
    differences, sizes = zip(*totals.values(), strict=True)
    together = paired_ratio_interval(differences, sizes, confidence)
    low, high = min(alone.low, together.low), max(alone.high, together.high)
    return Interval(
        alone.estimate, low if math.isinf(low) else max(low, -1), high if math.isinf(high) else min(high, 1)
    )


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Student's t interval of a mean; a single value has no finite limits.

    Source: Student, Biometrika 6 (1908), 1-25. Raises ConfigError without values.
    """
    _require_values("means", len(values))
    mean = fmean(values)
    half = _half_width(values, confidence)
    return Interval(mean, mean - half, mean + half)


def paired_ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], confidence: float = CONFIDENCE
) -> Interval:
    """Interval of sum(numerators) / sum(denominators), pair by pair: a model's loss over the dense one's.

    Sequences differ far more from one another than the two models do on one of them, and the pairs take that
    out: the spread is that of `numerator - ratio * denominator`.
    Source: W. G. Cochran, Sampling Techniques, 3rd ed. (1977), section 6.3, with Student's t.
    Raises ConfigError without values, or if the denominators sum to 0.
    """
    assert len(numerators) == len(denominators), (len(numerators), len(denominators))
    _require_values("ratios", len(numerators))
    mean = fmean(denominators)
    if mean == 0:
        raise ConfigError("the dense losses sum to 0, so no ratio to them exists; use other sequences")
    ratio = fmean(numerators) / mean
    residuals = [top - ratio * bottom for top, bottom in zip(numerators, denominators, strict=True)]
    half = _half_width(residuals, confidence) / abs(mean)
    return Interval(ratio, ratio - half, ratio + half)


def _newcombe_correlation(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Phi of the 2 x 2 table of answers, with Newcombe's continuity correction if it is positive."""
    n, right_1, right_2 = len(first), sum(map(bool, first)), sum(map(bool, second))
    both = sum(bool(one and two) for one, two in zip(first, second, strict=True))
    neither = n - right_1 - right_2 + both
    excess = both * neither - (right_1 - both) * (right_2 - both)
    margins = right_1 * (n - right_1) * right_2 * (n - right_2)
    if margins == 0:
        return 0.0
    corrected = max(excess - n / 2, 0) if excess > 0 else excess
    return corrected / math.sqrt(margins)


def _half_width(values: Sequence[float], confidence: float) -> float:
    if len(values) < 2:
        return math.inf
    mean, freedom = fmean(values), len(values) - 1
    # Not `statistics.stdev`: it fails on NaN and infinity, which shall show in the report.
    variance = sum((value - mean) ** 2 for value in values) / freedom
    return _student_quantile(freedom, confidence) * math.sqrt(variance / len(values))


def _normal_quantile(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _student_quantile(freedom: int, confidence: float) -> float:
    """The t with P(|T| < t) = confidence, by bisection."""
    low, high = 0.0, 2.0
    while _student_within(high, freedom) < confidence:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _student_within(middle, freedom) < confidence else (low, middle)
    return high


def _student_within(t: float, freedom: int) -> float:
    """P(|T| < t): the finite series of Abramowitz & Stegun (1964), 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for step in range(2 + odd, freedom + 1, 2):
        total += term
        term *= (step - 1) / step * math.cos(angle) ** 2
    return (angle + math.sin(angle) * total) * 2 / math.pi if odd else math.sin(angle) * total


def _require_values(what: str, n: int) -> None:
    if n < 1:
        raise ConfigError(f"no values for an interval of {what}; use at least 1 sequence or sample")
