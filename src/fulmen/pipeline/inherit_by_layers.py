"""Inherit where the model is larger than the memory: the same numbers, one layer in memory at a time."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fulmen.modeling.by_layers import LayeredModel, layers_as_they_run, layers_skipped
from fulmen.modeling.families import dsa_family_for, dsa_of
from fulmen.modeling.gqa.topk_ratios import least_error_ratios, measure_topk_errors, ratios_to_try
from fulmen.modeling.token_blocks import feed_forward_in_blocks
from fulmen.pipeline.inherit_stage import BUDGET_SEQUENCES, fit_layers, try_splits, with_shares
from fulmen.pipeline.layer_store import LayerStore
from fulmen.pipeline.reporter import Reporter
from fulmen.pipeline.run_dir import RunDir
from fulmen.pipeline.texts import ConversionTexts


def inherit_by_layers(
    layered: LayeredModel, texts: ConversionTexts, run: RunDir, reporter: Reporter
) -> dict[str, Any]:
    """Leave all indexers in one file, `run.stage("inherit")`; what was measured, by the name of the stage.

    Killed, it goes on with the layer that it was at.

    Raises:
        CheckpointError: NaN or infinite weights, which are named.
        OutputError: what is done cannot be written.
        TrainingDivergedError: as `inherit`.
    """
    store = LayerStore(run.path / "layers")
    ids_BT = torch.stack([text.input_ids for text in texts.calibration]).to(layered.device)
    if not run.record("inherit").exists():
        if not run.record("finite").exists():
            _require_finite(layered, reporter)
            run.save_record("finite", True)
        with layers_as_they_run(layered, store.indexer), feed_forward_in_blocks(layered.model):
            _share_k(layered, ids_BT[:BUDGET_SEQUENCES], run, store, reporter)
            record = _fit(layered, ids_BT, store, reporter)
            with _kept_readings(layered, store, "split"):
                tried = try_splits(layered.model, texts.answered, layered.device, reporter)
        store.join(run.stage("inherit"))
        if tried:
            run.save_record("splits", [split._asdict() for split in tried])
        run.save_record("inherit", with_shares(record, tried))
    records = {name: _read(run, name) for name in ("inherit", "splits") if run.record(name).exists()}
    _set_shares(layered, records["splits"][0]["ratios"] if "splits" in records else _read(run, "shares"))
    return records


def _require_finite(layered: LayeredModel, reporter: Reporter) -> None:
    shards, layers = layered.shards, range(len(layered.layers))
    inside = [[name for name in shards.held if name.startswith(layered.prefix(layer))] for layer in layers]
    ends = sorted(shards.held.keys() - {name for names in inside for name in names})
    with reporter.stage("Check weights"):
        for done, names in enumerate([ends, *inside]):
            shards.require_finite(names)
            reporter.advance(done, len(layers))


def _share_k(
    layered: LayeredModel, ids_BT: Tensor, run: RunDir, store: LayerStore, reporter: Reporter
) -> None:
    """As `share_k`, where what is measured in a layer is kept."""
    if run.record("shares").exists():
        _set_shares(layered, _read(run, "shares"))
        return
    dsa = dsa_of(layered.model.config)
    varies = dsa_family_for(layered.model.config).varies_topk
    tried = ratios_to_try(ids_BT.shape[1], dsa.topk) if varies else []
    errors = {layer: store.found("share", layer) for layer in _done(layered, store, "share")}
    with reporter.stage("Share k"), _kept_readings(layered, store, "share"):
        reporter.advance(len(errors), len(dsa.layers))

        def keep(layer: int, found: list[float]) -> None:
            store.save_found("share", layer, found)
            errors[layer] = found
            reporter.advance(len(errors), len(dsa.layers))

        if tried:
            measure_topk_errors(layered.model, ids_BT, dsa.topk, tried, keep)
    shares = [1.0] * len(dsa.layers)
    if tried:
        shares = list(least_error_ratios(np.array([errors[one] for one in dsa.layers]), np.array(tried)))
    _set_shares(layered, shares)
    run.save_record("shares", shares)


def _fit(
    layered: LayeredModel, ids_BT: Tensor, store: LayerStore, reporter: Reporter
) -> list[dict[str, Any]]:
    """The fits of all layers; those that were done before are read, and their work is not done again."""
    fits = [store.found("fit", layer) for layer in _done(layered, store, "inherit")]

    def keep(fit: Any) -> None:
        store.save_indexer(fit.layer, layered.indexer_state(fit.layer))
        store.save_found("fit", fit.layer, fit._asdict())

    with _kept_readings(layered, store, "inherit"):
        return fits + fit_layers(layered.model, ids_BT, reporter, keep, len(fits))


def _set_shares(layered: LayeredModel, shares: Sequence[float]) -> None:
    family = dsa_family_for(layered.model.config)
    family.restore_topk(layered.model, [{"topk_share": share} for share in shares])


def _done(layered: LayeredModel, store: LayerStore, stage: str) -> list[int]:
    """The converted layers that the first reading of a stage has behind it."""
    last, _ = store.states(f"{stage}-0")
    return [layer for layer in dsa_of(layered.model.config).layers if layer <= last]


@contextmanager
def _kept_readings(layered: LayeredModel, store: LayerStore, stage: str) -> Iterator[None]:
    """Let each reading of the model in the `with` block go on after the layers that it had behind it before.

    A stage does the same readings in the same order each time.
    """
    base: Any = layered.model.base_model
    forward, readings = base.forward, (f"{stage}-{number}" for number in count())

    def go_on(*args: Any, **kwargs: Any) -> Any:
        reading = next(readings)
        last, x_BTC = store.states(reading)
        with layers_skipped(layered, last, x_BTC.to(layered.device)), ExitStack() as hooks:
            for number in range(last + 1, len(layered.layers)):
                hook = layered.layers[number].register_forward_hook(
                    lambda _, __, x_BTC, number=number: store.save_states(reading, number, x_BTC)
                )
                hooks.callback(hook.remove)
            return forward(*args, **kwargs)

    base.forward = go_on
    try:
        yield
    finally:
        del base.forward


def _read(run: RunDir, name: str) -> Any:
    return json.loads(run.record(name).read_text(encoding="utf-8"))
