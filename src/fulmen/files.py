"""Files and folders written atomically: a temporary one beside the target takes its place when whole."""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fulmen.errors import unwritable


def atomic_write(target: Path, write: Callable[[Path], Any], *, mode: int | None = None) -> None:
    """Let `write` fill a temporary file beside `target`, then put that in its place.

    What fails leaves the old file as it was, and nothing beside it.

    Args:
        mode: permissions; None: as the umask has them, whatever `write` makes of the file.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        temporary.unlink(missing_ok=True)
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode))
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: str | Path, content: str | bytes, *, mode: int | None = None) -> Path:
    """Write a text (UTF-8) or bytes atomically, to the disk itself; the folder is made if it is missing.

    Raises OutputError, with the reason, if `path` cannot be written.
    """
    target = Path(path).expanduser()

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(target, write, mode=mode)
    except OSError as error:
        raise unwritable(target, error) from error
    return target


def write_folder(path: str | Path, texts: Mapping[str, str]) -> Path:
    """Write a new folder of text files (UTF-8), whole or not at all.

    Args:
        path: not there yet, or an empty folder.
        texts: by the name of their file.

    Raises OutputError, with the reason, if `path` cannot be written.
    """
    target = Path(path).expanduser()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
            made = Path(temporary) / target.name
            made.mkdir()
            for name, text in texts.items():
                (made / name).write_text(text, encoding="utf-8")
            if target.exists():
                target.rmdir()
            made.rename(target)
    except OSError as error:
        raise unwritable(target, error) from error
    return target
