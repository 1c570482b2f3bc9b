"""Texts, a trunk and their fixed choices: what the cells of one ablation share."""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.quality.ablation.cells import Cells
from benchmarks.quality.ablation.measuring import HeldOut, Losses, fingerprint
from benchmarks.quality.ablation.warming import Taps, warmed_up
from fulmen.data import iter_sequences, load_corpus
from fulmen.modeling.gqa.inherit import inherit_gqa
from fulmen.modeling.gqa.model import set_topk_ratios
from fulmen.modeling.gqa.topk_ratios import fit_topk_ratios
from fulmen.modeling.selectors import Selector
from fulmen.pipeline.texts import up_to
from fulmen.training.warmup.losses import IndexerLossSelector

# As a conversion takes them.
CALIBRATION_TEXTS, BUDGET_TEXTS = 4, 2


class Lab:
    """One ablation on one trunk.

    Args:
        name: of the ablation; its cells are in `out`/`name`.jsonl.
        trunk: a dense or converted model; read densely, it is what losses are compared with.
        windows: held-out texts per kind. length: tokens of a text.
        setting: what else all cells have in common.
    """

    def __init__(
        self,
        name: str,
        trunk: PreTrainedModel,
        tokenizer: Any,
        out: Path,
        windows: int,
        length: int,
        seed: int,
        **setting: Any,
    ) -> None:
        self.trunk, self.tokenizer, self.out, self.length, self.seed = trunk, tokenizer, out, length, seed
        self._shares: tuple[float, ...] | None = None
        self.corpus = load_corpus()
        self.heldout = HeldOut(self.corpus, tokenizer, length, windows, seed, out)
        self.cells = Cells(out, name, {"model": fingerprint(trunk), **self.heldout.setting, **setting})

    @cached_property
    def dense(self) -> Losses:
        """Losses of the trunk, read densely."""
        return self.heldout.dense(self.trunk)

    def measure(self, model: PreTrainedModel, topk: int, selector: Selector | None = None) -> dict[str, Any]:
        """`HeldOut.over_dense` against the trunk."""
        return self.heldout.over_dense(model, self.dense, topk, selector)

    def inherit(self, model: PreTrainedModel, topk: int) -> None:
        """Set shares of k and indexers as a conversion does."""
        self.share(model, topk)
        inherit_gqa(model, self._calibration_BT, topk)

    def share(self, model: PreTrainedModel, topk: int) -> None:
        """Set the layers' shares of k alone; they depend on the trunk, so they are measured once."""
        if self._shares is None:
            self._shares = fit_topk_ratios(model, self._calibration_BT[:BUDGET_TEXTS], topk)
        set_topk_ratios(model, self._shares)

    def train(
        self,
        run: Mapping[str, Any],
        model: PreTrainedModel,
        start: Callable[[], Any],
        marks: list[int],
        learning_rate: float,
        measure: Callable[[], dict[str, Any]],
        taps: Taps = IndexerLossSelector,
    ) -> None:
        """Measure a cell at every mark (steps) of a warm-up: `run` and its "tokens"."""
        if all(self.cells.has({**run, "tokens": mark * self.length}) for mark in marks):
            return
        texts = up_to(self.corpus.training, self.tokenizer, self.length, max(1, marks[-1]), self.seed)
        states = self._states(run)
        for mark in warmed_up(model, start, texts, marks, states, learning_rate, self.seed, taps):
            self.cells.add({**run, "tokens": mark * self.length}, measure)

    def _states(self, run: Mapping[str, Any]) -> Path:
        """Folder of a run's states, named for all that its weights depend on."""
        what = {**self.cells.setting, "windows": None, "run": dict(run)}
        return self.out / "states" / hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]

    @cached_property
    def _calibration_BT(self) -> Tensor:
        texts = iter_sequences(self.corpus.calibration, self.tokenizer, 2 * self.length, seed=self.seed)
        return torch.stack([text.input_ids for text in islice(texts, CALIBRATION_TEXTS)])


def quarters(tokens: int, length: int) -> list[int]:
    """Marks in steps: nothing, a quarter, a half and all of the tokens, in texts of `length`."""
    steps = tokens // length
    return sorted({0, steps // 4, steps // 2, steps})


def ends(tokens: int, length: int) -> list[int]:
    """Marks in steps: nothing and all of the tokens."""
    return sorted({0, tokens // length})
