"""A model's mixtures of experts, by its config: how many there are, and what a token is multiplied with."""

from typing import Any, NamedTuple


class Experts(NamedTuple):
    """The layers whose MLP is a mixture of experts; all are alike.

    Attributes:
        layers: how many layers have one.
        total, chosen: routed experts of a layer, and those that a token visits.
        weights: of one routed expert.
        always: weights that every token is multiplied with: the router's and shared experts'.
    """

    layers: int
    total: int
    chosen: int
    weights: int
    always: int


def experts_of(config: Any) -> Experts | None:
    """None for a model without experts. Families have several words for each number."""
    total = _first(config, "n_routed_experts", "num_local_experts", "num_experts")
    layers = _layers_with_experts(config) if total else 0
    if not total or not layers:
        return None
    hidden = config.hidden_size
    width = _first(config, "moe_intermediate_size", "intermediate_size")
    shared = (_first(config, "n_shared_experts") or 0) * width * 3 * hidden
    if shared_width := _first(config, "shared_expert_intermediate_size"):
        shared += 3 * hidden * shared_width + hidden  # and a gate (Qwen2-MoE)
    return Experts(layers, total, config.num_experts_per_tok, 3 * hidden * width, hidden * total + shared)


def _first(config: Any, *names: str) -> int:
    """The value of the first of these names that is in the config; 0: none is."""
    return next((value for name in names if (value := getattr(config, name, None))), 0)


def _layers_with_experts(config: Any) -> int:
    if kinds := getattr(config, "mlp_layer_types", None):
        return int(kinds.count("sparse"))
    layers: int = config.num_hidden_layers
    if (first := getattr(config, "first_k_dense_replace", None)) is not None:
        return max(0, layers - first)
    step, plain = getattr(config, "decoder_sparse_step", 1), getattr(config, "mlp_only_layers", None) or []
    return sum((layer + 1) % step == 0 and layer not in plain for layer in range(layers))
