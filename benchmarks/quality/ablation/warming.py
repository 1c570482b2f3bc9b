"""Warm-up from mark to mark: the product's loss and optimizer, with the weights of every mark kept.

`fulmen.training.warmup.run` keeps the best step and lets its learning rate fall to the end of the run.
Here the weights after n tokens shall not depend on how long the run is, so the rate stays constant after its
first steps, and nothing is chosen by validation.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fulmen.data import TokenSequence
from fulmen.evaluation.variants import indexer_state
from fulmen.files import atomic_write
from fulmen.modeling.gqa.model import set_topk_ratios
from fulmen.modeling.selectors import dsa_attentions, use_selector
from fulmen.training.warmup.losses import IndexerLossSelector
from fulmen.training.warmup.settings import WarmupSettings
from fulmen.training.warmup.stage import MEASURED_ROWS

RISING_STEPS = 5
LARGEST_NORM = 1.0
Taps = Callable[[dict[int, Tensor], int, int], IndexerLossSelector]


def warmed_up(
    model: PreTrainedModel,
    start: Callable[[], Any],
    texts: Sequence[TokenSequence],
    marks: Sequence[int],
    folder: Path,
    learning_rate: float,
    seed: int,
    taps: Taps = IndexerLossSelector,
) -> Iterator[int]:
    """Yield at every mark with the model's indexers as they are after so many steps, one text a step.

    Args:
        start: gives the model its first indexers and shares of k; not called if `folder` has them.
        marks: numbers of steps, ascending, the first 0.
        folder: one file per mark, with which a run that was stopped goes on.
        taps: makes the selector that takes the loss of a forward pass.
    """
    model.requires_grad_(False).eval()
    for attention in dsa_attentions(model):
        attention.indexer.requires_grad_(True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    folder.mkdir(parents=True, exist_ok=True)
    done = 0
    for mark in marks:
        file = folder / f"{mark}.pt"
        if file.exists():
            _load(file, model, optimizer)
        else:
            if mark == 0:
                start()
            for step in range(done, mark):
                rate = learning_rate * min(1.0, (step + 1) / RISING_STEPS)
                _step(model, texts[step % len(texts)], optimizer, rate, seed + step, taps)
            _save(file, model, optimizer)
        done = mark
        yield mark


def _step(
    model: PreTrainedModel,
    text: TokenSequence,
    optimizer: torch.optim.Optimizer,
    rate: float,
    seed: int,
    taps: Taps,
) -> None:
    torch.manual_seed(seed)  # of the query rows, in a resumed run too
    weights = {layer.layer_idx: layer.output_weight().detach() for layer in dsa_attentions(model)}
    selector = taps(weights, WarmupSettings.n_rows, MEASURED_ROWS)
    with use_selector(model, selector):
        model.base_model(text.input_ids[None], position_ids=text.position_ids[None], use_cache=False)
    torch.stack([layer.loss for layer in selector.layers.values()]).mean().backward()
    for group in optimizer.param_groups:
        group["lr"] = rate
        torch.nn.utils.clip_grad_norm_(group["params"], LARGEST_NORM)
    optimizer.step()
    optimizer.zero_grad()


def _save(file: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    state = {
        "indexers": indexer_state(model),
        "shares": model.config.dsa["topk_shares"],
        "optimizer": optimizer.state_dict(),
    }
    atomic_write(file, lambda temporary: torch.save(state, temporary))


def _load(file: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    state = torch.load(file)
    model.load_state_dict(state["indexers"], strict=False)
    set_topk_ratios(model, state["shares"])
    optimizer.load_state_dict(state["optimizer"])
