"""Ablations: what each choice costs or gains, as loss over dense on held-out text (code and prose).

    python -m benchmarks.quality.ablation.run init                    # inherited or random indexer by tokens
    python -m benchmarks.quality.ablation.run shape                   # index heads and widths
    python -m benchmarks.quality.ablation.run topk out/model-dsa      # k
    python -m benchmarks.quality.ablation.run keys out/model-dsa      # index keys in 8, 16, 32 bits
    python -m benchmarks.quality.ablation.run sharing out/model-dsa   # one index for 2 or 3 layers
    python -m benchmarks.quality.ablation.run levels out/model-dsa    # a coarse level before the index
    python -m benchmarks.quality.ablation.run stages out/model-dsa out/model-trained out/model-dense-tuned
    python -m benchmarks.quality.ablation.run table                   # docs/ablations.md and its plot

Each cell is one JSON line in --out, written at once; what is there already is not measured again, so every
command can be stopped and started anew. The control of `stages` comes from `fulmen train --k-schedule dense`.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.quality.ablation.drawing import write_table
from benchmarks.quality.ablation.lab import Lab, ends, quarters
from benchmarks.quality.ablation.levels import Point, measure_levels, points_around
from benchmarks.quality.ablation.measuring import fingerprint
from benchmarks.quality.ablation.sharing import SharedLossSelector, SharedSelector, group_means, leaders
from fulmen.config import DEFAULT_CANDIDATE_FACTOR
from fulmen.evaluation.variants import indexer_state
from fulmen.modeling.checkpoint import load_dense
from fulmen.modeling.cost import index_key_bytes, indexer_cost
from fulmen.modeling.families import dsa_family_for, dsa_of, family_for
from fulmen.modeling.gqa import attention
from fulmen.modeling.gqa.indexer import model_head_width
from fulmen.modeling.gqa.model import set_topk_ratios
from fulmen.modeling.index_shape import default_dsa
from fulmen.modeling.selectors import DenseSelector
from fulmen.pipeline.load import load_converted
from fulmen.training.warmup.settings import WarmupSettings

# Shares of the model's rotary pairs that index heads keep.
PAIR_SHARES = (0.25, 0.375, 0.5, 0.75, 1.0)
RATE = WarmupSettings.learning_rate

Source = Annotated[str, typer.Argument(help="The dense model, as for fulmen convert.")]
ModelDir = Annotated[Path, typer.Argument(help="What fulmen convert wrote.", show_default=False)]
Out = Annotated[Path, typer.Option(help="Folder of the JSON lines and of training's states.")]
Windows = Annotated[int, typer.Option(help="Held-out texts per kind.")]
Tokens = Annotated[int, typer.Option(help="Tokens of warm-up.")]
Length = Annotated[int, typer.Option(help="Tokens per text; calibration texts have twice as many.")]
Topk = Annotated[int, typer.Option(help="Keys that a query keeps.")]
Seed = Annotated[int, typer.Option(help="Of texts, random weights and sampled rows.")]
OUT = Path("out/ablation")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__, rich_markup_mode=None)


@app.command()
def init(
    source: Source = "smollm2-135m",
    out: Out = OUT,
    windows: Windows = 2,
    tokens: Tokens = 65536,
    length: Length = 2048,
    topk: Topk = 256,
    random_rates: Annotated[str, typer.Option(help="Learning rates tried for the random one.")] = "1e-3",
    seed: Seed = 0,
) -> None:
    """An inherited or a random indexer of the same shape, before and after some tokens of warm-up."""
    dense, tokenizer = load_dense(source, torch.float32)
    lab = Lab("init", dense.eval(), tokenizer, out, windows, length, seed, topk=topk)
    for name, rate in [("inherit", RATE)] + [("random", float(rate)) for rate in random_rates.split(",")]:
        torch.manual_seed(seed)
        model = family_for(dense.config).from_dense(dense, default_dsa(dense.config, topk))
        start, measure = partial(_start, lab, model, name, topk), partial(lab.measure, model, topk)
        marks = quarters(tokens, length)
        lab.train({"init": name, "rate": rate}, model, start, marks, rate, measure)


def _start(lab: Lab, model: PreTrainedModel, name: str, topk: int) -> None:
    if name == "inherit":
        lab.inherit(model, topk)
    else:
        lab.share(model, topk)


@app.command()
def shape(
    source: Source = "smollm2-135m",
    out: Out = OUT,
    windows: Windows = 2,
    tokens: Tokens = 0,
    length: Length = 2048,
    topk: Topk = 256,
    shapes: Annotated[
        str | None,
        typer.Option(help="Index heads x rotary pairs, as 9x24,3x24; default: a quarter to all pairs."),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Index heads (one per attention head, one per key head) and widths, inherited and warmed up."""
    dense, tokenizer = load_dense(source, torch.float32)
    lab = Lab("shape", dense.eval(), tokenizer, out, windows, length, seed, topk=topk)
    for heads, pairs in _shapes(dense.config, shapes):
        dsa = default_dsa(dense.config, topk, heads, 2 * pairs)
        model = family_for(dense.config).from_dense(dense, dsa)
        start, measure = partial(lab.inherit, model, topk), partial(lab.measure, model, topk)
        lab.train({"heads": heads, "pairs": pairs}, model, start, ends(tokens, length), RATE, measure)


