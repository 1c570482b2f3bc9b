"""`fulmen recipe run`, `specialize` and `distill`: options only; the work is `fulmen.recipe`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fulmen.cli.device_option import Device
from fulmen.cli.progress import reporter
from fulmen.cli.suite import print_table
from fulmen.pipeline.api_recipe import distill, recipe, specialize
from fulmen.pipeline.settings import AUTO_DEVICE

if TYPE_CHECKING:
    from fulmen.evaluation.recipe.report import RecipeReport

recipe_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Post-train by a recipe: specialists, a model distilled from them, mixed RL.",
    epilog="A recipe is a YAML file: examples/recipe-small.yaml is one, docs/recipe.md has its keys.",
)

RecipeFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="The recipe, a YAML file.", show_default=False)
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the run: a model per stage, and the report. [dim]Default: out/NAME of NAME.yaml.[/]",
        show_default=False,
    ),
]


@recipe_app.command("run")
def run_command(file: RecipeFile, out: Out = None, device: Device = AUTO_DEVICE) -> None:
    """Run all of a recipe; interrupted, the same command goes on.

    Each domain gets a specialist: fine-tuned on its tasks' own answers, then trained by what its replies are
    worth. What they write and is right teaches one model, which is then trained on all domains. Every stage's
    model answers the same held-out problems; recipe.html has them, and all curves.

    Example: [bold]fulmen recipe run examples/recipe-small.yaml --out out/recipe[/]
    """
    _run(recipe, file, out, device)


def specialize_command(file: RecipeFile, out: Out = None, device: Device = AUTO_DEVICE) -> None:
    """Train the specialists of a recipe, the first part of fulmen recipe run.

    Example: [bold]fulmen specialize examples/recipe-small.yaml --out out/recipe[/]
    """
    _run(specialize, file, out, device)


def distill_command(file: RecipeFile, out: Out = None, device: Device = AUTO_DEVICE) -> None:
    """Distil one model from the specialists of a recipe, training them first where they are missing.

    Example: [bold]fulmen distill examples/recipe-small.yaml --out out/recipe[/]
    """
    _run(distill, file, out, device)


def _run(call: Callable[..., "RecipeReport"], file: Path, out: Path | None, device: str) -> None:
    told, folder = reporter(), out or Path("out") / file.stem
    report = call(file, out=folder, device=device, reporter=told)
    for rows in (report.table(), report.difference_table(), report.sample_table()):
        if len(rows) > 1:
            print_table(rows)
    told.note(report.verdict())
    told.note(f"Wrote {folder / 'recipe.html'}, recipe.md and recipe.json beside it")
