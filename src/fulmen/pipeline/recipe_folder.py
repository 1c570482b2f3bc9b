"""The folder of a recipe's run: a record of each stage, with which it is skipped or refused the next time."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fulmen.errors import OutputError, ResumeError, unwritable
from fulmen.evaluation.report_files import write_json
from fulmen.pipeline.reporter import Reporter
from fulmen.pipeline.run_dir import RunDir

RECORDS = "stages"
# The record that is of no stage.
RECIPE = "recipe"


class RecipeFolder:
    """Stages by name, as "spelling/rl", in one folder."""

    def __init__(self, path: Path) -> None:
        """Raises OutputError if the folder cannot be made, or has something else in it."""
        self.path = path.expanduser().absolute()
        try:
            # Folders of a user's own might be taken for stages that are done.
            if self.path.exists() and any(self.path.iterdir()) and not (self.path / RECORDS).is_dir():
                raise OutputError(
                    f"{self.path} has files, and is no recipe's folder; name another one", arguments=["out"]
                )
            (self.path / RECORDS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.path, error) from error

    def model(self, stage: str) -> Path:
        """Where a stage's model is."""
        return self.path / stage

    def record(self, stage: str) -> dict[str, Any] | None:
        """What is known of a stage; None before it begins."""
        file = self._file(stage)
        found: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        return found

    def belong_to(self, recipe: Mapping[str, Any]) -> None:
        """Write down whose folder it is. Raises ResumeError if it is another recipe's."""
        asked, before = json.loads(json.dumps(recipe)), self.record(RECIPE)
        if before is None:
            write_json(asked, self._file(RECIPE))
        elif changes := _changes(asked, before):
            raise ResumeError(
                f"{self.path} is of another recipe ({changes}); use that one again, or another out",
                arguments=["out"],
            )

    def run(
        self,
        stage: str,
        settings: Mapping[str, Any],
        work: Callable[[], Any],
        reporter: Reporter,
        traces: Sequence[Path] = (),
    ) -> Any:
        """What `work` returned for the stage, now or in an earlier run; plain JSON types.

        Args:
            traces: what half of the work leaves behind, from which it would go on.

        Raises ResumeError if the stage is done, or half done, with other settings.
        """
        asked, before = json.loads(json.dumps(settings)), self.record(stage)
        if before is not None:
            # A stage that failed at once, as for a setting that cannot be, may be begun with another.
            if before["done"] or any(trace.exists() for trace in traces):
                self._require_same(stage, asked, before["settings"])
            if before["done"]:
                reporter.note(f"{stage}: done before")
                return before["result"]
        write_json({"settings": asked, "done": False}, self._file(stage))
        result = work()
        write_json({"settings": asked, "done": True, "result": result}, self._file(stage))
        return result

    def make_model(
        self, stage: str, settings: Mapping[str, Any], make: Callable[[Path], None], reporter: Reporter
    ) -> Path:
        """A stage that writes a model directory, whole or not at all; where it is."""
        place = self.model(stage)

        def work() -> None:
            # Killed after the model was moved into its place, and before the record said so.
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                make(place)

        record = self.record(stage)
        if record is not None and record["done"] and not place.exists():
            write_json({"settings": record["settings"], "done": False}, self._file(stage))
        self.run(stage, settings, work, reporter, (place, RunDir(place).path))
        return place

    def _file(self, stage: str) -> Path:
        return self.path / RECORDS / f"{stage.replace('/', '.')}.json"

    def _require_same(self, stage: str, asked: Mapping[str, Any], before: Mapping[str, Any]) -> None:
        if changes := _changes(asked, before):
            raise ResumeError(
                f"stage {stage} of {self.path} was begun with other settings ({changes}); "
                "use those again, or another out",
                arguments=["out"],
            )


def _changes(asked: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """What is not as it was, in words; empty if everything is."""
    changed = sorted(key for key in asked.keys() | before.keys() if asked.get(key) != before.get(key))
    return ", ".join(f"{key} was {before.get(key)!r}, is {asked.get(key)!r}" for key in changed)[:400]
