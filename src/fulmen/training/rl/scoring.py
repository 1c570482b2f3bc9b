"""Log-probabilities of sampled tokens over what sampling kept, from those rows of the head alone."""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from fulmen.training.beginnings import hidden_states
from fulmen.training.rl.routing import routing_of

# Tokens whose rows of the head are gathered at once: K rows each, 128 MB for K = 64 and C = 1,024 in float32.
KEPT_CHUNK, FULL_CHUNK = 512, 256
# Of a forward pass, tokens whose whole distribution is looked at to see how much of it was kept.
MASS_TOKENS = 64


class Head(NamedTuple):
    """Output head: logits are softcap(scale (weight x + bias)) / temperature; softcap None: none."""

    weight_VC: Tensor
    bias_V: Tensor | None
    scale: float
    softcap: float | None
    temperature: float

    def finish(self, raw: Tensor) -> Tensor:
        """Logits from products with the weight, float32."""
        logits = raw * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits / self.temperature


class Replies(NamedTuple):
    """Prompts and sampled replies behind them, padded on the right.

    Attributes:
        input_ids: int64 [B, S].
        starts_B: where each reply begins.
        tokens_BT: the reply's tokens. counts_BT: bool, where there is one that the policy wrote.
        kept_BTK: ids that sampling kept, -1 for none; None: all of the vocabulary.
        experts_BSLK: experts that sampling chose, -1 for none; None: none are known.
    """

    input_ids: Tensor
    starts_B: Tensor
    tokens_BT: Tensor
    counts_BT: Tensor
    kept_BTK: Tensor | None
    experts_BSLK: Tensor | None = None


class TokenScores(NamedTuple):
    """Of sampled tokens: natural log-probability and entropy (nats) over the kept ones, float32 [B, T], and,
    of a few, what share of the whole distribution was kept, [M]."""

    logp_BT: Tensor
    entropy_BT: Tensor
    mass_M: Tensor


def head_of(model: PreTrainedModel, temperature: float) -> Head:
    """A model's head, with what its family does to logits."""
    config, layer = model.config.get_text_config(), model.get_output_embeddings()
    scale = getattr(config, "logit_scale", None) or 1.0
    if divisor := getattr(config, "logits_scaling", None):
        scale = 1 / divisor
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), scale, softcap, temperature)


def behind_prompts(
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    kept_BTK: Tensor | None,
    experts_BSLK: Tensor | None = None,
    told_BT: Tensor | None = None,
) -> Replies:
    """`Replies` from prompts padded on the left, int64 [B, P], and replies padded on the right [B, T].

    told_BT: bool, tokens of the replies that the policy did not write; None for none.
    """
    prompts_B, replies_B = prompt_mask.sum(-1), completion_mask.sum(-1)
    longest = int((prompts_B + replies_B).max())
    # Left padding goes to the end, where causal attention never sees it.
    ids = torch.cat([prompt_ids, completion_ids], dim=1)
    positions = torch.arange(longest, device=ids.device) + (prompt_ids.shape[1] - prompts_B)[:, None]
    input_ids = ids.gather(1, positions.clamp(max=ids.shape[1] - 1))
    experts = None if experts_BSLK is None else experts_BSLK[:, :longest]
    counts_BT = completion_mask.bool() if told_BT is None else completion_mask.bool() & ~told_BT
    return Replies(input_ids, prompts_B, completion_ids, counts_BT, kept_BTK, experts)


def let_score(model: PreTrainedModel, temperature: float) -> None:
    """Let `model(scored=replies)` return `TokenScores`; otherwise the model goes on as it did.

    By the model's own `forward`, which Accelerate's wrappers for several processes call.
    """
    own = model.forward

    @functools.wraps(own)
    def forward(self: PreTrainedModel, *args: Any, scored: Replies | None = None, **kwargs: Any) -> Any:
        if scored is None:
            return own(*args, **kwargs)
        return score_replies(self, scored, temperature)

    model.forward = MethodType(forward, model)  # type: ignore[method-assign]


