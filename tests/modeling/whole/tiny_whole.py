"""Tiny random models that read images, dense and converted, and prompts with images."""

import torch
from transformers import AutoConfig, PreTrainedModel

from fulmen.config import DsaConfig
from fulmen.modeling.families import family_for, full_attention_layers
from fulmen.modeling.vision import import_vision, text_config_of
from tests.modeling.gqa.tiny_gqa import GEMMA3, SHAPE, random_ids

IMAGE = 90
# Each image is of 4 tokens.
IMAGE_TOKENS = 4
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
SIGLIP = {"vision_config": VISION, "image_token_id": IMAGE, "scale_factor": 2, "pad_token_id": 0}
QWEN_VISION = {"hidden_size": 32, "num_heads": 2, "depth": 2, "patch_size": 7, "initializer_range": 0.2}
QWEN2_5_VISION = {"intermediate_size": 48, "out_hidden_size": 64, "window_size": 28}
QWEN = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
# Of the 8 pairs of a head of 16 dims.
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]}}
# Model type, config of the text and the rest of the whole one's.
WHOLE: dict[str, tuple[dict, dict]] = {
    "idefics3": ({"model_type": "llama", **SHAPE}, SIGLIP),
    "smolvlm": (
        {"model_type": "llama", **SHAPE, "tie_word_embeddings": True},
        {**SIGLIP, "tie_word_embeddings": True},
    ),
    "qwen2_5_vl": (
        SHAPE | MROPE,
        QWEN | {"vision_config": QWEN_VISION | QWEN2_5_VISION},
    ),
    "qwen2_vl": (
        SHAPE | MROPE,
        QWEN | {"vision_config": QWEN_VISION | {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}},
    ),
    # A window that ends inside of an image.
    "gemma3": (
        {**SHAPE, "initializer_range": 0.1, **GEMMA3, "sliding_window": 3},
        {"vision_config": VISION, "image_token_index": IMAGE, "mm_tokens_per_image": IMAGE_TOKENS},
    ),
    "mistral3": (
        {"model_type": "mistral", **SHAPE, "sliding_window": None},
        {"vision_config": {"model_type": "pixtral", **VISION}, "image_token_index": IMAGE},
    ),
}


def make_whole(name: str, **changes) -> PreTrainedModel:
    """A stock model with random weights, biases and norms included; always the same one.

    changes: of its text's config.
    """
    torch.manual_seed(0)
    text, rest = WHOLE[name]
    config = AutoConfig.for_model(name, text_config={**text, **changes}, **rest)
    model = import_vision(name).source_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter.normal_(parameter.mean().item(), 0.3)
    return model.eval()


def convert_whole(dense: PreTrainedModel, topk: int = 8) -> PreTrainedModel:
    """The dense model's weights in a converted one with random indexers."""
    whole, text = import_vision(dense.config.model_type), text_config_of(dense.config)
    dsa = DsaConfig(topk, 4, 2, 8, tuple(full_attention_layers(text)))
    inner = family_for(text).dsa_config(text, dsa, text.tie_word_embeddings)
    torch.manual_seed(1)
    model = whole.whole_class(whole.dsa_config(dense.config, inner))
    unmatched = model.load_state_dict(dense.state_dict(), strict=False)
    assert not unmatched.unexpected_keys
    assert all(".indexer." in name for name in unmatched.missing_keys)
    model.tie_weights()
    return model.eval()


def prompt(name: str, rows: int = 2) -> dict[str, torch.Tensor]:
    """Rows with two images between texts, the second behind 3 tokens of padding."""
    generator = torch.Generator().manual_seed(3)
    ids_BT = random_ids(rows, 21)
    ids_BT[:, 5:9] = ids_BT[:, 13:17] = IMAGE
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, :3] = 0
    ids_BT[1, :3] = 0
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
    if name.startswith("qwen"):
        # 4 x 4 patches of two frames of 7 x 7 pixels; 2 x 2 of them are a token.
        pixels = torch.randn(rows * 2 * 16, 3 * 2 * 7 * 7, generator=generator)
        grid, kinds_BT = torch.tensor([[1, 4, 4]]).repeat(rows * 2, 1), (ids_BT == IMAGE).long()
        return inputs | {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds_BT}
    if name == "gemma3":
        pixels = torch.randn(rows * 2, 3, 28, 28, generator=generator)
        return inputs | {"pixel_values": pixels, "token_type_ids": (ids_BT == IMAGE).long()}
    if name == "mistral3":
        pixels = torch.randn(rows * 2, 3, 28, 28, generator=generator)
        return inputs | {"pixel_values": pixels, "image_sizes": torch.tensor([[28, 28]] * rows * 2)}
    return inputs | {"pixel_values": torch.randn(rows, 2, 3, 28, 28, generator=generator)}
