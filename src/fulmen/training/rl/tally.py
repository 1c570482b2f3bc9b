"""Figures of a step's forward passes, summed over replies, micro-batches and processes."""

from typing import Any

import torch
from torch import Tensor

from fulmen.training.rl.gap import LogprobGap
from fulmen.training.rl.objective import GrpoLoss
from fulmen.training.rl.scoring import TokenScores

BY_TOKEN = ("kl", "ratio", "entropy")
BY_REPLY = ("masked_share", "loss", "indexer_loss")


class StepTally:
    """What a step's log says of policy, engine and reference."""

    def __init__(self) -> None:
        self._gap = torch.zeros(3, dtype=torch.float64)
        self.begin()

    def begin(self) -> None:
        """Begin another step. The gap stays until there is another one."""
        self._sums = torch.zeros(len(BY_TOKEN) + len(BY_REPLY) + 4, dtype=torch.float64)
        self._gap_is_old = True

    def add(self, found: GrpoLoss, scores: TokenScores, counts_BT: Tensor, indexer_loss: Tensor) -> None:
        """One forward pass."""
        n_replies = len(counts_BT)
        by_token = [x[counts_BT].sum() for x in (found.kl_BT, found.ratio_BT, scores.entropy_BT)]
        by_reply = [
            (~found.keeps_B).sum(),
            found.loss.detach() * n_replies,
            indexer_loss.detach() * n_replies,
        ]
        mass = [scores.mass_M.sum(), torch.tensor(len(scores.mass_M))]
        counts = [counts_BT.sum(), torch.tensor(n_replies)]
        self._sums += torch.tensor([float(x) for x in (*by_token, *by_reply, *mass, *counts)]).double()

    def add_gap(self, gap_N: Tensor) -> None:
        """|log(engine / trainer)| of sampled tokens, under the same weights."""
        if self._gap_is_old:
            self._gap, self._gap_is_old = torch.zeros(3, dtype=torch.float64), False
        self._gap[0] += float(gap_N.sum())
        self._gap[1] += len(gap_N)
        self._gap[2] = max(float(self._gap[2]), float(gap_N.max()))

    @property
    def gap(self) -> LogprobGap:
        """All of `add_gap` in this step and process."""
        return LogprobGap(int(self._gap[1]), float(self._gap[0] / self._gap[1]), float(self._gap[2]))

    def row(self, accelerator: Any) -> dict[str, float]:
        """The means over all processes, by the names that the log has."""
        device = accelerator.device
        sums = accelerator.reduce(self._sums.float().to(device), "sum").tolist()
        *values, mass, n_mass, n_tokens, n_replies = sums
        divisors = [n_tokens] * len(BY_TOKEN) + [n_replies] * len(BY_REPLY)
        row = {
            name: value / divisor
            for name, value, divisor in zip((*BY_TOKEN, *BY_REPLY), values, divisors, strict=True)
        }
        gaps = accelerator.gather(self._gap.float().to(device)[None])
        gap = {
            "engine_trainer_gap": float(gaps[:, 0].sum() / gaps[:, 1].sum()),
            "engine_trainer_gap_max": float(gaps[:, 2].max()),
        }
        return {**row, "kept_mass": mass / n_mass, **gap, "tokens": n_tokens}
