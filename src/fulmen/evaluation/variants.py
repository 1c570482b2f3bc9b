"""One converted model under different selections of the same k keys: all other weights are shared."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fulmen.config import COARSE_FROM
from fulmen.data import TokenSequence
from fulmen.errors import ConfigError
from fulmen.evaluation.controls import (
    AttentionRecallSelector,
    CandidateRecallSelector,
    KeyHeadOracleSelector,
    OracleSelector,
    RandomSelector,
    RecallSelector,
    WindowSelector,
)
from fulmen.modeling.families import dsa_of, has_dsa, set_topk
from fulmen.modeling.rope_tables import restored_rope
from fulmen.modeling.selectors import (
    DenseSelector,
    IndexerSelector,
    OneLevelSelector,
    Selector,
    use_selector,
)

VARIANTS: dict[str, Selector] = {
    "dense": DenseSelector(),
    "key_head_oracle": KeyHeadOracleSelector(),
    "oracle": OracleSelector(),
    # What layers get of k, and what a coarse level does, are told apart: this one is without both.
    "dsa_equal": OneLevelSelector(),
    "dsa": IndexerSelector(),
    "one_level": OneLevelSelector(),
    "inherited": IndexerSelector(),
    "window": WindowSelector(),
    "random": RandomSelector(),
}
RECALL_VARIANTS = ("dsa", "inherited", "window")
# Keep k in every layer, however the model splits it: what they lose is not the split's doing.
EQUAL_K = ("key_head_oracle", "oracle", "dsa_equal")
# Too slow for every text.
FEW_TEXTS = ("key_head_oracle",)


class ModelInput(NamedTuple):
    """One text to read. ids_T: int64; position_T: positions within its documents, None if it is one."""

    ids_T: Tensor
    position_T: Tensor | None

    @classmethod
    def of(cls, sequence: TokenSequence, length: int | None = None) -> "ModelInput":
        """The first `length` tokens of a sequence."""
        index_T = torch.arange(len(sequence.input_ids))
        if len(sequence.starts) == 1:
            return cls(sequence.input_ids[:length], None)
        starts_N = torch.tensor(sequence.starts)
        document_T = torch.searchsorted(starts_N, index_T, right=True) - 1
        return cls(sequence.input_ids[:length], (index_T - starts_N[document_T])[:length])


@dataclass
class VariantRunner:
    """A converted model that runs as any variant, counts its tokens and records attention recall.

    Attributes:
        model: GQA DSA, or a stock DSA model under `fulmen_attention`.
        inherited: the indexers' tensors as they were before training; None: no such variant.
        on_tokens: called after each forward with the tokens and the name of what was read.
        recalls: per variant that is asked to, the attention recall so far; of "one_level" that of candidates.
    """

    model: PreTrainedModel
    inherited: Mapping[str, Tensor] | None
    on_tokens: Callable[[int, str], None] = lambda tokens, what: None
    recalls: dict[str, RecallSelector] = field(default_factory=dict)

    @property
    def variants(self) -> list[str]:
        """Names of the variants that this model has, "dense" first, but for those of `FEW_TEXTS` and for
        "one_level", which is the same as "dsa" unless `asks_coarse_level`.
        """
        absent = {*FEW_TEXTS, "one_level"}
        absent |= set() if self.inherited is not None else {"inherited"}
        absent |= set() if splits_topk(self.model) else {"dsa_equal"}
        return [name for name in VARIANTS if name not in absent]

    @contextmanager
    def running(
        self, variant: str, topk: int, tokens: int, what: str, recall: bool = False
    ) -> Iterator[None]:
        """Let the model be `variant` with `topk` keys in the `with` block, in which it reads `tokens`."""
        selector = VARIANTS[variant]
        if recall and variant in RECALL_VARIANTS:
            selector = self.recalls.setdefault(variant, AttentionRecallSelector(selector))
        elif recall and variant == "one_level":
            selector = self.recalls.setdefault(variant, CandidateRecallSelector())
        weights = self.inherited if variant == "inherited" else None
        with (
            swapped_indexers(self.model, weights or {}),
            use_topk(self.model, topk),
            use_equal_topk(self.model) if variant in EQUAL_K else nullcontext(),
            use_selector(self.model, selector),
            restored_rope(self.model),
        ):
            yield
        self.on_tokens(tokens, what)

    def hidden(self, variant: str, text: ModelInput, topk: int, what: str, recall: bool = False) -> Tensor:
        """The last hidden states hidden_TC of one text."""
        with self.running(variant, topk, len(text.ids_T), what, recall):
            return last_hidden_states(self.model, text)


@torch.no_grad()
def last_hidden_states(model: PreTrainedModel, text: ModelInput) -> Tensor:
    """hidden_TC of one text, after the final norm, without a cache."""
    ids_BT, position_BT = (None if x is None else x[None].to(model.device) for x in text)
    with restored_rope(model):
        output = model.base_model(input_ids=ids_BT, position_ids=position_BT, use_cache=False)
    return output.last_hidden_state[0]


def current_topk(model: PreTrainedModel) -> int:
    """Tokens that a query of a DSA model keeps. Raises ConfigError if the model has no DSA."""
    if not has_dsa(model.config):
        raise ConfigError(f"{type(model).__name__} has no DSA; convert it with fulmen first")
    return dsa_of(model.config).topk


@contextmanager
def use_topk(model: PreTrainedModel, topk: int) -> Iterator[None]:
    """Let every query keep `topk` tokens in the `with` block."""
    before = current_topk(model)
    set_topk(model, topk)
    try:
        yield
    finally:
        set_topk(model, before)


def splits_topk(model: PreTrainedModel) -> bool:
    """Whether layers of a DSA model keep different numbers of tokens."""
    return len(set(dsa_of(model.config).topk_shares)) > 1


def asks_coarse_level(model: PreTrainedModel, topk: int, length: int) -> bool:
    """Whether a layer has a coarse level that chooses candidates at `topk`, in texts of `length` tokens."""
    dsa = dsa_of(model.config)
    return bool(dsa.coarse_head_dim) and length > COARSE_FROM * dsa.candidate_factor * topk


def telling_topk(model: PreTrainedModel, topk: int, length: int) -> int | None:
    """The k at which texts of `length` tokens tell what a coarse level costs: `topk`, if that asks it, else
    the largest that asks it of all queries in the second half. None if no k does, or there is one level.
    """
    if asks_coarse_level(model, topk, length):
        return topk
    dsa = dsa_of(model.config)
    k = length // (2 * COARSE_FROM * dsa.candidate_factor)
    return k if dsa.coarse_head_dim and k else None


@contextmanager
def use_equal_topk(model: PreTrainedModel) -> Iterator[None]:
    """Let every layer keep the model's k in the `with` block, however the model splits it."""
    if not splits_topk(model):
        yield
        return
    ratios = model.config.dsa["topk_shares"]
    model.config.dsa = {**model.config.dsa, "topk_shares": []}
    try:
        yield
    finally:
        model.config.dsa = {**model.config.dsa, "topk_shares": ratios}


def indexer_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's own tensors `*.indexer.*`, not copies."""
    return {name: tensor for name, tensor in model.state_dict().items() if ".indexer." in name}


@contextmanager
def swapped_indexers(model: PreTrainedModel, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the model have other indexer tensors in the `with` block, and its own again after it.

    Args:
        state: all tensors of `indexer_state`; or none, which changes nothing.

    Raises ConfigError if names or shapes are not the model's.
    """
    own = indexer_state(model) if state else {}
    if mismatched := sorted(set(own) ^ set(state)):
        differ = f"differ in {len(mismatched)} tensors, the first {mismatched[0]}"
        raise ConfigError(f"inherited indexer and model {differ}")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise ConfigError(
                f"inherited {name} has shape {tuple(state[name].shape)}, the model's {tuple(tensor.shape)}"
            )
    saved = {name: tensor.clone() for name, tensor in own.items()}
    try:
        _copy_tensors(own, state)
        yield
    finally:
        _copy_tensors(own, saved)


@torch.no_grad()
def _copy_tensors(to: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    for name, tensor in to.items():
        tensor.copy_(source[name])
