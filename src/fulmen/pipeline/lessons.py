"""Chats with the reply to learn: a lesson each, and files of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fulmen.errors import CorpusError
from fulmen.pipeline.verify_rows import Row, read_rows

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Lesson:
    """A prompt and the reply to learn."""

    messages: list[dict[str, Any]]
    reply: str


def read_lessons(path: Path) -> list[Lesson]:
    """The chats of JSON lines with `messages`, of which the last reply is learned.

    Raises CorpusError for a file, or a row by its number, that has none.
    """
    return [_lesson(f"{path}: row {number}", row) for number, row in enumerate(read_rows(path), 1)]


def _lesson(where: str, row: Row) -> Lesson:
    messages = row.get("messages")
    if not isinstance(messages, list) or len(messages) < 2 or not all(map(_is_message, messages)):
        raise CorpusError(
            f"{where} has no chat; it needs messages, a list of two or more, each with a role "
            f"({', '.join(ROLES)}) and a content that is text"
        )
    if messages[-1]["role"] != "assistant":
        raise CorpusError(f"{where} ends with no reply to learn; its last message must be the assistant's")
    asked = [{"role": one["role"], "content": one["content"]} for one in messages[:-1]]
    return Lesson(asked, messages[-1]["content"])


def _is_message(message: object) -> bool:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        return False
    content = message.get("content")
    return isinstance(content, str) and bool(content.strip())
