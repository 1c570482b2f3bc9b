"""What a cell is judged by: loss over dense on held-out text, attention mass, index key bytes, seconds."""

import time
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.quality.ablation.cells import Cells
from fulmen.data import Corpus, TokenSequence, iter_sequences
from fulmen.evaluation.controls import AttentionRecallSelector
from fulmen.evaluation.parity.losses import second_half_loss
from fulmen.evaluation.variants import ModelInput, last_hidden_states, use_topk
from fulmen.modeling.cost import token_bytes
from fulmen.modeling.families import dsa_of
from fulmen.modeling.selectors import DenseSelector, IndexerSelector, SelectionInputs, Selector, use_selector
from fulmen.pipeline.fingerprint import weights_fingerprint
from fulmen.pipeline.texts import kinds_of

# Every 64th query is asked for its attention mass: a few hundred rows a cell.
RECALL_STRIDE = 64
Losses = dict[str, list[float]]


class TimedSelector(Selector):
    """Selects as `inner` does; `seconds` is what that took so far."""

    def __init__(self, inner: Selector) -> None:
        self.inner, self.seconds = inner, 0.0

    def is_needed(self, n_keys: int, topk: int) -> bool:
        return self.inner.is_needed(n_keys, topk)

    def select(self, inputs: SelectionInputs, topk: int) -> Tensor | None:
        began = time.perf_counter()
        topk_BTK = self.inner.select(inputs, topk)
        self.seconds += time.perf_counter() - began
        return topk_BTK


class HeldOut:
    """Held-out windows, `count` of each kind of text, and the dense losses of every trunk that read them.

    The dense losses go to `folder`/dense.jsonl: converted models with the same trunk, in this run or another
    one, share them.
    """

    def __init__(
        self, corpus: Corpus, tokenizer: Any, length: int, count: int, seed: int, folder: Path
    ) -> None:
        documents = corpus.heldout
        self.texts: dict[str, list[TokenSequence]] = {
            kind: list(islice(iter_sequences(documents, tokenizer, length, kind=kind, seed=seed), count))
            for kind in kinds_of(documents)
        }
        self.setting = {"corpus": corpus.fingerprint[:16], "length": length, "windows": count, "seed": seed}
        self.folder = folder

    def dense(self, model: PreTrainedModel) -> Losses:
        """Loss of every window, read densely, per kind."""
        cells = Cells(self.folder, "dense", {**self.setting, "trunk": fingerprint(model, indexers=False)})

        is_converted = bool(getattr(model.config, "dsa", None))
        reading = use_selector(model, DenseSelector()) if is_converted else nullcontext()

        def measure() -> dict[str, Any]:
            with reading:
                return {"losses": self.losses(model)}

        cells.add({}, measure)
        return cells.rows[0]["losses"]

    def over_dense(
        self, model: PreTrainedModel, dense: Losses, topk: int, selector: Selector | None = None
    ) -> dict[str, Any]:
        """The model at `topk` keys against dense losses, by its own indexers unless a selector is given.

        Returns:
            losses, dense: per kind, nats per token over the second half of each window.
            over_dense: per kind, the mean loss over the dense mean, minus 1.
            captured, oracle: attention mass of the selection and of the best k keys, mean over the layers
                that leave keys out; None if none does.
            index_key_bytes: per token, all layers.
            select_s, seconds: of selection and of everything, per window.
        """
        timed = TimedSelector(IndexerSelector() if selector is None else selector)
        mass = AttentionRecallSelector(timed, RECALL_STRIDE)
        began = time.perf_counter()
        with use_topk(model, topk), use_selector(model, mass):
            losses = self.losses(model)
        count = sum(map(len, losses.values()))
        layers = mass.result()
        return {
            "losses": losses,
            "dense": dense,
            "over_dense": {kind: ratio(losses[kind], dense[kind]) for kind in losses},
            "captured": mean([layer.captured for layer in layers]) if layers else None,
            "oracle": mean([layer.oracle for layer in layers]) if layers else None,
            "index_key_bytes": token_bytes(model.config, dsa_of(model.config)).index_keys,
            "select_s": timed.seconds / count,
            "seconds": (time.perf_counter() - began) / count,
        }

    def losses(self, model: PreTrainedModel) -> Losses:
        """Of every window as the model reads it now, per kind."""
        head = model.get_output_embeddings()
        return {
            kind: [
                second_half_loss(last_hidden_states(model, ModelInput.of(text)), head, text.input_ids)
                for text in texts
            ]
            for kind, texts in self.texts.items()
        }


def ratio(losses: list[float], reference: list[float]) -> float:
    """How far the mean of some losses lies over that of others, as a share."""
    return mean(losses) / mean(reference) - 1


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def fingerprint(model: PreTrainedModel, indexers: bool = True) -> str:
    """`weights_fingerprint` of a model, with or without its indexers."""
    state = model.state_dict()
    return weights_fingerprint({name: x for name, x in state.items() if indexers or ".indexer." not in name})
