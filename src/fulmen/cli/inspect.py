"""`fulmen inspect`: what a model is and what DSA would save it, without loading weights."""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fulmen.config import DsaConfig
from fulmen.pipeline.reporter import stage

if TYPE_CHECKING:
    from fulmen.modeling.cost import CostRow
    from fulmen.pipeline.describe import ModelDescription


def inspect_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A model, dense or converted: a directory, a Hugging Face name, a .gguf file, smollm2-135m.",
            show_default=False,
        ),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON: bytes, FLOPs, counts.")
    ] = False,
) -> None:
    """Show what a model is, how it would be converted and what that saves. Loads no weights.

    Example: [bold]fulmen inspect smollm2-135m[/]
    """
    with stage("Read"):
        from fulmen.pipeline.describe import describe

        description = describe(source)
    if as_json:
        typer.echo(json.dumps(description.to_dict(), indent=2))
    else:
        _print_description(description, Console(highlight=False))


def _print_description(model: "ModelDescription", console: Console) -> None:
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(model):
        facts.add_row(f"[bold]{name}[/]", value)
    console.print(facts)
    console.print()
    console.print(_savings(model))
    console.print(
        f"read: keys, values and index keys, in {model.dtype}. FLOPs: all, the other weights' included, "
        f"whose {_bytes(model.step_weights)} a step reads once for its whole batch."
    )
    if model.context and model.rows[-1].position > model.context:
        console.print(f"* beyond this model's context of {model.context:,} tokens")


def _facts(model: "ModelDescription") -> list[tuple[str, str]]:
    from fulmen.pipeline.describe import layer_ranges

    dsa, verb = model.dsa, "has" if model.converted else "would get"
    state = "converted: it has DSA already" if model.converted else "dense: fulmen convert can give it DSA"
    context = f"{model.context:,} tokens" if model.context else "not stated"
    facts = [
        ("model", model.source),
        ("state", state),
        ("family", f"{model.model_type} ({model.architecture})"),
        ("parameters", f"{_count(model.parameters)}, {model.dtype}{_dequantized(model)}"),
        ("layers", f"{model.layers}, hidden size {model.hidden_size:,}, vocabulary {model.vocab_size:,}"),
        ("heads", model.heads),
        ("RoPE", model.rope),
        ("context", context),
        ("DSA layers", f"{layer_ranges(dsa.layers)} ({len(dsa.layers)} of {model.layers})"),
    ]
    facts += [("dense layers", f"{layers}: {reason}") for layers, reason in model.dense_layers.items()]
    shape = (
        f"{verb} {dsa.index_n_heads} query, {dsa.index_n_kv_heads} key, width {dsa.index_head_dim}, "
        f"top-k {_topk_in_words(dsa)}; {_count(model.indexer_parameters)} parameters"
    )
    share = (
        f"{_bytes(model.token_bytes.kv)} a token, index keys {_bytes(model.token_bytes.index_keys)} more "
        f"({model.index_key_share:.1%} of a converted layer)"
    )
    return [*facts, ("indexer", shape), ("cache", share)]


def _dequantized(model: "ModelDescription") -> str:
    return (
        f", dequantized from {', '.join(model.quantized)} (convert --dtype decides)"
        if model.quantized
        else ""
    )


def _savings(model: "ModelDescription") -> Table:
    table = Table(
        title="One decoded token, by the number of tokens it sees; cache in GiB",
        title_justify="left",
        box=None,
    )
    names = [f"{kind}\n{side}" for kind in ("read", "FLOPs") for side in ("dense", "DSA", "ratio")]
    for name in ("\ntokens", *names, "cache\ndense", "cache\nDSA"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in model.rows:
        table.add_row(*_saving(row, bool(model.context and row.position > model.context)))
    return table


def _saving(row: "CostRow", beyond_context: bool) -> list[str]:
    cost = row.decode
    return [
        f"{_tokens(row.position)}{'*' if beyond_context else ''}",
        _bytes(cost.dense_bytes),
        _bytes(cost.dsa_bytes),
        f"{cost.dense_bytes / cost.dsa_bytes:.1f}x",
        _count(cost.dense_flops),
        _count(cost.dsa_flops),
        f"{cost.dense_flops / cost.dsa_flops:.1f}x",
        f"{row.cache.kv / 2**30:.2f}",
        f"{sum(row.cache) / 2**30:.2f}",
    ]


def _tokens(count: int) -> str:
    return f"{count // 2**20}M" if count >= 2**20 else f"{count // 1024}K"


def _count(value: float) -> str:
    return _scaled(value, (" T", 1e12), (" G", 1e9), (" M", 1e6), (" k", 1e3))


def _bytes(value: float) -> str:
    return _scaled(value, (" GB", 1e9), (" MB", 1e6), (" kB", 1e3)) + ("" if value >= 1e3 else " B")


def _scaled(value: float, *units: tuple[str, float]) -> str:
    for name, size in units:
        if value >= size:
            return f"{value / size:.3g}{name}" if value < 1000 * size else f"{value / size:,.0f}{name}"
    return f"{value:.3g}"


def _topk_in_words(dsa: DsaConfig) -> str:
    """ "256", or "256 (128 to 1,024 by layer)"."""
    by_layer = [dsa.layer_topk(layer) for layer in dsa.layers]
    if min(by_layer) == max(by_layer):
        return f"{dsa.topk}"
    return f"{dsa.topk} ({min(by_layer):,} to {max(by_layer):,} by layer)"
