"""load and inspect, as `import fulmen` has them: what they are asked is checked before work is imported."""

from typing import TYPE_CHECKING

from fulmen.pipeline.arguments import Place, place_argument
from fulmen.pipeline.reporter import SilentReporter

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fulmen.pipeline.description import ModelDescription


def load(
    source: Place, *, dtype: "str | torch.dtype" = "auto", device: "str | torch.device | None" = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A converted model, in eval mode and by fulmen's attention, and its tokenizer. GQA and MLA alike.

    One that reads images comes as a whole; its processor is Transformers' (`AutoProcessor`).

    Args:
        source: what `convert` or `train` wrote, or the name of such a model on the hub.
        dtype: of the weights: "float32", "bfloat16", "float16", or "auto": as they were saved.
        device: where to, as "cuda"; None: the CPU.

    Raises:
        ConfigError: a dtype or device that cannot be.
        CheckpointError: no such model, or one that cannot be read.
        UnsupportedModelError: the model has no DSA.
    """
    place = place_argument("source", source)
    from fulmen.pipeline.load import load_accelerated

    return load_accelerated(place, dtype, device)


def inspect(source: Place) -> "ModelDescription":
    """What a model is, how it would be converted and what that saves. Reads headers only.

    Of a model that reads images, its language model is described.

    Args:
        source: a model, dense or converted: a directory, a name on the hub, a `.gguf` file, "smollm2-135m".

    Raises:
        CheckpointError: there is no such model, or its config cannot be read.
        UnsupportedModelError: no family knows its architecture.
    """
    place = place_argument("source", source)
    from fulmen.pipeline.describe import describe
    from fulmen.pipeline.quiet import quiet

    with quiet(SilentReporter()):
        return describe(place)
