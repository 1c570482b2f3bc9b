"""The directory of a run beside its output: what is needed to go on after an interruption."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fulmen.errors import ResumeError, unwritable
from fulmen.files import atomic_write

SETTINGS_FILE = "settings.json"


class RunDir:
    """`.NAME.run` beside the output NAME: the settings it belongs to and one file per finished stage."""

    def __init__(self, out: Path) -> None:
        out = out.expanduser().absolute()
        self.path = out.with_name(f".{out.name}.run")

    def open(self, settings: dict[str, Any], *, discard_other: bool) -> bool:
        """Begin or resume; return whether there is something to resume.

        Raises:
            ResumeError: a run with other settings lies there, and `discard_other` is not set.
            OutputError: the directory cannot be made.
        """
        file = self.path / SETTINGS_FILE
        if file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))
            mismatched = sorted(
                key for key in settings.keys() | before.keys() if settings.get(key) != before.get(key)
            )
            if not mismatched:
                return True
            if not discard_other:
                changes = ", ".join(
                    f"{key} was {before.get(key)!r}, is {settings.get(key)!r}" for key in mismatched
                )
                raise ResumeError(
                    f"{self.path} holds an unfinished run with other settings ({changes}); "
                    "use those settings again, remove the directory, or pass overwrite",
                    arguments=["overwrite"],
                )
        self.remove()
        try:
            self.path.mkdir(parents=True)
            atomic_write(
                file, lambda temporary: temporary.write_text(json.dumps(settings, indent=1), encoding="utf-8")
            )
        except OSError as error:
            raise unwritable(self.path, error) from error
        return False

    def settings(self) -> dict[str, Any]:
        """Those of the run that lies there; none if there is no run."""
        file = self.path / SETTINGS_FILE
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return kept

    def stage(self, name: str) -> Path:
        """The file with the indexers after a stage."""
        return self.path / f"{name}.safetensors"

    def save_stage(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write the indexers after a stage, whole or not at all. Raises OutputError."""
        plain = {key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}
        try:
            atomic_write(self.stage(name), lambda temporary: save_file(plain, temporary))
        except Exception as error:
            raise unwritable(self.stage(name), error) from error

    def save_record(self, name: str, record: Any) -> None:
        """Write what is to be said about a stage, as JSON, whole or not at all. Raises OutputError."""
        text, file = json.dumps(record, indent=1) + "\n", self.record(name)
        try:
            atomic_write(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        except OSError as error:
            raise unwritable(file, error) from error

    def record(self, name: str) -> Path:
        """The file of `save_record`."""
        return self.path / f"{name}.json"

    def load_done(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """Indexers and record after a stage; None if it is not finished."""
        if not (self.stage(name).exists() and self.record(name).exists()):
            return None
        return load_file(self.stage(name)), json.loads(self.record(name).read_text(encoding="utf-8"))

    def remove(self) -> None:
        """Delete the run; the output is in place, or it is to begin anew."""
        shutil.rmtree(self.path, ignore_errors=True)
