"""How far an engine's rollouts and selections are from those of the model that should be the same."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from fulmen.modeling.rollouts import Rollout
from fulmen.modeling.selectors import IndexerSelector, SelectionInputs, dsa_attentions, use_selector
from fulmen.serving.engine.rollouts import VllmRollouts
from fulmen.training.rl.gap import LogprobGap, gap_between


@dataclass(frozen=True)
class SelectionGap:
    """Keys that engine and trainer select.

    Attributes:
        rows: queries that see more than k keys, of all layers.
        differing: those whose sets of keys are not the same.
        keys: share of the selected keys of all rows that the other one does not select.
    """

    rows: int
    differing: int
    keys: float

    @property
    def share(self) -> float:
        """Of the rows, those that differ; 0 where there are none."""
        return self.differing / self.rows if self.rows else 0.0


def logprob_gap(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    rollouts: Sequence[Rollout],
    temperature: float = 1.0,
) -> LogprobGap:
    """The gap between an engine's rollouts and a Transformers model that should be the same.

    prompts, temperature: of the call that gave the rollouts.
    """
    theirs = [torch.tensor(rollout.logprobs) for rollout in rollouts]
    ours = [rollout_logprobs(model, prompts[rollout.prompt], rollout, temperature) for rollout in rollouts]
    return gap_between(torch.cat(theirs), torch.cat(ours))


@torch.no_grad()
def rollout_logprobs(
    model: PreTrainedModel, prompt: Sequence[int], rollout: Rollout, temperature: float = 1.0
) -> Tensor:
    """logprobs_N, float32: of the reply's tokens under the model, normalised over the kept tokens."""
    count = len(rollout.tokens)
    ids_1T = torch.tensor([[*prompt, *rollout.tokens]], device=model.device)
    with _float32_head(model):
        output = model(ids_1T, use_cache=False, logits_to_keep=count + 1)
    logits_NV: Tensor = output.logits[0, :-1].float() / temperature
    tokens_N = ids_1T[0, -count:]
    chosen_N = logits_NV.gather(1, tokens_N[:, None])[:, 0]
    if rollout.kept is None:
        return (chosen_N - logits_NV.logsumexp(1)).cpu()
    # Filled up with a token that is kept, which is then not counted.
    width = max(map(len, rollout.kept))
    kept_NK = torch.tensor([[*kept, *[kept[0]] * (width - len(kept))] for kept in rollout.kept])
    n_kept_N = torch.tensor([len(kept) for kept in rollout.kept])
    beyond_NK = torch.arange(width) >= n_kept_N[:, None]
    kept_logits_NK = logits_NV.gather(1, kept_NK.to(logits_NV.device))
    kept_logits_NK = kept_logits_NK.masked_fill(beyond_NK.to(logits_NV.device), -torch.inf)
    return (chosen_N - kept_logits_NK.logsumexp(1)).cpu()


def selection_gap(
    model: PreTrainedModel, engine: VllmRollouts, texts: Sequence[Sequence[int]]
) -> SelectionGap:
    """The gap between the keys that both select when they read texts (token ids).

    Raises ConfigError: a dense model, or a text that does not fit the engine.
    """
    rows = differing = selected = missed = 0
    for tokens in texts:
        theirs, ours = engine.selections(tokens), own_selections(model, tokens)
        for layer, our_TK in ours.items():
            missed_T = _missed(our_TK, theirs[layer], len(tokens))
            rows, differing = rows + len(missed_T), differing + int((missed_T > 0).sum())
            selected, missed = selected + int((our_TK >= 0).sum()), missed + int(missed_T.sum())
    return SelectionGap(rows, differing, missed / selected if selected else 0.0)


@torch.no_grad()
def own_selections(model: PreTrainedModel, tokens: Sequence[int]) -> dict[int, Tensor]:
    """As `VllmRollouts.selections`, by the Transformers model. Raises ConfigError for a dense one."""
    dsa_attentions(model)
    recorder = _Recorder(model.config.dsa["topk"])
    with use_selector(model, recorder):
        model(torch.tensor([list(tokens)], device=model.device), use_cache=False, logits_to_keep=1)
    return recorder.found


@contextmanager
def _float32_head(model: PreTrainedModel) -> Iterator[None]:
    """The model's head in float32, as the engine's is: in bfloat16 logits of 20 would be an eighth apart."""

    def again(head: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if output.dtype == torch.float32:
            return output
        bias_V = None if head.bias is None else head.bias.float()
        return linear(inputs[0].float(), head.weight.float(), bias_V)

    handle = model.get_output_embeddings().register_forward_hook(again)
    try:
        yield
    finally:
        handle.remove()


class _Recorder(IndexerSelector):
    """The indexer's selection, kept by layer for the queries that see more than k keys."""

    def __init__(self, topk: int) -> None:
        self._topk = topk
        self.found: dict[int, Tensor] = {}

    def select(self, inputs: SelectionInputs, topk: int) -> Tensor:
        topk_BTK = super().select(inputs, topk)
        visible_BT = inputs.stop_BT - inputs.start_BT.clamp(min=0)
        self.found[inputs.layer_idx] = topk_BTK[visible_BT > self._topk].cpu()
        return topk_BTK


def _missed(our_TK: Tensor, their_TK: Tensor, n_keys: int) -> Tensor:
    """missed_T: how many of our keys they do not select; as both select equally many, also the reverse."""
    assert len(our_TK) == len(their_TK), "of the same queries"
    masks = []
    for topk_TK in (our_TK, their_TK):
        # The last column takes what is no key.
        mask_TS = torch.zeros(len(topk_TK), n_keys + 1, dtype=torch.bool)
        masks.append(mask_TS.scatter_(1, torch.where(topk_TK < 0, n_keys, topk_TK).long(), True)[:, :-1])
    return (masks[0] & ~masks[1]).sum(1)
