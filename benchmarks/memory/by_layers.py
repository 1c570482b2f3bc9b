"""Peak memory and time of inherit layer by layer, on random weights in the shapes of Qwen3-8B.

    python -m benchmarks.memory.by_layers out/shapes --layers 36 --length 2048

The checkpoint (0.39 GB a layer, 2.5 GB for embedding and head, shards of about 1 GB) is written first, in a
process of its own, if it is not there. Killed, the same command goes on with the layer that it was at.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import typer
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

from benchmarks.machine import describe_machine
from fulmen.data import TokenSequence
from fulmen.modeling.by_layers import layered_model
from fulmen.modeling.index_shape import default_dsa
from fulmen.modeling.inherit_cost import inherit_cost, weight_sizes
from fulmen.modeling.lengths import untrained_topk
from fulmen.modeling.shards import Shards
from fulmen.modeling.weight_files import INDEX_FILE
from fulmen.pipeline.inherit_by_layers import inherit_by_layers
from fulmen.pipeline.reporter import LineReporter
from fulmen.pipeline.run_dir import RunDir
from fulmen.pipeline.texts import ConversionTexts

SHARD_BYTES = 10**9
app = typer.Typer(add_completion=False)


def _config(layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )


def _write_checkpoint(folder: Path, layers: int) -> None:
    """Normal weights of 1 / sqrt(inputs), the same millions over and over, norms of one."""
    config = _config(layers)
    with init_empty_weights():
        shapes = {name: x.shape for name, x in AutoModelForCausalLM.from_config(config).state_dict().items()}
    normal = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    folder.mkdir(parents=True)
    weight_map, shard, held = {}, 0, {}
    for name, shape in shapes.items():
        held[name] = torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 2:
            for some in held[name].view(-1).split(len(normal)):
                torch.mul(normal[: len(some)], shape[1] ** -0.5, out=some)
        weight_map[name] = f"model-{shard:05}.safetensors"
        if name == list(shapes)[-1] or sum(one.nbytes for one in held.values()) > SHARD_BYTES:
            save_file(held, folder / f"model-{shard:05}.safetensors", {"format": "pt"})
            held, shard = {}, shard + 1
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    config.save_pretrained(folder)


@app.command()
def main(
    folder: Path,
    layers: int = 36,
    sequences: int = 2,
    length: int = 2048,
    write_only: bool = False,
) -> None:
    """Measure one inherit, or what is left of a killed one."""
    if write_only:
        _write_checkpoint(folder, layers)
        return
    if not (folder / "config.json").exists():
        asked = [sys.executable, "-m", __spec__.name, str(folder), "--layers", str(layers), "--write-only"]
        subprocess.run(asked, check=True)
    config = AutoConfig.from_pretrained(folder)
    dsa = default_dsa(config, untrained_topk(config, length))
    ids = torch.randint(config.vocab_size, (sequences, length), generator=torch.Generator().manual_seed(1))
    texts = ConversionTexts(
        length, [TokenSequence(("random",), "random", row, (0,)) for row in ids], [], [], []
    )
    run = RunDir(folder.with_name(f"{folder.name}-dsa"))
    resumed = run.open({"length": length}, discard_other=True)
    began = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    inherit_by_layers(
        layered_model(config, dsa, Shards(folder), torch.device("cpu")), texts, run, LineReporter()
    )
    cost = inherit_cost(config, dsa, weight_sizes(config), sequences, length, 2)
    found = {
        "layers": config.num_hidden_layers,
        "calibration": [sequences, length],
        "resumed": resumed,
        "seconds": round(time.perf_counter() - began, 1),
        "program GiB": round(before / 2**20, 2),
        "peak GiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "estimated peak GiB": round(cost.layers_bytes / 2**30, 2),
        "indexers GiB": round(run.stage("inherit").stat().st_size / 2**30, 2),
    }
    print(json.dumps({**describe_machine(), **found}))
    run.remove()


if __name__ == "__main__":
    app()
