"""How far apart the policy that samples and the policy that is trained are: they should be one.

They compute in different pieces and round differently; what is beyond that is a weight that did not arrive.
"""

from dataclasses import dataclass

from torch import Tensor

from fulmen.errors import RolloutError

# Mean difference that rounding explains, in nats a token, by the dtype that is computed in.
GAP_LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}


@dataclass(frozen=True)
class LogprobGap:
    """Log-probabilities of sampled tokens under engine and trainer.

    Attributes:
        tokens: compared.
        mean, largest: absolute differences, in nats.
    """

    tokens: int
    mean: float
    largest: float

    def require_within(self, limit: float, when: str) -> None:
        """Raise RolloutError if the mean is above `limit` nats a token, or no number.

        when: for the message, as "before step 3".
        """
        if not self.mean <= limit:
            raise RolloutError(
                f"engine and trainer differ by {self.mean:.2g} nats a token (at most {self.largest:.2g}) "
                f"{when}, more than {limit:.0e}: the engine has other weights or computes otherwise; use "
                "another engine, or no bf16"
            )


def gap_between(engine_N: Tensor, trainer_N: Tensor) -> LogprobGap:
    """The gap between log-probabilities of the same tokens, in nats."""
    apart_N = (engine_N.double() - trainer_N.double()).abs()
    return LogprobGap(len(apart_N), apart_N.mean().item(), apart_N.max().item())
