"""The policy's weights as an engine takes them: by the model's own names, with adapters merged."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fulmen.training.sparse.lora import lora_layers


@torch.no_grad()
def policy_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all weights and buffers in the state dict, one at a time.

    An adapter's update is added to the weight it lies beside. A head that is tied to the embeddings comes
    under both names, for engines hold two.
    """
    layers = dict(lora_layers(model))
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            continue
        place, _, end = name.rpartition(".base_layer.")
        if place and end == "weight":
            update = layers[place].get_delta_weight("default")
            tensor = (tensor.float() + update.float()).to(tensor.dtype)
        yield (f"{place}.{end}" if place else name), tensor.detach()
