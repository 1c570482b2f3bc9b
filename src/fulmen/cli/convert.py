"""`fulmen convert`: options only; the work is `fulmen.convert`."""

from pathlib import Path
from typing import Annotated

import typer

from fulmen.cli.console import renamed
from fulmen.cli.device_option import Device
from fulmen.cli.progress import reporter
from fulmen.pipeline.api import convert
from fulmen.pipeline.settings import (
    AUTO_DEVICE,
    DEFAULT_BUDGET,
    DEFAULT_SPARSE_BUDGET,
    DTYPES,
    STAGES,
)

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="The dense model: a directory, a Hugging Face name, a .gguf file, or smollm2-135m.",
        show_default=False,
    ),
]


def convert_command(
    source: Source,
    out: Annotated[
        Path,
        typer.Option(help="Directory for the converted model; made whole or not at all.", show_default=False),
    ],
    topk: Annotated[
        int | None,
        typer.Option(
            help="Tokens that each query keeps. Below it attention stays dense. "
            "[dim]Default: context / 32, within 256 and 2048, context / 2 at most; where nothing is trained "
            "--length / 8, without one context / 8 up to 2048.[/]",
            show_default=False,
        ),
    ] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            help=f"Stages to run, in this order, of {', '.join(STAGES)}. inherit builds the indexer from "
            "the model's own heads (about a minute); warmup trains it to match the dense attention; sparse "
            "trains all weights under sparse attention, taught by the dense model (options: fulmen train). "
            "[dim]Default: inherit,warmup; inherit alone by layers.[/]",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION",
            help=f"Time for warmup: 90s, 8m, 1h30m. Not with --steps. [dim]Default: {DEFAULT_BUDGET}.[/]",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Optimizer steps of the warm-up, instead of --budget.", show_default=False),
    ] = None,
    sparse_budget: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION",
            help=f"Time for the stage sparse. [dim]Default: {DEFAULT_SPARSE_BUDGET}.[/]",
            show_default=False,
        ),
    ] = None,
    sparse_steps: Annotated[
        int | None,
        typer.Option(help="Optimizer steps of it, instead of --sparse-budget.", show_default=False),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="Text to calibrate and train on: a file, a directory of them, or hf:name; may be repeated. "
            "[dim]Default: the documentation and sources that come with Python.[/]",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model directory at --out.")
    ] = False,
    dtype: Annotated[
        str,
        typer.Option(
            help=f"Type of the weights: {', '.join(DTYPES)}. auto: as in SOURCE (quantized GGUF: bfloat16)."
        ),
    ] = "auto",
    device: Device = AUTO_DEVICE,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    index_heads: Annotated[
        int | None,
        typer.Option(
            help="Index heads per layer. [dim]Default: one per attention head (MLA: at most 64).[/]",
            show_default=False,
        ),
    ] = None,
    index_head_dim: Annotated[
        int | None,
        typer.Option(
            help="Width of an index head, even. [dim]Default: a fifth of the cache at most (MLA: 128).[/]",
            show_default=False,
        ),
    ] = None,
    index: Annotated[
        str | None,
        typer.Option(
            help="two-level: a coarse index looks at all keys and leaves the indexer a few times k of them; "
            "one-level: the indexer looks at all. With a converted SOURCE: give it that index and change "
            "nothing else (a minute). [dim]Default: two-level where the context has more than 32 k "
            "tokens; one with MLA and very small heads.[/]",
            show_default=False,
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens per training sequence; more than k. [dim]Default: 4 k, at least 2048, within the "
            "context; less if the text does not fill that.[/]",
            show_default=False,
        ),
    ] = None,
    by_layers: Annotated[
        bool | None,
        typer.Option(
            "--by-layers/--whole",
            help="Have one layer at a time in memory, and link the source's files into --out as they are. "
            "[dim]Default: if it has no room, or is quantized (fulmen inspect says).[/]",
            show_default=False,
        ),
    ] = None,
    window: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Convert a dense model: build an indexer from its own heads, train it, write a model directory.

    Example: [bold]fulmen convert smollm2-135m --out out/smollm2-dsa --budget 8m[/]
    """
    told = reporter()
    convert(
        source,
        out=out,
        topk=topk,
        stages=stages,
        budget=budget,
        steps=steps,
        sparse_budget=sparse_budget,
        sparse_steps=sparse_steps,
        data=data or (),
        overwrite=overwrite,
        dtype=dtype,
        device=device,
        seed=seed,
        index_heads=index_heads,
        index_head_dim=index_head_dim,
        index=index,
        length=renamed("window", window, "length", length),
        by_layers=by_layers,
        reporter=told,
    )
    told.note(f"Wrote {out}; next: fulmen eval {out} --html report.html")
