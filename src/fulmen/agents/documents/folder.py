"""The files of a folder, and nothing outside it.

Each file is opened below the descriptor of its own folder, and no symbolic link is followed: what somebody
swaps for a link while we read is refused, not read.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fulmen.errors import DocumentError

MAX_DEPTH = 64
HIDDEN = "hidden (the name begins with a dot)"
LINK = "a symbolic link"


@dataclass(frozen=True)
class PassedOver:
    """A file or folder that is not read. path: as in the folder, with `/`. reason: in a few words."""

    path: str
    reason: str


@dataclass(frozen=True)
class FolderFile:
    """A regular file. path: relative to the folder, with `/`. `opened` works until the walk goes on."""

    path: str
    status: os.stat_result
    folder_descriptor: int

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The file, for reading. Raises OSError, also for what is no regular file any more."""
        # A pipe that took the file's place would block without O_NONBLOCK.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(self.path.rpartition("/")[2], flags, dir_fd=self.folder_descriptor)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(0, "is no file any more")
            yield file


def require_folder(folder: str | Path) -> Path:
    """The folder's real path. Raises DocumentError if it is none, or cannot be listed."""
    try:
        found = Path(folder).expanduser().resolve(strict=True)
        with os.scandir(found):
            return found
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DocumentError(
            f"folder {str(folder)!r} cannot be read ({reason}); name a folder of documents"
        ) from error


def walk(folder: Path) -> Iterator[FolderFile | PassedOver]:
    """All files below a folder in the order of their paths' parts, and what is passed over.

    Raises OSError if `folder` itself cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield from _walk_below(descriptor, "", 0)
    finally:
        os.close(descriptor)


def _walk_below(descriptor: int, prefix: str, depth: int) -> Iterator[FolderFile | PassedOver]:
    with os.scandir(descriptor) as listing:
        entries = sorted(listing, key=lambda entry: entry.name)
    for entry in entries:
        path = prefix + entry.name
        try:
            if reason := _reason_against(entry, depth):
                yield PassedOver(_readable_name(path), reason)
            elif entry.is_dir(follow_symlinks=False):
                yield from _walk_into(entry.name, descriptor, f"{path}/", depth)
            else:
                yield FolderFile(path, entry.stat(follow_symlinks=False), descriptor)
        except OSError as error:
            yield PassedOver(_readable_name(path), f"cannot be read ({error.strerror})")


def _walk_into(name: str, parent: int, path: str, depth: int) -> Iterator[FolderFile | PassedOver]:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, dir_fd=parent)
    try:
        yield from _walk_below(descriptor, path, depth + 1)
    finally:
        os.close(descriptor)


def _reason_against(entry: "os.DirEntry[str]", depth: int) -> str:
    """Why an entry is not read; nothing for files and folders that are."""
    if entry.name.startswith("."):
        return HIDDEN
    if entry.is_symlink():
        return LINK
    if _readable_name(entry.name) != entry.name:
        return "a name that cannot be written"
    if entry.is_dir(follow_symlinks=False):
        return "" if depth < MAX_DEPTH else f"deeper than {MAX_DEPTH} folders"
    return "" if entry.is_file(follow_symlinks=False) else "no regular file"


def _readable_name(path: str) -> str:
    text = os.fsencode(path).decode("utf-8", "replace")
    return "".join(letter if letter.isprintable() else "�" for letter in text)
