"""What reinforcement learning asks of an inference engine."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How replies are sampled.

    Attributes:
        per_prompt: replies to each prompt, a group of GRPO.
        max_new_tokens: where a reply is cut; one of several turns with all that it was told in between.
        temperature: divides the logits.
        top_p: the smallest set of tokens with this probability is kept; 1 keeps all.
        top_k: at most so many tokens are kept; 0 keeps all. An engine that returns kept tokens needs one.
        seed: of the whole call; each reply has its own stream.
    """

    per_prompt: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Rollout:
    """One sampled reply, n tokens long.

    Attributes:
        prompt: index of its prompt in the call.
        tokens: n ids, with the end-of-text token if it ended.
        logprobs: n natural log-probabilities under the engine, of the logits over the temperature, normalised
            over the kept tokens.
        kept: n lists of the ids that top-p and top-k kept, the sampled one among them; None where all were.
        ended: whether the reply ended by itself.
        experts: chosen experts [n_positions][n_layers][n_experts_per_token] of prompt and reply, at each
            position whose output was used, in the layers that have experts; None for a model without.
        told: n flags, where the tokens are not the policy's, but what it was told between turns (log-
            probability 0, nothing kept); None where there are none.
    """

    prompt: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    kept: tuple[tuple[int, ...], ...] | None
    ended: bool
    experts: Sequence[Sequence[Sequence[int]]] | None = None
    told: tuple[bool, ...] | None = None

    @property
    def written(self) -> int:
        """Tokens that the policy wrote."""
        return len(self.tokens) - sum(self.told or ())


class RolloutEngine(Protocol):
    """Samples replies from the policy, whose weights it is given after every step."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Rollout]:
        """`per_prompt` rollouts for each prompt (token ids), in the order of the prompts."""

    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take over all of a model's weights, by their names in its `state_dict()`."""

    def close(self) -> None:
        """Give back memory and processes."""
