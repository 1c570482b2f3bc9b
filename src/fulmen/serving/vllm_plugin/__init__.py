"""Converted models in vLLM, with an index-key cache beside keys and values.

vLLM finds `register` by the entry-point group `vllm.general_plugins` and calls it in each of its processes.
What is registered are the names of the families' serving classes; those of vLLM's own need no plugin. No vLLM
model is imported until a converted one is loaded.
"""

from fulmen.modeling.families import all_families
from fulmen.serving.vllm_plugin.lifeline import end_with_parent

MODELS = "fulmen.serving.vllm_plugin.models"


def served_classes() -> list[str]:
    """Names of the classes in `MODELS`, one for each family whose DSA model is not stock."""
    return [name for family in all_families() if not family.is_stock for name in family.serving_classes]


def register() -> None:
    """Make fulmen's model types known to Transformers and its architectures to vLLM. May be called again."""
    end_with_parent()
    # Importing fulmen, as finding this function did, has told Transformers.
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for architecture in served_classes():
        if architecture not in known:
            ModelRegistry.register_model(architecture, f"{MODELS}:{architecture}")
