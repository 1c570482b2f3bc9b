"""Tiny models in each format of quantized checkpoints, written by hand, beside what their weights mean."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from fulmen.modeling.quantization.fp8 import fp8_blocks
from tests.modeling.gqa.tiny_gqa import make_dense
from tests.modeling.tiny_source import WEIGHTS, make_tokenizer

GROUP = 32
FP8_BLOCK = (32, 32)
AWQ_PACKING = (0, 2, 4, 6, 1, 3, 5, 7)
Parts = dict[str, Tensor]


def packed_along_columns(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes, as many as fit into each int32, the first in the lowest bits."""
    per_int = 32 // bits
    groups = codes.to(torch.int64).unflatten(1, (-1, per_int))
    whole = sum(groups[..., place] << (bits * place) for place in range(per_int))
    return (whole - ((whole >> 31) << 32)).to(torch.int32)


def rounded_groups(weight_NK: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Unsigned codes [N, K], zero points [N, G] and scales [N, G] of groups of inputs."""
    grouped, most = weight_NK.unflatten(1, (-1, GROUP)), (1 << bits) - 1
    if symmetric:
        scale_NG = grouped.abs().amax(-1) / (most // 2)
        zero_NG = torch.full_like(scale_NG, (most + 1) // 2)
    else:
        low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
        scale_NG = (high - low) / most
        zero_NG = (-low / scale_NG).round()
    scale_NG = scale_NG.half().float()
    codes = (grouped / scale_NG[..., None] + zero_NG[..., None]).round().clamp(0, most)
    return codes.flatten(1), zero_NG, scale_NG


def meant(codes_NK: Tensor, zero_NG: Tensor, scale_NG: Tensor) -> Tensor:
    grouped = codes_NK.unflatten(1, (-1, GROUP))
    return ((grouped - zero_NG[..., None]) * scale_NG[..., None]).flatten(1)


def gptq(weight_NK: Tensor, bits: int = 4) -> tuple[Parts, Tensor]:
    codes_NK, zero_NG, scale_NG = rounded_groups(weight_NK, bits, symmetric=True)
    parts = {
        "qweight": packed_along_columns(codes_NK, bits).T,
        "qzeros": packed_along_columns(zero_NG.T - 1, bits),
        "scales": scale_NG.T.half(),
        "g_idx": (torch.arange(weight_NK.shape[1]) // GROUP).int(),
    }
    return parts, meant(codes_NK, zero_NG, scale_NG)


def awq(weight_NK: Tensor) -> tuple[Parts, Tensor]:
    codes_NK, zero_NG, scale_NG = rounded_groups(weight_NK, 4, symmetric=False)

    def packed(codes: Tensor) -> Tensor:
        mixed = codes.unflatten(1, (-1, 8))[..., list(AWQ_PACKING)].flatten(1)
        return packed_along_columns(mixed, 4)

    parts = {
        "qweight": packed(codes_NK.T),
        "qzeros": packed(zero_NG.T),
        "scales": scale_NG.T.half(),
    }
    return parts, meant(codes_NK, zero_NG, scale_NG)


def pack_quantized(weight_NK: Tensor) -> tuple[Parts, Tensor]:
    codes_NK, zero_NG, scale_NG = rounded_groups(weight_NK, 4, symmetric=True)
    parts = {
        "weight_packed": packed_along_columns(codes_NK, 4),
        "weight_scale": scale_NG.bfloat16(),
        "weight_shape": torch.tensor(weight_NK.shape),
    }
    return parts, meant(codes_NK, zero_NG, scale_NG.bfloat16().float())


def pack_asymmetric(weight_NK: Tensor) -> tuple[Parts, Tensor]:
    codes_NK, zero_NG, scale_NG = rounded_groups(weight_NK, 4, symmetric=False)
    parts = {
        "weight_packed": packed_along_columns(codes_NK, 4),
        "weight_scale": scale_NG.bfloat16(),
        "weight_zero_point": packed_along_columns(zero_NG.T, 4).T,
        "weight_shape": torch.tensor(weight_NK.shape),
    }
    return parts, meant(codes_NK, zero_NG, scale_NG.bfloat16().float())


def int8_rows(weight_NK: Tensor) -> tuple[Parts, Tensor]:
    scale_N1 = weight_NK.abs().amax(1, keepdim=True) / 127
    codes = (weight_NK / scale_N1).round()
    return {"weight": codes.to(torch.int8), "weight_scale": scale_N1}, codes * scale_N1


def float8_rows(weight_NK: Tensor) -> tuple[Parts, Tensor]:
    scale_N1 = weight_NK.abs().amax(1, keepdim=True) / 448
    codes = (weight_NK / scale_N1).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale_N1}, codes.float() * scale_N1


def float8_blocks(weight_NK: Tensor) -> tuple[Parts, Tensor]:
    codes, scale_RC = fp8_blocks(weight_NK, FP8_BLOCK)
    expected = codes.float()
    for row in range(0, len(expected), FP8_BLOCK[0]):
        for column in range(0, expected.shape[1], FP8_BLOCK[1]):
            here = (slice(row, row + FP8_BLOCK[0]), slice(column, column + FP8_BLOCK[1]))
            expected[here] *= scale_RC[row // FP8_BLOCK[0], column // FP8_BLOCK[1]]
    return {"weight": codes, "weight_scale_inv": scale_RC}, expected


def _compressed(kind: str, weights: dict, inputs: dict | None) -> dict:
    common = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": common},
        "ignore": ["lm_head"],
    }


def _numbers(bits: int, kind: str, strategy: str, **more) -> dict:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **more}


_GROUPS = _numbers(4, "int", "group", group_size=GROUP)
_PER_TOKEN = {"dynamic": True}
FORMATS: dict[str, tuple[dict, Callable[[Tensor], tuple[Parts, Tensor]]]] = {
    "fp8": (
        {"quant_method": "fp8", "weight_block_size": list(FP8_BLOCK), "activation_scheme": "dynamic"},
        float8_blocks,
    ),
    "w8a8": (
        _compressed(
            "int-quantized", _numbers(8, "int", "channel"), _numbers(8, "int", "token", **_PER_TOKEN)
        ),
        int8_rows,
    ),
    "fp8-rows": (
        _compressed(
            "float-quantized", _numbers(8, "float", "channel"), _numbers(8, "float", "token", **_PER_TOKEN)
        ),
        float8_rows,
    ),
    "w4a16": (_compressed("pack-quantized", _GROUPS, None), pack_quantized),
    "w4a16-asymmetric": (
        _compressed("pack-quantized", {**_GROUPS, "symmetric": False}, None),
        pack_asymmetric,
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
        awq,
    ),
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
        gptq,
    ),
}


def save_quantized(folder: Path, name: str, model: PreTrainedModel | None = None) -> PreTrainedModel:
    """Write a model in a format, its projections in the layers quantized; the model of what they mean."""
    model = model or make_dense("llama", torch.bfloat16)
    settings, quantize = FORMATS[name]
    held: dict[str, Tensor] = {}
    with torch.no_grad():
        for key, weight in model.state_dict().items():
            if "_proj.weight" not in key:
                held[key] = weight.clone()
                continue
            parts, expected = quantize(weight.float())
            stem = key.removesuffix("weight")
            held |= {f"{stem}{part}": x.contiguous() for part, x in parts.items()}
            weight.copy_(expected)
    write_checkpoint(folder, model, held, settings)
    return model


def write_checkpoint(folder: Path, model: PreTrainedModel, held: dict[str, Tensor], settings: dict) -> None:
    """Config with `quantization_config`, weights, tokenizer."""
    folder.mkdir(exist_ok=True)
    save_file(held, folder / WEIGHTS, {"format": "pt"})
    model.config.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    values |= {"dtype": str(model.dtype).removeprefix("torch."), "quantization_config": settings}
    values["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(values))
    make_tokenizer(model.config.vocab_size).save_pretrained(folder)
