"""`fulmen cost`: what a million tokens cost against position, dense and with DSA. Loads no weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fulmen.cli.progress import STARTING, reporter
from fulmen.evaluation.wording import percent
from fulmen.pipeline.cost_settings import DEFAULT_BATCH, DEFAULT_POSITIONS, DEFAULT_PRICE, CostSettings

if TYPE_CHECKING:
    from fulmen.evaluation.price.prices import Pair, PriceRow
    from fulmen.evaluation.price.speed import Speed
    from fulmen.pipeline.cost import PriceRun

# The table begins here.
FIRST_SHOWN = 1024
POOR_FIT = 0.25


def cost_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model, dense or converted: a directory, a Hugging Face name, a .gguf file, smollm2-135m.",
            show_default=False,
        ),
    ],
    flops: Annotated[
        float | None,
        typer.Option(help="The machine's FLOPs a second, as 989e12.", show_default=False),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(help="The machine's bytes a second from memory, as 3.35e12.", show_default=False),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Time this machine's CPU in their place: minutes, more for a wide model."
        ),
    ] = False,
    price: Annotated[float, typer.Option(help="Dollars an hour for the machine.")] = DEFAULT_PRICE,
    hit_rate: Annotated[
        float,
        typer.Option(help="Share of the prompts' tokens that a prefix cache holds, at no cost: 0 to 1."),
    ] = 0.0,
    batch: Annotated[
        int, typer.Option(help="Sequences decoded together, which share each read of the weights.")
    ] = DEFAULT_BATCH,
    length: Annotated[int, typer.Option(help="The last position.")] = DEFAULT_POSITIONS,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder to write to. [dim]Default: cost-MODEL.[/]", show_default=False
        ),
    ] = None,
) -> None:
    """Price a model's tokens by position, read and generated, dense and with DSA. Loads no weights.

    Writes cost.json, cost.csv and cost.png. Without --measure a bound: as fast as the machine's two numbers
    allow, on both sides.

    Example: [bold]fulmen cost smollm2-135m --flops 989e12 --bandwidth 3.35e12[/]
    """
    settings = CostSettings(
        source=source,
        flops=flops,
        bandwidth=bandwidth,
        measure=measure,
        price=price,
        hit_rate=hit_rate,
        batch=batch,
        length=length,
        out=out,
    )
    told = reporter()
    with told.stage(STARTING):
        from fulmen.pipeline.cost import price_model
    run = price_model(settings, told)
    with told.stage("Write"):
        written = run.write(settings.folder)
    _print(run, Console(highlight=False))
    told.note("Wrote " + ", ".join(map(str, written)))


def _print(run: "PriceRun", console: Console) -> None:
    length, terms, machine = run.settings.length, run.pricing.terms, run.pricing.machine
    console.print(_table(run.rows, length))
    for kind, position in run.crossovers.items():
        console.print(f"{kind}: {_crossover_in_words(position, length)}")
    how = "measured on this machine's CPU" if run.speed else "a bound, at the machine's full speed"
    topk = run.pricing.shape.dsa.topk
    console.print(
        f"{how}: {machine.flops:.3g} FLOP/s, {machine.bandwidth:.3g} B/s, ${terms.per_hour:g} an hour; batch "
        f"{terms.batch}, {percent(terms.hit_rate, 0)} of the prompts' tokens cached; k = {topk:,}"
    )
    if run.speed:
        _print_fit(run.speed, console)


def _table(rows: "list[PriceRow]", length: int) -> Table:
    table = Table(title="Dollars per million tokens, by position", title_justify="left", box=None)
    names = [f"{kind}\n{side}" for kind in ("prefill", "decode") for side in ("dense", "DSA", "ratio")]
    for name in ("\nposition", *names):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row.position == length or (row.position.bit_count() == 1 and row.position >= FIRST_SHOWN):
            table.add_row(f"{row.position:,}", *_cells(row.prefill), *_cells(row.decode))
    return table


def _cells(prices: "Pair") -> tuple[str, str, str]:
    ratio = f"{prices.dense / prices.dsa:.2f}x" if prices.dsa else "-"
    return f"{prices.dense:.4g}", f"{prices.dsa:.4g}", ratio


def _crossover_in_words(position: int | None, length: int) -> str:
    if position is None:
        return f"DSA is never cheaper within {length:,} tokens"
    if position == 1:
        return f"DSA is cheaper at every position up to {length:,}"
    return f"DSA is cheaper from position {position:,} on"


def _print_fit(speed: "Speed", console: Console) -> None:
    worst = 0.0
    for kind, lines in speed.lines.items():
        parts = [
            f"{part} {fixed * 1e6:.3g} us + {per_token * 1e9:.3g} ns a token, within {percent(error, 0)}"
            for part, (fixed, per_token, error) in lines._asdict().items()
        ]
        worst = max(worst, *(line.error for line in lines))
        console.print(f"one layer, {kind}: {'; '.join(parts)}")
    backends = ", ".join(f"{part} by {name}" for part, name in speed.backends.items())
    console.print(
        f"computed: {backends}; measured up to {speed.last_position:,} tokens, drawn from the lines"
    )
    if worst > POOR_FIT:
        console.print(
            f"The lines miss measured times by up to {percent(worst, 0)}: the machine was busy, measure again"
        )
