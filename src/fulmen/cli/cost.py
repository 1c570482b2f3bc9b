"""`fulmen cost`: what a million tokens cost against position, dense and with DSA. Loads no weights."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from fulmen.errors import unwritable
from fulmen.pipeline.cost_settings import DEFAULT_BATCH, DEFAULT_POSITIONS, DEFAULT_PRICE, CostSettings
from fulmen.pipeline.reporter import STARTING, stage

if TYPE_CHECKING:
    from fulmen.evaluation.price.prices import ModelShape, Pair, PriceRow, Pricing
    from fulmen.evaluation.price.speed import Speed

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
    price_model(
        CostSettings(
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
    )


class PriceRun(NamedTuple):
    """A curve with all that it was made from; `speed` is None where nothing was measured."""

    settings: CostSettings
    pricing: "Pricing"
    speed: "Speed | None"
    rows: "list[PriceRow]"
    crossovers: dict[str, int | None]


def price_model(settings: CostSettings) -> dict[str, Any]:
    """Price, write and print as `fulmen cost` does; return what cost.json holds.

    Raises what its parts raise.
    """
    with stage(STARTING):
        from fulmen.evaluation.price.prices import (
            KINDS,
            Machine,
            Measured,
            Pricing,
            Roofline,
            Terms,
            curve_positions,
        )
        from fulmen.pipeline.describe import read_shape
    _, _, shape = read_shape(settings.source)
    speed = _measured(settings, shape) if settings.measure else None
    machine = speed.machine if speed else Machine(*settings.given_speed())
    attention = Measured(speed.lines) if speed else Roofline(machine)
    pricing = Pricing(shape, machine, attention, Terms(settings.price, settings.hit_rate, settings.batch))
    crossovers = {kind: pricing.cheaper_from(kind, settings.length) for kind in KINDS}
    positions = curve_positions(shape.dsa, settings.length)
    run = PriceRun(settings, pricing, speed, pricing.rows(positions), crossovers)
    report = _report(run)
    with stage("Write"):
        written = _write(run, report)
    _print(run, Console(highlight=False))
    typer.echo("Wrote " + ", ".join(map(str, written)), err=True)
    return report


def _measured(settings: CostSettings, shape: "ModelShape") -> "Speed":
    from fulmen.evaluation.price.speed import measure_speed, measured_positions

    positions = measured_positions(shape.dsa.topk, settings.length)
    try:
        # Said before minutes of measuring, not after.
        settings.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(settings.folder, error) from error
    with stage("Measure") as advance:
        return measure_speed(shape, positions, progress=advance)


def _report(run: PriceRun) -> dict[str, Any]:
    from fulmen.evaluation.price.plot import price_dict
    from fulmen.evaluation.provenance import about_run

    shape = run.pricing.shape
    return {
        "about": about_run(run.settings.source),
        "dsa": shape.dsa.to_dict(),
        "dtype": str(shape.dtype).removeprefix("torch."),
        "machine": asdict(run.pricing.machine),
        "terms": asdict(run.pricing.terms),
        "unit": "dollars per million tokens",
        "crossovers": run.crossovers,
        "rows": [price_dict(row) for row in run.rows],
        "measured": run.speed.to_dict() if run.speed else None,
    }


def _write(run: PriceRun, report: dict[str, Any]) -> list[Path]:
    from fulmen.evaluation.price.plot import png_bytes, price_csv, price_plot
    from fulmen.evaluation.report_files import write_json
    from fulmen.files import write_file

    plot = price_plot(run.rows, run.crossovers, run.speed.last_position if run.speed else None)
    folder = run.settings.folder
    return [
        write_json(report, folder / "cost.json"),
        write_file(folder / "cost.csv", price_csv(run.rows)),
        write_file(folder / "cost.png", png_bytes(plot)),
    ]


def _print(run: PriceRun, console: Console) -> None:
    length, terms, machine = run.settings.length, run.pricing.terms, run.pricing.machine
    console.print(_table(run.rows, length))
    for kind, position in run.crossovers.items():
        console.print(f"{kind}: {_crossover_in_words(position, length)}")
    how = "measured on this machine's CPU" if run.speed else "a bound, at the machine's full speed"
    topk = run.pricing.shape.dsa.topk
    console.print(
        f"{how}: {machine.flops:.3g} FLOP/s, {machine.bandwidth:.3g} B/s, ${terms.per_hour:g} an hour; batch "
        f"{terms.batch}, {terms.hit_rate:.0%} of the prompts' tokens cached; k = {topk:,}"
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
            f"{part} {fixed * 1e6:.3g} us + {per_token * 1e9:.3g} ns a token, within {error:.0%}"
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
            f"The lines miss measured times by up to {worst:.0%}: the machine was busy, measure again"
        )
