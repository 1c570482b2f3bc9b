"""A DSA model that is never whole in memory: its layers are read from the source's files as they run.

All that runs a model runs this one as it is: each decoder layer has weights while it computes, and only then.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedConfig, PreTrainedModel

from fulmen.config import DsaConfig
from fulmen.errors import UnsupportedModelError
from fulmen.modeling.families import dsa_family_for, family_for
from fulmen.modeling.generation_settings import fix_generation_config, read_generation_config
from fulmen.modeling.model_shards import UNPACKED_DTYPE
from fulmen.modeling.quantization.formats import lists_left_out, quantization_of, quantization_without
from fulmen.modeling.shards import INDEXERS_FILE, SHARD_DTYPES, Shards, save_tensors
from fulmen.modeling.weights import EMBEDDING, HEAD, require_held
from fulmen.ops.half_products import hasten_half_products


class LayeredModel(NamedTuple):
    """A DSA model without gradient whose layers, embedding and head are on `meta`, and where they are read.

    dtype: of all weights as they run.
    """

    model: PreTrainedModel
    shards: Shards
    dtype: torch.dtype
    device: torch.device

    @property
    def layers(self) -> Any:
        """The decoder layers."""
        return self.model.base_model.layers

    @property
    def head_name(self) -> str:
        """Where the head's weight is stored."""
        tied = self.model.config.tie_word_embeddings
        return HEAD if not tied or EMBEDDING not in self.shards.shapes else EMBEDDING

    @property
    def embedding_name(self) -> str:
        """Where the embedding is stored."""
        return EMBEDDING if EMBEDDING in self.shards.shapes else HEAD

    def dtype_of(self, name: str) -> torch.dtype:
        """What a weight runs in: the model's dtype, but for those that its class keeps in float32."""
        kept = (self.model._keep_in_fp32_modules, self.model._keep_in_fp32_modules_strict)
        return torch.float32 if any(part in name for some in kept for part in some or ()) else self.dtype

    def prefix(self, layer: int) -> str:
        """What the names of a layer's weights begin with."""
        return f"{self.model.base_model_prefix}.layers.{layer}."

    def bytes_in(self, folder: Path) -> int:
        """What a conversion takes of the disk of `folder`: files that have no links, indexers three times."""
        state = self.model.state_dict()
        indexers = sum(x.numel() for name, x in state.items() if _is_indexers(name)) * self.dtype.itemsize
        return self.shards.bytes_to_copy(folder) + 3 * indexers

    def put_into(self, folder: Path, indexers: Path) -> None:
        """As `Shards.put_into`, of indexers as a quantized model has them."""
        settings = quantization_of(self.model.config)
        family = dsa_family_for(self.model.config)
        if settings is None or not family.quantizes_indexers(settings):
            self.shards.put_into(folder, indexers)
            return
        published = folder / f".{INDEXERS_FILE}"
        save_tensors(family.stored_indexers(load_file(indexers), settings), published)
        # As any other file that is written here, not for its owner alone.
        published.chmod(indexers.stat().st_mode)
        self.shards.put_into(folder, published)
        published.unlink()

    def indexer_state(self, layer: int) -> dict[str, Tensor]:
        """The tensors of one layer's indexer, by their names in the model, while the layer runs."""
        own = self.layers[layer].state_dict()
        return {self.prefix(layer) + name: x for name, x in own.items() if _is_indexers(name)}


def require_layered(config: PreTrainedConfig) -> None:
    """Raise UnsupportedModelError for a family whose weights in files are not those of its modules."""
    if not family_for(config).runs_as_stored(config):
        raise UnsupportedModelError(
            f"model_type {config.model_type!r} cannot be converted layer by layer, its weights are stored in "
            "another form than they run in; leave by_layers out"
        )


