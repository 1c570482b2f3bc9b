"""What a coarse level costs: loss beyond one level's, and the attention that its candidates hold by layer."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fulmen.config import COARSE_FROM, DsaConfig
from fulmen.evaluation.controls import CandidateRecallSelector
from fulmen.evaluation.parity.results import CandidateRow, CoarseTable
from fulmen.evaluation.statistics import Interval, interval_row, mean_interval, paired_ratio_interval


def coarse_table(dsa: DsaConfig, k: int, texts: Sequence[Mapping[str, Any]]) -> CoarseTable:
    """Two levels against one, text by text, at a k that asks the coarse level.

    Args:
        texts: of each the scores ("record") of "dsa" and "one_level" at this k, and the latter's recalls.
    """
    two, one = (
        [text["record"]["scores"][name]["second_half"] for text in texts] for name in ("dsa", "one_level")
    )
    ratio = paired_ratio_interval(two, one)
    gaps = [more - less for more, less in zip(two, one, strict=True)]
    return {
        "k": k,
        "candidates": dsa.candidate_factor * k,
        "asked_from": COARSE_FROM * dsa.candidate_factor * k,
        "one_level": fmean(one),
        "two_levels": fmean(two),
        "gap": interval_row(mean_interval(gaps)),
        "over_one_level": interval_row(Interval(*(value - 1 for value in ratio))),
        "layers": _layers([text["recalls"]["one_level"] for text in texts]),
    }


def _layers(recalls: Sequence[Sequence[Sequence[float]]]) -> list[CandidateRow]:
    """Means over all texts."""
    whole = CandidateRecallSelector()
    for sums in recalls:
        whole.add_sums(sums)
    return [
        {"layer": layer, "candidates": held, "two_levels": two, "one_level": one, "oracle": oracle}
        for layer, held, two, one, oracle in whole.result()
    ]
