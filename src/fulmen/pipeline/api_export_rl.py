"""export_rl, as `import fulmen` has it: what it is asked is checked before work is imported."""

from pathlib import Path

from fulmen.config import require_positive_int
from fulmen.pipeline.arguments import Place, path_argument, place_argument, refused
from fulmen.pipeline.reporter import Reporter, reporter_of

ENGINE_NAMES = ("slime", "skyrl", "prime-rl")


def export_rl(
    run: Place,
    *,
    to: str,
    out: Place,
    model: Place | None = None,
    steps: int | None = None,
    reporter: Reporter | None = None,
) -> Path:
    """Write what a trainer for many machines needs to do a run of `rl` over again.

    Problems as JSONL (prompts with ids, answers), a reward that asks fulmen's tasks, the run's settings in
    the engine's own words, and a launch script. What the engine does otherwise is said, and in `README.md`.

    Args:
        run: a directory that `rl` wrote.
        to: "slime", "skyrl" or "prime-rl".
        out: a new folder.
        model: what is to be trained, a model directory or hub name; None: what the run began with.
        steps: optimizer steps; None: as many as the run had.
        reporter: whom to tell what the engine lacks, as `fulmen.LineReporter()`; None: nobody.

    Returns:
        The folder.

    Raises:
        ConfigError: an engine that is not known, a task that was an object of a program, a model that is a
            GGUF file or has no chat template.
        CheckpointError: a directory that `rl` did not write, or a model that cannot be read.
        OutputError: `out` is not empty, or cannot be written.
    """
    if to not in ENGINE_NAMES:
        raise refused("to", to, f"choose from {', '.join(ENGINE_NAMES)}")
    if steps is not None:
        require_positive_int("steps", steps)
    given, place = path_argument("run", run).expanduser(), path_argument("out", out).expanduser()
    named = None if model is None else place_argument("model", model)
    reporter = reporter_of(reporter)
    with reporter.stage("Start"):
        from fulmen.pipeline.quiet import quiet
        from fulmen.pipeline.rl_export import export_run
    with quiet(reporter):
        return export_run(given, to, place, named, steps, reporter)
