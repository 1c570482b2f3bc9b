"""The gap between engine and trainer, and its limit."""

import pytest
import torch

from fulmen.errors import RolloutError
from fulmen.training.rl.gap import LogprobGap, gap_between


def test_a_gap_beyond_the_limit_is_an_error():
    LogprobGap(3, 1e-4, 0.1).require_within(1e-4, "now")
    with pytest.raises(RolloutError, match=r"by 0\.1 nats a token \(at most 0\.3\) now, more than 1e-04"):
        LogprobGap(3, 0.1, 0.3).require_within(1e-4, "now")


def test_a_gap_that_is_no_number_is_beyond_any_limit():
    gap = gap_between(torch.tensor([0.0, float("nan")]), torch.zeros(2))
    with pytest.raises(RolloutError, match="differ by nan nats"):
        gap.require_within(1e-4, "now")
