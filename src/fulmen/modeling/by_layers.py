"""A GQA DSA model that is never whole in memory: its layers are read from the source's files as they run.

All that runs a model runs this one as it is: each decoder layer has weights while it computes, and only then.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from fulmen.config import DsaConfig
from fulmen.errors import UnsupportedModelError
from fulmen.modeling.families import family_for
from fulmen.modeling.generation_settings import fix_generation_config, read_generation_config
from fulmen.modeling.gqa.convert import dsa_config_for
from fulmen.modeling.gqa.family import GqaFamily
from fulmen.modeling.shards import SHARD_DTYPES, Shards
from fulmen.modeling.weights import EMBEDDING, HEAD, require_held


class LayeredModel(NamedTuple):
    """A DSA model with its embedding and last norm, whose layers are on `meta`; and where they are read.

    Without a gradient. dtype: of all weights as they run.
    """

    model: PreTrainedModel
    shards: Shards
    dtype: torch.dtype
    device: torch.device

    @property
    def layers(self) -> Any:
        """The decoder layers."""
        return self.model.base_model.layers

    def prefix(self, layer: int) -> str:
        """What the names of a layer's weights begin with."""
        return f"{self.model.base_model_prefix}.layers.{layer}."

    def indexer_state(self, layer: int) -> dict[str, Tensor]:
        """The tensors of one layer's indexer, by their names in the model, while the layer runs."""
        own = self.layers[layer].state_dict()
        return {self.prefix(layer) + name: x for name, x in own.items() if _is_indexers(name)}


def require_layered(config: PreTrainedConfig) -> None:
    """Raise UnsupportedModelError for a family whose weights in files are not those of its modules."""
    if not isinstance(family_for(config), GqaFamily) or get_checkpoint_conversion_mapping(config.model_type):
        raise UnsupportedModelError(
            f"model_type {config.model_type!r} cannot be converted layer by layer, its weights are stored in "
            "another form than they run in; leave by_layers out"
        )


def layered_gqa(
    config: PreTrainedConfig, dsa: DsaConfig, shards: Shards, device: torch.device
) -> LayeredModel:
    """The DSA model of a dense model's config and files, with random indexers.

    Its dtype is the config's, or else that of the first weights.

    Raises:
        UnsupportedModelError: as `require_layered`.
        CheckpointError: weights that are not those of the config, or an unusable generation config.
    """
    require_layered(config)
    family: Any = family_for(config)
    tied = config.tie_word_embeddings and not _has_other_head(shards)
    own = dsa_config_for(config, dsa, tied, family.config_class)
    dtype: Any = config.dtype or _first_dtype(shards)
    own.dtype = dtype
    # Parameters alone: the buffers are those that no file holds, and computed.
    with init_empty_weights(include_buffers=False):
        model = family.causal_lm_class(own).eval().requires_grad_(False)
    own.architectures = [type(model).__name__]
    layered = LayeredModel(model, shards, dtype, device)
    _require_held(layered, config)
    _fill_ends(layered)
    name = str(shards.folder)
    if (settings := read_generation_config(name, config.vocab_size)) is not None:
        model.generation_config = settings
    else:
        fix_generation_config(model, name)
    return layered


@contextmanager
def layers_as_they_run(
    layered: LayeredModel, indexer_of: Callable[[int], Mapping[str, Tensor] | None]
) -> Iterator[None]:
    """Let the model run in the `with` block; a layer's weights are gone when it has run.

    indexer_of: the tensors of a layer's indexer by their names in the model; None: random ones.
    """
    for number, layer in enumerate(layered.layers):
        layer.forward = partial(_run_filled, layered, number, indexer_of, layer.forward)
    try:
        yield
    finally:
        for layer in layered.layers:
            del layer.forward


@contextmanager
def layers_skipped(layered: LayeredModel, last: int, x_BTC: Tensor) -> Iterator[None]:
    """Let no layer up to `last` run in the `with` block: what comes out of it is `x_BTC`."""
    skipped = layered.layers[: last + 1]
    before = [layer.forward for layer in skipped]
    for layer in skipped:
        layer.forward = lambda *args, **kwargs: x_BTC
    try:
        yield
    finally:
        for layer, forward in zip(skipped, before, strict=True):
            layer.forward = forward


def _run_filled(
    layered: LayeredModel,
    number: int,
    indexer_of: Callable[[int], Mapping[str, Tensor] | None],
    forward: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    layer = layered.layers[number]
    empty = layer.state_dict()
    prefix = layered.prefix(number)
    names = {prefix + name: name for name in empty if not _is_indexers(name)}
    _fill(layer, {names[name]: x for name, x in _read(layered, names).items()})
    if any(map(_is_indexers, empty)):
        if (own := indexer_of(number)) is None:
            indexer = layer.self_attn.indexer.to_empty(device=layered.device).to(layered.dtype)
            indexer.apply(layered.model._init_weights)
        else:
            _fill(layer, {name.removeprefix(prefix): x.to(layered.device) for name, x in own.items()})
    try:
        return forward(*args, **kwargs)
    finally:
        _fill(layer, empty)


def _fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    unmatched = module.load_state_dict(tensors, strict=False, assign=True)
    assert not unmatched.unexpected_keys, unmatched


def _read(layered: LayeredModel, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors of the files, of the dtype and on the device that the model runs in."""
    return {
        name: x.to(layered.device, layered.dtype if x.is_floating_point() else x.dtype)
        for name, x in layered.shards.tensors(names).items()
    }


def _fill_ends(layered: LayeredModel) -> None:
    """Embedding, last norm and head: of the first the rows that are used, of the last what asks for it."""
    model, held = layered.model, layered.shards.held
    inside = f"{model.base_model_prefix}.layers."
    names = {name: name for name in model.state_dict() if name in held and not name.startswith(inside)}
    tied = model.config.tie_word_embeddings
    if tied:
        names.pop(HEAD, None)
    if tied and EMBEDDING not in held:
        names[HEAD] = EMBEDDING
    _fill(model, {names[name]: x for name, x in _read(layered, names).items()})
    model.tie_weights()


def _require_held(layered: LayeredModel, config: PreTrainedConfig) -> None:
    model, shapes = layered.model, layered.shards.shapes
    wanted = {name: tuple(x.shape) for name, x in model.state_dict().items() if not _is_indexers(name)}
    if model.config.tie_word_embeddings:
        # Stored once, under either name, or twice.
        absent = {HEAD, EMBEDDING} - shapes.keys()
        for name in absent if len(absent) == 1 else ():
            del wanted[name]
    require_held(str(layered.shards.folder), config, wanted, shapes)


def _has_other_head(shards: Shards) -> bool:
    """Whether head and embedding are both there and differ, whatever the config says."""
    return {HEAD, EMBEDDING} <= shards.held.keys() and not shards.are_equal(HEAD, EMBEDDING)


def _first_dtype(shards: Shards) -> torch.dtype:
    kinds = (SHARD_DTYPES.get(held.kind) for held in shards.held.values())
    return next((kind for kind in kinds if kind is not None), torch.float32)


def _is_indexers(name: str) -> bool:
    return ".indexer." in name