def _shapes(config: Any, asked: str | None) -> list[tuple[int, ...]]:
    if asked is not None:
        return [tuple(map(int, one.split("x"))) for one in asked.split(",")]
    pairs = [int(share * (model_head_width(config) // 2)) for share in PAIR_SHARES]
    per_head = [(config.num_attention_heads, count) for count in pairs]
    return per_head + [(config.num_key_value_heads, count) for count in pairs[-2:]]


@app.command()
def topk(
    model_dir: ModelDir,
    out: Out = OUT,
    windows: Windows = 2,
    length: Length = 2048,
    ks: Annotated[str, typer.Option(help="Keys that a query keeps.")] = "64,128,256,512,1024",
    seed: Seed = 0,
) -> None:
    """One model at several k; its shares and thresholds stay those of its own k."""
    model, tokenizer = load_converted(model_dir)
    lab = Lab("topk", model, tokenizer, out, windows, length, seed)
    for k in map(int, ks.split(",")):
        lab.cells.add({"topk": k}, partial(lab.measure, model, k))


@app.command()
def keys(
    model_dir: ModelDir, out: Out = OUT, windows: Windows = 2, length: Length = 2048, seed: Seed = 0
) -> None:
    """The same weights with index keys as caches keep them (8 bits), in bfloat16, and not rounded."""
    model, tokenizer = load_converted(model_dir)
    k = dsa_of(model.config).topk
    lab = Lab("keys", model, tokenizer, out, windows, length, seed, topk=k)
    lab.cells.add({"keys": "8 bits"}, partial(lab.measure, model, k))
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        lab.cells.add({"keys": name}, partial(_with_keys_in, dtype, lab, model, k))


def _with_keys_in(dtype: torch.dtype, lab: Lab, model: PreTrainedModel, k: int) -> dict[str, Any]:
    def stored(k_BSIE: Tensor) -> Tensor:
        return k_BSIE.to(dtype).float()

    dsa = dsa_of(model.config)
    numbers = dsa.index_n_kv_heads * dsa.index_head_dim * len(dsa.layers)
    # Here the layers round them where there is no cache; the product has no switch for that.
    with patch.object(attention, "round_index_keys", stored):
        return {**lab.measure(model, k), "index_key_bytes": numbers * dtype.itemsize}


@app.command()
def sharing(
    model_dir: ModelDir,
    out: Out = OUT,
    windows: Windows = 2,
    tokens: Tokens = 32768,
    length: Length = 2048,
    sizes: Annotated[str, typer.Option(help="Layers to an index.")] = "1,2,3",
    apart: Annotated[int, typer.Option(help="First layers that keep an index of their own.")] = 0,
    own_k: Annotated[
        bool, typer.Option("--own-k", help="Layers keep their own k, not their group's mean.")
    ] = False,
    seed: Seed = 0,
) -> None:
    """One index for neighbouring layers, as it is and after a warm-up towards their averaged attention."""
    model, tokenizer = load_converted(model_dir)
    dsa = dsa_of(model.config)
    lab = Lab("sharing", model, tokenizer, out, windows, length, seed, topk=dsa.topk)
    first = {key: tensor.clone() for key, tensor in indexer_state(model).items()}
    shares = dsa.topk_shares or (1.0,) * len(dsa.layers)
    for size in map(int, sizes.split(",")):
        run = {"size": size, "apart": apart if size > 1 else 0, "own_k": own_k or size == 1}
        leader_of = leaders(dsa.layers, size, run["apart"])
        kept = shares if run["own_k"] else group_means(shares, leader_of)
        lab.train(
            run,
            model,
            partial(_reset, model, first, kept),
            ends(tokens, length),
            RATE,
            partial(_measure_shared, lab, model, leader_of),
            partial(SharedLossSelector, leader_of=leader_of),
        )


def _reset(model: PreTrainedModel, indexers: dict[str, Tensor], shares: Sequence[float]) -> None:
    model.load_state_dict(indexers, strict=False)
    set_topk_ratios(model, shares)


def _measure_shared(lab: Lab, model: PreTrainedModel, leader_of: dict[int, int]) -> dict[str, Any]:
    """Also the FLOPs of all indexes for the last token of a text."""
    dsa, indexes = dsa_of(model.config), len(set(leader_of.values()))
    one = indexer_cost(model.config, dsa)
    flops = lab.length * one.pair_flops + 2 * (one.key_weights + one.query_weights)
    return {
        **lab.measure(model, dsa.topk, SharedSelector(leader_of)),
        "index_key_bytes": indexes * index_key_bytes(model.config, dsa),
        "index_flops": indexes * flops,
    }


@app.command()
def levels(
    model_dir: ModelDir,
    out: Out = OUT,
    windows: Windows = 1,
    length: Annotated[int, typer.Option(help="Tokens per text.")] = 8192,
    topk: Annotated[int | None, typer.Option(help="Keys kept. Default: a 64th of the length.")] = None,
    dims: Annotated[str, typer.Option(help="Numbers of a coarse key, beside the default.")] = "16,32,48",
    heads: Annotated[
        str | None, typer.Option(help="Coarse heads. Default: as many as key heads, beside one a head.")
    ] = None,
    factors: Annotated[str, typer.Option(help="Candidates over k, beside 8.")] = "4,16",
    bits: Annotated[str, typer.Option(help="Of a coarse key's number, beside 8.")] = "4",
    calibration: Annotated[int, typer.Option(help="Tokens of each of the two calibration texts.")] = 4096,
    seed: Seed = 0,
) -> None:
    """Coarse levels fitted to the model, against one level: loss, and attention that candidates hold."""
    model, tokenizer = load_converted(model_dir)
    k = topk or max(1, length // 64)
    lab = Lab("levels", model, tokenizer, out, windows, length, seed, topk=k, calibration=calibration)
    shape = dsa_family_for(model.config).default_coarse(model.config)
    usual = Point(shape.width, shape.heads, DEFAULT_CANDIDATE_FACTOR, 8)
    few = heads or str(model.config.num_key_value_heads)
    lists = ([int(one) for one in many.split(",") if one] for many in (dims, few, factors, bits))
    measure_levels(lab, model, k, points_around(usual, *lists), calibration)


@app.command()
def stages(
    model_dirs: Annotated[
        list[Path], typer.Argument(help="Converted models; the first one, read densely, is what counts.")
    ],
    out: Out = OUT,
    windows: Windows = 2,
    length: Length = 2048,
    seed: Seed = 0,
) -> None:
    """Models of different stages, each read densely and sparsely, against the first one read densely."""
    first, tokenizer = load_converted(model_dirs[0])
    lab = Lab("stages", first, tokenizer, out, windows, length, seed, topk=dsa_of(first.config).topk)
    for model_dir in model_dirs:
        model, _ = load_converted(model_dir)
        what = {"weights": fingerprint(model), **_stages_of(model_dir)}
        k = dsa_of(model.config).topk
        lab.cells.add({**what, "read": "densely"}, partial(lab.measure, model, k, DenseSelector()))
        lab.cells.add({**what, "read": "sparsely"}, partial(lab.measure, model, k))


def _stages_of(model_dir: Path) -> dict[str, Any]:
    """What a model went through, by its own record."""
    record = json.loads((model_dir / "conversion.json").read_text(encoding="utf-8"))
    return {
        "stages": list(record["stages_done"]),
        "k_schedule": record.get("sparse", {}).get("k_schedule"),
        "tokens": record["stages_done"].get("sparse", {}).get("tokens", 0),
    }


@app.command()
def table(
    out: Out = OUT,
    docs: Annotated[Path, typer.Option(help="Folder of ablations.md and ablations.svg.")] = Path("docs"),
) -> None:
    """Write docs/ablations.md and the plot from the JSON lines."""
    write_table(out, docs)


if __name__ == "__main__":
    app()