def score_replies(model: PreTrainedModel, replies: Replies, temperature: float) -> TokenScores:
    """Scores of the replies' tokens under a model, divided by a temperature; 0 where there is none."""
    if replies.experts_BSLK is not None and (routing := routing_of(model)) is not None:
        routing.tell(replies.experts_BSLK)
    starts_B, counts_BT = replies.starts_B - 1, replies.counts_BT
    hidden_BTC, begins_B = hidden_states(model, replies.input_ids, starts_B, counts_BT.shape[1])
    rows, steps = counts_BT.nonzero(as_tuple=True)
    hidden_NC = hidden_BTC[rows, (starts_B - begins_B)[rows] + steps]
    head, tokens_N = head_of(model, temperature), replies.tokens_BT[counts_BT]
    if replies.kept_BTK is None:
        logp_N, entropy_N = all_logprobs(head, hidden_NC, tokens_N)
        mass_M = torch.ones(1, device=logp_N.device)
    else:
        kept_NK = replies.kept_BTK[counts_BT]
        logp_N, entropy_N = kept_logprobs(head, hidden_NC, tokens_N, kept_NK)
        some = slice(None, None, -(-len(tokens_N) // MASS_TOKENS))
        mass_M = kept_mass(head, hidden_NC[some].detach(), kept_NK[some])
    empty_BT = torch.zeros(counts_BT.shape, device=logp_N.device)
    return TokenScores(
        empty_BT.masked_scatter(counts_BT, logp_N), empty_BT.masked_scatter(counts_BT, entropy_N), mass_M
    )


def kept_logprobs(head: Head, hidden_NC: Tensor, tokens_N: Tensor, kept_NK: Tensor) -> tuple[Tensor, Tensor]:
    """logp_N and entropy_N over the kept tokens, the sampled one among them; K rows of the head a token."""
    return _in_chunks(_kept_chunk, head, hidden_NC, KEPT_CHUNK, tokens_N, kept_NK)


def all_logprobs(head: Head, hidden_NC: Tensor, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
    """logp_N and entropy_N over the whole vocabulary."""
    return _in_chunks(_full_chunk, head, hidden_NC, FULL_CHUNK, tokens_N)


@torch.no_grad()
def kept_mass(head: Head, hidden_MC: Tensor, kept_MK: Tensor) -> Tensor:
    """Probability of the kept tokens among all, [M]."""
    kept = kept_logits(head, hidden_MC, kept_MK).logsumexp(-1)
    return (kept - _full_logits(head, hidden_MC).logsumexp(-1)).exp()


def kept_logits(head: Head, hidden_NC: Tensor, kept_NK: Tensor) -> Tensor:
    """Logits of the kept tokens, float32 [N, K]; -inf where there is none."""
    ids_NK = kept_NK.clamp(min=0)
    with _no_autocast(hidden_NC):
        raw_NK = torch.einsum("nc,nkc->nk", hidden_NC.float(), head.weight_VC[ids_NK].float())
    if head.bias_V is not None:
        raw_NK = raw_NK + head.bias_V[ids_NK].float()
    return head.finish(raw_NK).masked_fill(kept_NK < 0, -torch.inf)


def _full_logits(head: Head, hidden_NC: Tensor) -> Tensor:
    bias_V = None if head.bias_V is None else head.bias_V.float()
    with _no_autocast(hidden_NC):
        return head.finish(linear(hidden_NC.float(), head.weight_VC.float(), bias_V))


def _no_autocast(tensor: Tensor) -> torch.autocast:
    """Logits in bfloat16 are a multiple of an eighth where they are above 16: no log-probability is right."""
    return torch.autocast(tensor.device.type, enabled=False)


def _in_chunks(
    score: Callable[..., Any], head: Head, hidden_NC: Tensor, size: int, *parts: Tensor
) -> tuple[Tensor, Tensor]:
    """`score` of a few tokens at a time, done again in the backward pass: only hidden states are kept."""
    pieces = zip(hidden_NC.split(size), *(part.split(size) for part in parts), strict=True)
    if torch.is_grad_enabled():
        found = [checkpoint(score, head, *piece, use_reentrant=False) for piece in pieces]
    else:
        found = [score(head, *piece) for piece in pieces]
    logp, entropy = zip(*found, strict=True)
    return torch.cat(logp), torch.cat(entropy)


def _kept_chunk(head: Head, hidden_NC: Tensor, tokens_N: Tensor, kept_NK: Tensor) -> tuple[Tensor, Tensor]:
    logp_NK = kept_logits(head, hidden_NC, kept_NK).log_softmax(-1)
    is_own_NK = kept_NK == tokens_N[:, None]
    logp_N = torch.where(is_own_NK, logp_NK, 0).sum(-1)
    # A token that was not kept could not be sampled.
    return torch.where(is_own_NK.any(-1), logp_N, -torch.inf), _entropy(logp_NK)


def _full_chunk(head: Head, hidden_NC: Tensor, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
    logp_NV = _full_logits(head, hidden_NC).log_softmax(-1)
    return logp_NV.gather(1, tokens_N[:, None])[:, 0], _entropy(logp_NV)


@torch.no_grad()
def _entropy(logp_NK: Tensor) -> Tensor:
    return -torch.where(logp_NK.isneginf(), 0, logp_NK.exp() * logp_NK).sum(-1)
