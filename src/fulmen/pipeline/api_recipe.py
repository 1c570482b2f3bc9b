"""recipe, specialize and distill, as `import fulmen` has them: checked before work is imported."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulmen.pipeline.arguments import Place, path_argument
from fulmen.pipeline.recipe_settings import read_recipe
from fulmen.pipeline.reporter import Reporter, reporter_of
from fulmen.pipeline.settings import AUTO_DEVICE

if TYPE_CHECKING:
    import torch

    from fulmen.evaluation.recipe.report import RecipeReport


def recipe(
    recipe: Place | Mapping[str, Any],
    *,
    out: Place,
    device: "str | torch.device" = AUTO_DEVICE,
    reporter: Reporter | None = None,
) -> "RecipeReport":
    """Run a recipe of post-training: specialists, one model distilled from them, mixed RL over all domains.

    `out` gets a model directory for each stage, `recipe.json`, `recipe.md` and `recipe.html`, which has the
    curves of all stages. Interrupted, the same call goes on; stages that are done are not done again.

    Args:
        recipe: a YAML file, or a mapping with the same keys (docs/recipe.md).
        out: the folder of the run.
        device: where to compute, as "cpu" or "cuda"; "auto": on a GPU if torch sees one.
        reporter: whom to tell how far it is, as `fulmen.LineReporter()`; None: nobody.

    Raises:
        ConfigError: a key or value of the recipe that cannot be, or a task that is not known.
        ResumeError: a stage in `out` was begun with other settings.
        FulmenError: every error of `convert` and `rl`.
    """
    return _run(recipe, out, device, reporter, "all")


def specialize(
    recipe: Place | Mapping[str, Any],
    *,
    out: Place,
    device: "str | torch.device" = AUTO_DEVICE,
    reporter: Reporter | None = None,
) -> "RecipeReport":
    """The first part of a recipe: a specialist for each domain.

    Args:
        recipe: as `recipe` takes it.
        out: the folder of the run; `recipe` with the same one goes on from there.
        device: where to compute; "auto": on a GPU if torch sees one.
        reporter: whom to tell how far it is; None: nobody.

    Raises:
        FulmenError: every error of `recipe`.
    """
    return _run(recipe, out, device, reporter, "specialists")


def distill(
    recipe: Place | Mapping[str, Any],
    *,
    out: Place,
    device: "str | torch.device" = AUTO_DEVICE,
    reporter: Reporter | None = None,
) -> "RecipeReport":
    """A recipe up to the distilled model, specialists first if need be.

    Args:
        recipe: as `recipe` takes it.
        out: the folder of the run; `recipe` with the same one goes on from there.
        device: where to compute; "auto": on a GPU if torch sees one.
        reporter: whom to tell how far it is; None: nobody.

    Raises:
        FulmenError: every error of `recipe`.
    """
    return _run(recipe, out, device, reporter, "distilled")


def _run(
    recipe: Place | Mapping[str, Any],
    out: Place,
    device: "str | torch.device",
    reporter: Reporter | None,
    until: str,
) -> "RecipeReport":
    settings = read_recipe(
        recipe if isinstance(recipe, Mapping) else path_argument("recipe", recipe, "a YAML file")
    )
    place, told = Path(path_argument("out", out)), reporter_of(reporter)
    with told.stage("Start"):
        from fulmen.pipeline.devices import training_device
        from fulmen.pipeline.quiet import quiet
        from fulmen.pipeline.recipe import RecipeRun
        from fulmen.pipeline.recipe_stages import RecipeStages
    with quiet(told):
        return RecipeRun(settings, place, training_device(device), told, RecipeStages()).run(until)