def layered_model(
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
    own = family.dsa_config(config, dsa, tied)
    dtype: Any = config.dtype or (UNPACKED_DTYPE if quantization_of(config) else _first_dtype(shards))
    own.dtype = dtype
    hasten_half_products(dtype)
    # Parameters alone: the buffers are computed and no file holds them, but for a coarse level's, which are
    # where the indexer's parameters are.
    with init_empty_weights(include_buffers=False):
        model = family.causal_lm_class(own).eval().requires_grad_(False)
    for module in model.modules():
        computed = {key: x for key, x in module._buffers.items() if x is not None and not x.is_meta}
        module._buffers.update({key: x.to(device) for key, x in computed.items()})
    own.architectures = [type(model).__name__]
    layered = LayeredModel(model, shards, dtype, device)
    _require_held(layered, config)
    _keep_quantization(layered, config)
    _fill_rest(layered)
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
    embedding: Any = layered.model.get_input_embeddings()
    head: Any = layered.model.get_output_embeddings()
    for number, layer in enumerate(layered.layers):
        layer.forward = partial(_run_filled, layered, number, indexer_of, layer.forward)
    embedding.forward = partial(_embed, layered, embedding, embedding.forward)
    head.forward = partial(_logits, layered)
    try:
        yield
    finally:
        for module in (*layered.layers, embedding, head):
            del module.forward


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
            indexer = layer.self_attn.indexer.to_empty(device=layered.device)
            for name, x in (*indexer.named_parameters(), *indexer.named_buffers()):
                if x.is_floating_point():
                    x.data = x.data.to(layered.dtype_of(f"indexer.{name}"))
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


def _read(layered: LayeredModel, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of the files, of the dtype and on the device that the model runs in."""
    return {
        name: x.to(layered.device, layered.dtype_of(name) if x.is_floating_point() else x.dtype)
        for name, x in layered.shards.tensors(names).items()
    }


def _embed(
    layered: LayeredModel, embedding: Any, forward: Callable[[Tensor], Tensor], ids_BT: Tensor
) -> Tensor:
    """As the embedding, of which the rows that are used are read."""
    used_N, places_BT = ids_BT.unique(return_inverse=True)
    used_N, rows, first = used_N.cpu(), [], 0
    for block_VC in layered.shards.blocks(layered.embedding_name):
        inside_N = used_N[(used_N >= first) & (used_N < first + len(block_VC))]
        rows.append(block_VC[inside_N - first])
        first += len(block_VC)
    weight, padding = embedding.weight, embedding.padding_idx
    table_NC = torch.cat(rows).to(layered.device, layered.dtype)
    embedding.weight = nn.Parameter(table_NC, requires_grad=False)
    embedding.padding_idx = None  # of use with a gradient alone, and the rows have other numbers
    try:
        return forward(places_BT)
    finally:
        embedding.weight, embedding.padding_idx = weight, padding


def _logits(layered: LayeredModel, hidden_NC: Tensor) -> Tensor:
    """As the head, some rows of it after the other."""
    blocks = layered.shards.blocks(layered.head_name)
    return torch.cat([linear(hidden_NC, x.to(layered.device, layered.dtype)) for x in blocks], dim=-1)


def _fill_rest(layered: LayeredModel) -> None:
    """What is neither in a layer nor embedding or head: the last norm."""
    model = layered.model
    inside = (f"{model.base_model_prefix}.layers.", HEAD, EMBEDDING)
    _fill(model, _read(layered, [name for name in model.state_dict() if not name.startswith(inside)]))


def _require_held(layered: LayeredModel, config: PreTrainedConfig) -> None:
    state = layered.model.state_dict()
    wanted = {name: tuple(x.shape) for name, x in state.items() if not _is_indexers(name)}
    require_held(str(layered.shards.folder), config, wanted, layered.shards.shapes)


def _keep_quantization(layered: LayeredModel, config: PreTrainedConfig) -> None:
    """The files stay as they are, and the indexers are mostly not quantized."""
    if (settings := quantization_of(config)) is None:
        return
    state = layered.model.state_dict()
    if dsa_family_for(layered.model.config).quantizes_indexers(settings):
        layered.model.config.quantization_config = settings
        return
    left_alone = sorted({name.partition(".indexer.")[0] + ".indexer" for name in state if _is_indexers(name)})
    head = layered.shards.held.get(HEAD)
    if not lists_left_out(settings) and (head is None or head.kind in SHARD_DTYPES):
        # Loaders leave it alone where nothing is listed.
        left_alone.append(HEAD.removesuffix(".weight"))
    layered.model.config.quantization_config = quantization_without(settings, left_alone)


def _has_other_head(shards: Shards) -> bool:
    """Whether head and embedding are both there and differ, whatever the config says."""
    return {HEAD, EMBEDDING} <= shards.shapes.keys() and not shards.are_equal(HEAD, EMBEDDING)


def _first_dtype(shards: Shards) -> torch.dtype:
    kinds = (SHARD_DTYPES.get(held.kind) for held in shards.held.values())
    return next((kind for kind in kinds if kind is not None), torch.float32)


def _is_indexers(name: str) -> bool:
    return ".indexer." in name
