"""`fulmen export-rl`: options only; the work is `fulmen.export_rl`."""

from pathlib import Path
from typing import Annotated

import typer

from fulmen.cli.progress import reporter
from fulmen.pipeline.api_export_rl import ENGINE_NAMES, export_rl


def export_rl_command(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A directory that fulmen rl wrote.", show_default=False)
    ],
    to: Annotated[
        str, typer.Option(metavar="ENGINE", help=f"One of {', '.join(ENGINE_NAMES)}.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="A new folder for the files.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(
            help="What is to be trained: a directory or hub name. Default: what the run began with.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps. Default: the run's.", show_default=False)
    ] = None,
) -> None:
    """Write a run of fulmen rl for a trainer on many machines: problems, rewards, settings, a launch script.

    What the engine does otherwise than fulmen rl is said, and stands in the folder's README.md.

    Example: [bold]fulmen export-rl out/spells --to slime --out out/spells-slime[/]
    """
    told = reporter()
    folder = export_rl(run, to=to, out=out, model=model, steps=steps, reporter=told)
    told.note(f"Wrote {folder}; start it with launch.sh there")
