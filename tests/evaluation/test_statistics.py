"""Intervals against published figures, and against what they must obey."""

import math
import random

import pytest

from fulmen.errors import ConfigError
from fulmen.evaluation.statistics import (
    clustered_difference_interval,
    mean_interval,
    paired_difference_interval,
    paired_ratio_interval,
    wilson_interval,
)


def answers(both, only_first, only_second, neither):
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return first, second


class TestWilson:
    @pytest.mark.parametrize(
        ("successes", "n", "low", "high"),
        [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
    )
    def test_figures_of_newcombe_1998(self, successes, n, low, high):
        interval = wilson_interval(successes, n)
        assert interval.estimate == successes / n
        assert interval[1:] == pytest.approx((low, high), abs=5e-5)

    def test_right_and_wrong_mirror_each_other(self):
        for successes in range(11):
            one, other = wilson_interval(successes, 10), wilson_interval(10 - successes, 10)
            assert one.low == pytest.approx(1 - other.high, abs=1e-12)
            assert 0 <= one.low <= one.estimate <= one.high <= 1

    def test_more_confidence_is_wider(self):
        assert wilson_interval(7, 10, 0.99).low < wilson_interval(7, 10).low < wilson_interval(7, 10, 0.5).low

    def test_without_samples(self):
        with pytest.raises(ConfigError, match="no values for an interval of shares; use at least 1"):
            wilson_interval(0, 0)


class TestPairedDifference:
    def test_figure_of_newcombe_1998(self):
        interval = paired_difference_interval(*answers(36, 12, 2, 0))
        assert interval == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)

    def test_swapping_the_two_mirrors_the_interval(self):
        first, second = answers(14, 5, 1, 22)
        one, other = paired_difference_interval(first, second), paired_difference_interval(second, first)
        assert one == pytest.approx((-other.estimate, -other.high, -other.low))

    def test_equal_answers_leave_a_small_doubt(self):
        low, high = paired_difference_interval(*answers(18, 0, 0, 2))[1:]
        assert -0.2 < low < 0 < high < 0.2
        assert low == pytest.approx(-high)

    def test_all_right_and_all_wrong(self):
        assert paired_difference_interval(*answers(0, 8, 0, 0)).estimate == 1
        low, high = paired_difference_interval(*answers(8, 0, 0, 0))[1:]
        assert (low, high) == pytest.approx((-0.3244, 0.3244), abs=5e-5)

    def test_agreement_makes_it_narrower_than_disagreement(self):
        agreeing = paired_difference_interval(*answers(10, 0, 0, 10))
        crossing = paired_difference_interval(*answers(0, 10, 10, 0))
        assert agreeing.high < crossing.high

    def test_covers_the_truth_about_as_often_as_it_says(self):
        generator = random.Random(0)
        hits = 0
        for _ in range(400):
            hard = [generator.random() for _ in range(40)]
            first = [generator.random() < 0.9 - 0.4 * h for h in hard]
            second = [generator.random() < 0.8 - 0.4 * h for h in hard]
            interval = paired_difference_interval(first, second)
            hits += interval.low <= 0.1 <= interval.high
        assert 0.92 < hits / 400 < 0.99


