"""Rollouts by Transformers' `generate` on the policy itself: one copy of the weights, any device."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from fulmen.errors import RolloutError
from fulmen.modeling.rollouts import Rollout, Sampling
from fulmen.training.beginnings import prompts_cache
from fulmen.training.rl.routing import routing_of
from fulmen.training.rl.weights import policy_weights


class GenerateRollouts:
    """A `RolloutEngine` that is the model which is trained.

    Args:
        model: the policy; it is in eval mode while it writes.
        ends: ids that end a reply.
        pad: id for padding, which the model never sees.
        at_once: replies that are written together.
        bf16: compute under autocast, as the trainer does.
    """

    def __init__(
        self, model: PreTrainedModel, ends: Sequence[int], pad: int, at_once: int = 64, *, bf16: bool = False
    ) -> None:
        self.model, self.ends, self.pad, self.at_once, self.bf16 = model, list(ends), pad, at_once, bf16

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Rollout]:
        """As `RolloutEngine.generate`. The same call gives the same replies on the same machine.

        Raises RolloutError if top-p is to leave tokens out and no top-k says how many are kept at most.
        """
        if sampling.top_p < 1 and sampling.top_k == 0:
            raise RolloutError(f"top_p={sampling.top_p} needs a top_k, which bounds the kept tokens; as 64")
        asked = [number for number in range(len(prompts)) for _ in range(sampling.per_prompt)]
        found: list[Rollout] = []
        with torch.random.fork_rng(), _in_eval(self.model), _float32_head(self.model), torch.no_grad():
            torch.manual_seed(sampling.seed)
            for begin in range(0, len(asked), self.at_once):
                found += self._write(prompts, asked[begin : begin + self.at_once], sampling)
        return found

    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Nothing to take over: only that these are the policy's weights is checked.

        Raises RolloutError for a name or a shape that the policy does not have.
        """
        own = self._own_shapes
        given = {name: tensor.shape for name, tensor in weights}
        if mismatched := sorted(
            name for name in own.keys() | given.keys() if own.get(name) != given.get(name)
        ):
            raise RolloutError(
                f"weights of another model were given to the engine: {mismatched[0]} is "
                f"{given.get(mismatched[0])}, here {own.get(mismatched[0])}; give all of the policy's"
            )

    @cached_property
    def _own_shapes(self) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in policy_weights(self.model)}

    def close(self) -> None:
        """As `RolloutEngine.close`: the model is not the engine's."""

    def _write(
        self, prompts: Sequence[Sequence[int]], asked: Sequence[int], sampling: Sampling
    ) -> list[Rollout]:
        width = max(len(prompts[number]) for number in asked)
        rows = [[self.pad] * (width - len(prompts[number])) + list(prompts[number]) for number in asked]
        ids = torch.tensor(rows, device=self.model.device)
        lengths = torch.tensor([len(prompts[number]) for number in asked], device=ids.device)
        mask = (torch.arange(width, device=ids.device) >= width - lengths[:, None]).long()
        kept = KeptTokens(sampling)
        config = GenerationConfig(
            do_sample=True,
            use_cache=True,
            top_k=0,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=self.ends or None,
            pad_token_id=self.pad,
            disable_compile=True,
        )
        with (
            torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16),
            self._noting(len(rows)) as noted,
        ):
            written = self.model.generate(  # type: ignore[operator]
                ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([kept]),
                past_key_values=prompts_cache(self.model, ids, mask, asked),
            )
        found = kept.rollouts(asked, written[:, width:].cpu(), set(self.ends))
        if not noted:
            return found
        # Of padding none, and of a last token, which nothing was computed from.
        starts = [width - len(prompts[one.prompt]) for one in found]
        return [
            replace(one, experts=experts_SLK[start : width + len(one.tokens) - 1].tolist())
            for one, start, experts_SLK in zip(found, starts, noted[0], strict=True)
        ]

    def _noting(self, n_rows: int) -> AbstractContextManager[list[Tensor]]:
        """Where experts are noted; nothing for a model without."""
        if (routing := routing_of(self.model)) is None:
            return nullcontext([])
        routing.tell(None)
        return routing.noting(n_rows)


class KeptTokens(LogitsProcessor):
    """Applies temperature, top-k and top-p, and keeps what they left: ids and log-probabilities."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.steps: list[tuple[Tensor | None, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Log-probabilities of the kept tokens, -inf of all others, float32 [B, V]."""
        self._settle(input_ids[:, -1])
        logits = scores.float() / self.sampling.temperature
        if self.sampling.top_k == 0:
            self.steps.append((None, logits.log_softmax(-1)))
            return self.steps[-1][1]
        # Exactly K of them, however many are equal, as engines count.
        kept_BK = logits.topk(min(self.sampling.top_k, logits.shape[-1]))
        logp_BK = kept_BK.values.log_softmax(-1)
        above_BK = logp_BK.exp().cumsum(-1) - logp_BK.exp()
        is_kept_BK = above_BK < self.sampling.top_p
        is_kept_BK[:, 0] = True
        logp_BK = kept_BK.values.masked_fill(~is_kept_BK, -torch.inf).log_softmax(-1)
        self.steps.append((kept_BK.indices.masked_fill(~is_kept_BK, -1).cpu(), logp_BK))
        return torch.full_like(logits, -torch.inf).scatter(1, kept_BK.indices, logp_BK)

    def rollouts(self, asked: Sequence[int], written_BT: Tensor, ends: set[int]) -> list[Rollout]:
        """What was written, each reply up to its end."""
        self._settle(written_BT[:, -1])
        logp_BT = torch.stack([logp_B for _, logp_B in self.steps], dim=1)
        found = []
        for row, (prompt, tokens) in enumerate(zip(asked, written_BT.tolist(), strict=True)):
            length = next((n + 1 for n, token in enumerate(tokens) if token in ends), len(tokens))
            kept = None
            if self.sampling.top_k:
                kept = tuple(_ids(ids_BK[row]) for ids_BK, _ in self.steps[:length] if ids_BK is not None)
            logprobs = tuple(logp_BT[row, :length].tolist())
            is_ended = tokens[length - 1] in ends
            found.append(Rollout(prompt, tuple(tokens[:length]), logprobs, kept, is_ended))
        return found

    def _settle(self, chosen_B: Tensor) -> None:
        """Of the last step's distribution only the chosen token's log-probability is needed from now on."""
        if not self.steps:
            return
        ids_BK, logp = self.steps.pop()
        chosen_B1 = chosen_B[:, None].to(logp.device)
        if ids_BK is None:
            logp_B = logp.gather(1, chosen_B1)[:, 0]
        else:
            is_chosen_BK = ids_BK.to(logp.device) == chosen_B1
            logp_B = torch.where(is_chosen_BK, logp, 0).sum(-1)
        self.steps.append((ids_BK, logp_B.cpu()))


def _ids(row_K: Tensor) -> tuple[int, ...]:
    return tuple(one for one in row_K.tolist() if one >= 0)


@contextmanager
def _float32_head(model: PreTrainedModel) -> Iterator[None]:
    """Logits in float32, as the trainer computes them: in bfloat16 they are too coarse to compare."""
    head: Any = model.get_output_embeddings()
    weight_VC = head.weight.detach().float()
    bias_V = None if head.bias is None else head.bias.detach().float()

    def forward(hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return linear(hidden.float(), weight_VC, bias_V)

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


@contextmanager
def _in_eval(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout, and without the model's own settings for `generate`, which would change the policy."""
    was_training, settings = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings
        model.train(was_training)
