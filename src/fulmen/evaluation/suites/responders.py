"""Who is asked: a converted model in three variants, any dense model, or an endpoint.

A responder has `variants`, writes answers, and (where the weights are here) reads texts and continues them.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from fulmen.evaluation.greedy import answer_by_forward, continue_greedily
from fulmen.evaluation.suites.losses import token_losses
from fulmen.evaluation.suites.samples import Sample
from fulmen.evaluation.variants import ModelInput, VariantRunner, current_topk, last_hidden_states
from fulmen.modeling.families import accelerated, has_dsa
from fulmen.modeling.rope_tables import restored_rope

# DSA, what it is to equal, and the same budget without an indexer.
CONVERTED_VARIANTS = ("dense", "dsa", "window")


class Responder(Protocol):
    """What the suites ask.

    variants: who answers, each the same questions; "dense" is the first. topk: keys that a query of the
    sparse ones keeps; None without DSA. context: tokens that the model was made for, if
    that is known.
    """

    variants: tuple[str, ...]
    topk: int | None

    @property
    def context(self) -> int | None: ...

    def answer(self, sample: Sample, variant: str) -> str:
        """What it writes after the prompt, greedily; no more than `sample.answer_tokens`."""
        ...

    def continue_text(self, prompt_ids: Tensor, n_tokens: int, variant: str) -> list[int]:
        """The tokens that follow a prompt, greedily; the end of text does not stop it."""
        ...


class LocalResponder:
    """A model on this machine.

    Attributes:
        source: the model before its backbone was trained, which answers as "dense"; None: the model itself,
            read densely.
        variants: "dense", "dsa" and "window" of a converted model, "dense" alone of any other.
        topk: keys that a query of the sparse variants keeps; None for a model without DSA.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        topk: int | None = None,
        source: PreTrainedModel | None = None,
    ) -> None:
        """Raises ConfigError if `topk` is given for a model without DSA."""
        self.model, self.tokenizer, self.source = model, tokenizer, source
        self.topk: int | None = None
        if topk is not None or is_converted(model):
            self.topk = current_topk(model) if topk is None else topk
            current_topk(model)
        self._runner = None if self.topk is None else VariantRunner(model, inherited=None)
        self.variants: tuple[str, ...] = CONVERTED_VARIANTS if self._runner else ("dense",)

    @property
    def context(self) -> int | None:
        """Tokens that the model was made for; None if its config does not say."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @contextmanager
    def asked(self, variant: str) -> Iterator[PreTrainedModel]:
        """Who answers as `variant` in the block."""
        if variant == "dense" and self.source is not None:
            with restored_rope(self.source):
                yield self.source
            return
        with self.running(variant):
            yield self.model

    @contextmanager
    def running(self, variant: str) -> Iterator[None]:
        """Let the model itself be `variant` in the block."""
        assert variant in self.variants, variant
        running: AbstractContextManager = nullcontext()
        if self._runner is not None:
            assert self.topk is not None
            running = self._runner.running(variant, self.topk, 0, "")
        # However long the text that another variant has read before: each begins with the same tables.
        with accelerated(self.model), restored_rope(self.model), running:
            yield

    def answer(self, sample: Sample, variant: str) -> str:
        """As `Responder.answer`; a fixed answer takes one forward pass and is cut where it goes wrong."""
        if sample.answer_ids is not None:
            with self.asked(variant) as model:
                return self._text(answer_by_forward(model, sample.prompt_ids, sample.answer_ids))

        def is_done(written: list[int]) -> bool:
            text = self._text(written)
            return sample.stop in text.lstrip() or sample.share_found(text) == 1

        return self._text(self.continue_text(sample.prompt_ids, sample.answer_tokens, variant, is_done))

    def continue_text(
        self,
        prompt_ids: Tensor,
        n_tokens: int,
        variant: str,
        is_done: Callable[[list[int]], bool] = lambda written: False,
    ) -> list[int]:
        """As `Responder.continue_text`; ends early once `is_done`, asked after each token."""
        with self.asked(variant) as model:
            return continue_greedily(model, prompt_ids, n_tokens, is_done)

    def hidden(self, ids_T: Tensor, variant: str) -> Tensor:
        """The last hidden states hidden_TC of one text; the model itself reads it, also as "dense"."""
        with self.running(variant):
            return last_hidden_states(self.model, ModelInput(ids_T, None))

    def losses(self, ids_T: Tensor, variant: str) -> Tensor:
        """loss_P of the tokens of one text, as `token_losses`."""
        with self.asked(variant) as model:
            hidden_TC = last_hidden_states(model, ModelInput(ids_T, None))
        return token_losses(hidden_TC, model.get_output_embeddings(), ids_T)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def is_converted(model: PreTrainedModel) -> bool:
    """Whether a model has DSA."""
    return has_dsa(model.config)
