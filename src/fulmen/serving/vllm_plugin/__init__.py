"""Converted Llama, Mistral, Qwen2 and Qwen3 models in vLLM, with an index-key cache beside keys and values.

vLLM finds `register` by the entry-point group `vllm.general_plugins` and calls it in each of its processes.
What is registered are names; nothing is imported until a converted model is loaded.
"""

from fulmen.serving.vllm_plugin.lifeline import end_with_parent

ARCHITECTURES = ("LlamaDsaForCausalLM", "MistralDsaForCausalLM", "Qwen2DsaForCausalLM", "Qwen3DsaForCausalLM")


def register() -> None:
    """Make fulmen's model types known to Transformers and its architectures to vLLM. May be called again."""
    end_with_parent()
    # Importing fulmen, as finding this function did, has told Transformers.
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for architecture in ARCHITECTURES:
        if architecture not in known:
            ModelRegistry.register_model(architecture, f"fulmen.serving.vllm_plugin.models:{architecture}")