class TestClusteredDifference:
    def test_by_hand(self):
        """Differences 3, 1, 0 on texts of 4 questions: mean 1/3, standard error sqrt(7/3) / 4 / sqrt(3)."""
        first = [True] * 3 + [False] + [True] + [False] * 7
        clusters = [0] * 4 + [1] * 4 + [2] * 4
        interval = clustered_difference_interval(first, [False] * 12, clusters)
        half = 4.302653 * math.sqrt(7 / 3) / 4 / math.sqrt(3)
        assert interval == pytest.approx((1 / 3, 1 / 3 - half, 1), abs=1e-5)
        assert 1 / 3 + half > 1

    def test_never_narrower_than_independent_questions(self):
        first, second = answers(36, 12, 2, 0)
        alone = paired_difference_interval(first, second)
        spread = clustered_difference_interval(first, second, [n % 10 for n in range(50)])
        crowded = clustered_difference_interval(first, second, [n // 5 for n in range(50)])
        for wider, narrower in ((crowded, spread), (spread, alone)):
            assert wider.low <= narrower.low < narrower.high <= wider.high
        assert crowded.low < alone.low

    def test_covers_where_questions_of_a_text_are_all_alike(self):
        """20 texts of 8 equal answers: the interval for independent questions misses most of the time."""
        draw = random.Random(0)
        covered = {"clustered": 0, "independent": 0}
        for _ in range(300):
            first, second = (
                [answer for answer in (draw.random() < 0.5 for _ in range(20)) for _ in range(8)]
                for _ in range(2)
            )
            clusters = [n // 8 for n in range(160)]
            low, high = clustered_difference_interval(first, second, clusters)[1:]
            covered["clustered"] += low <= 0 <= high
            low, high = paired_difference_interval(first, second)[1:]
            covered["independent"] += low <= 0 <= high
        assert covered["clustered"] > 0.92 * 300
        assert covered["independent"] < 0.7 * 300

    def test_one_text_has_no_limits(self):
        interval = clustered_difference_interval(*answers(1, 2, 0, 1), [0] * 4)
        assert interval == (0.5, -math.inf, math.inf)


class TestMean:
    @pytest.mark.parametrize(
        ("n", "quantile"),
        [(2, 12.7062), (3, 4.30265), (5, 2.77645), (10, 2.26216), (31, 2.04227), (101, 1.98397)],
    )
    def test_quantiles_of_students_table(self, n, quantile):
        values = list(range(n))
        spread = math.sqrt(n * (n + 1) / 12)
        low, high = mean_interval(values)[1:]
        assert (high - low) / 2 == pytest.approx(quantile * spread / math.sqrt(n), rel=2e-6)
        assert (high + low) / 2 == pytest.approx((n - 1) / 2)

    def test_one_value_has_no_limits(self):
        assert mean_interval([2.5]) == (2.5, -math.inf, math.inf)

    def test_nan_stays_visible(self):
        assert all(math.isnan(value) for value in mean_interval([1.0, math.nan]))

    def test_without_values(self):
        with pytest.raises(ConfigError, match="no values for an interval of means"):
            mean_interval([])


class TestPairedRatio:
    dense = (1.2, 2.9, 2.1, 0.8, 1.7)

    def test_denominators_of_one_give_the_mean(self):
        assert paired_ratio_interval(self.dense, [1.0] * 5) == pytest.approx(mean_interval(self.dense))

    def test_a_constant_ratio_is_certain(self):
        interval = paired_ratio_interval([1.02 * loss for loss in self.dense], self.dense)
        assert interval == pytest.approx((1.02, 1.02, 1.02))

    def test_pairs_are_far_narrower_than_the_windows_spread(self):
        losses = [
            1.02 * loss + step for loss, step in zip(self.dense, (0.01, -0.01, 0, 0.01, -0.01), strict=True)
        ]
        paired = paired_ratio_interval(losses, self.dense)
        assert paired.low < 1.02 < paired.high
        assert paired.high - paired.low < 0.05 * (mean_interval(losses).high - mean_interval(losses).low)

    def test_unit_does_not_matter(self):
        bits = [loss / math.log(2) for loss in self.dense]
        other = [1.3, 3.0, 2.1, 0.8, 1.9]
        in_bits = paired_ratio_interval([loss / math.log(2) for loss in other], bits)
        assert in_bits == pytest.approx(paired_ratio_interval(other, self.dense))

    def test_one_pair_has_no_limits(self):
        assert paired_ratio_interval([3.0], [2.0]) == (1.5, -math.inf, math.inf)

    def test_zero_denominators(self):
        with pytest.raises(ConfigError, match="sum to 0"):
            paired_ratio_interval([1.0, 2.0], [0.0, 0.0])
