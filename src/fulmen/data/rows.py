"""Rows of data sets: where their text is, what is no text, and which part of the split a row belongs to."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fulmen.data.documents import SHARES, Document
from fulmen.errors import CorpusError

# The longest novels have 3 to 4 million characters: what is longer is no document, but a dump of many, which
# would fill hundreds of sequences in a row.
HUGE_CHARACTERS = 5_000_000
EMPTY, NO_TEXT, HUGE = "empty", "not text", f"over {HUGE_CHARACTERS:,} characters"


def text_field(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """Where the text is: "text", else "messages", else the only field that holds strings.

    Raises:
        CorpusError: several fields hold strings, or none does.
    """
    for known in ("text", "messages"):
        if any(known in row for row in rows):
            return known
    strings = sorted({field for row in rows for field, value in row.items() if isinstance(value, str)})
    if len(strings) != 1:
        have = f"several fields of strings ({', '.join(strings)})" if strings else "no field of strings"
        raise CorpusError(f"{name} has {have} and no field 'text'; rename the one with the text to 'text'")
    return strings[0]


def row_document(name: str, value: Any, skipped: Counter[str]) -> Document | None:
    """The text in a row's field, a conversation as plain turns; None where `skipped` counts why not."""
    text = _conversation(value) if isinstance(value, list) else value
    if not isinstance(text, str):
        skipped[NO_TEXT] += 1
    elif not text.strip():
        skipped[EMPTY] += 1
    elif len(text) > HUGE_CHARACTERS:
        skipped[HUGE] += 1
    else:
        return Document(name, "chat" if isinstance(value, list) else "prose", text)
    return None


def described(skipped: Mapping[str, int]) -> str:
    """`5 skipped: 3 empty, 2 not text`, for one line to the user."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
    return f"{sum(skipped.values()):,} skipped: {reasons or 'none'}"


def part_of(text: str) -> str:
    """The part of the split that a row belongs to, whatever other rows there are: by the SHA-256 of its text.

    A text that comes twice, in any data set, is in one part.
    """
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    place = int.from_bytes(digest[:8]) / 2**64
    for part, share in SHARES.items():
        place -= share
        if place < 0:
            return part
    return part


def _conversation(messages: list[Any]) -> str | None:
    """Chat messages as plain text, `role: content`; the parts of a content that are no text are left out."""
    turns = [
        (message.get("role", ""), message.get("content")) for message in messages if isinstance(message, dict)
    ]
    lines = []
    for role, content in turns:
        if isinstance(content, list):
            content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
        if isinstance(content, str) and content:
            lines.append(f"{role}: {content}")
    return "\n\n".join(lines) + "\n" if lines else None
