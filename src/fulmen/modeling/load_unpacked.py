"""A model whole in memory, from files where its weights are packed or have other names.

Every format of quantized weights that is read, on any machine.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from fulmen.errors import CheckpointError
from fulmen.modeling.model_shards import UNPACKED_DTYPE, ModelShards
from fulmen.modeling.shards import folder_of_shards
from fulmen.modeling.weights import quiet_transformers, require_held, settle_loaded


def load_unpacked(
    place: str,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype | str,
    left_out: str = r"(?!)",
    model_class: Any = None,
    shards: ModelShards | None = None,
    **options: Any,
) -> PreTrainedModel:
    """A model whose config may say that its files are quantized; nothing of that is left in it.

    Args:
        place: a directory or hub name.
        config: of the model, `quantization_config` included.
        dtype: of the weights; "auto": the config's, or bfloat16.
        left_out: pattern of names that `model_class` leaves in the file on purpose.
        model_class: None: the language model of the config.
        shards: where the weights are read, if they are not all that lies there.
        options: for `from_pretrained`.

    Raises:
        CheckpointError: weights that cannot be read, or do not fit the config.
        UnsupportedModelError: as `require_readable_quantization`.
    """
    shards = ModelShards(folder_of_shards(place), config) if shards is None else shards
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    model_class = model_class or AutoModelForCausalLM._model_mapping[type(config)]
    with torch.device("meta"):
        wanted = {name: tuple(x.shape) for name, x in model_class(config).state_dict().items()}
    require_held(place, config, wanted, shards.shapes, left_out)
    asked: Any = (config.dtype or UNPACKED_DTYPE) if dtype == "auto" else dtype
    state = _state(shards, [name for name in wanted if name in shards.shapes])
    with quiet_transformers():
        model: PreTrainedModel = model_class.from_pretrained(
            None, config=config, state_dict=state, dtype=asked, **options
        )
    model.config.name_or_path = model.name_or_path = place
    settle_loaded(model)
    return model


def _state(shards: ModelShards, names: list[str]) -> dict[str, Tensor]:
    """Raises CheckpointError that names the first weight that is not finite."""
    state = shards.tensors(names)
    for name, tensor in state.items():
        if tensor.is_floating_point() and not all(map(torch.isfinite, tensor.aminmax())):
            raise CheckpointError(f"{shards.folder} has NaN or infinite values in {name}; get intact weights")
    return state
