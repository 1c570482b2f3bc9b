"""Inherit where the model is larger than the memory: the same numbers, one layer in memory at a time."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from fulmen.modeling.by_layers import LayeredModel, layers_as_they_run, layers_skipped
from fulmen.modeling.families import dsa_family_for, dsa_of
from fulmen.modeling.token_blocks import feed_forward_in_blocks
from fulmen.pipeline.inherit_stage import fit_layers, share_k, try_splits, with_shares
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
    model = layered.model
    store = LayerStore(run.path / "layers")
    ids_BT = torch.stack([text.input_ids for text in texts.calibration]).to(layered.device)
    if not run.record("inherit").exists():
        _require_finite(layered, reporter)
        with layers_as_they_run(layered, store.indexer), feed_forward_in_blocks(model):
            _share_k_once(layered, ids_BT, run, reporter)
            record = _fit_rest(layered, ids_BT, store, reporter)
            tried = try_splits(model, texts.answered, layered.device, reporter)
        store.join(run.stage("inherit"))
        if tried:
            run.save_record("splits", [split._asdict() for split in tried])
        run.save_record("inherit", with_shares(record, tried))
    records = {name: _read(run, name) for name in ("inherit", "splits") if run.record(name).exists()}
    kept = records["splits"][0]["ratios"] if "splits" in records else _read(run, "shares")
    _set_shares(layered, kept)
    return records


def _require_finite(layered: LayeredModel, reporter: Reporter) -> None:
    shards, layers = layered.shards, range(len(layered.layers))
    inside = [[name for name in shards.held if name.startswith(layered.prefix(layer))] for layer in layers]
    ends = sorted(shards.held.keys() - {name for names in inside for name in names})
    with reporter.stage("Check weights"):
        for done, names in enumerate([ends, *inside]):
            shards.require_finite(names)
            reporter.advance(done, len(layers))


def _share_k_once(layered: LayeredModel, ids_BT: Tensor, run: RunDir, reporter: Reporter) -> None:
    if run.record("shares").exists():
        _set_shares(layered, _read(run, "shares"))
        return
    share_k(layered.model, ids_BT, reporter)
    run.save_record("shares", dsa_of(layered.model.config).topk_shares)


def _set_shares(layered: LayeredModel, shares: Sequence[float]) -> None:
    family = dsa_family_for(layered.model.config)
    family.restore_topk(layered.model, [{"topk_share": share} for share in shares])


def _fit_rest(
    layered: LayeredModel, ids_BT: Tensor, store: LayerStore, reporter: Reporter
) -> list[dict[str, Any]]:
    """The fits of all layers; those that were done before are read, and their work is not done again."""
    last, x_BTC = store.states() or (-1, torch.empty(0))
    done = [layer for layer in dsa_of(layered.model.config).layers if layer <= last]
    fits = [store.fit(layer) for layer in done]

    def keep(fit: Any) -> None:
        store.save_layer(fit.layer, layered.indexer_state(fit.layer), fit._asdict())

    with layers_skipped(layered, last, x_BTC.to(layered.device)), _kept_states(layered, last + 1, store):
        return fits + fit_layers(layered.model, ids_BT, reporter, keep, len(done))


@contextmanager
def _kept_states(layered: LayeredModel, first: int, store: LayerStore) -> Iterator[None]:
    """Keep what comes out of each layer from `first` on."""
    with ExitStack() as hooks:
        for number in range(first, len(layered.layers)):
            hook = layered.layers[number].register_forward_hook(
                lambda _, __, x_BTC, number=number: store.save_states(number, x_BTC)
            )
            hooks.callback(hook.remove)
        yield


def _read(run: RunDir, name: str) -> Any:
    return json.loads(run.record(name).read_text(encoding="utf-8"))
