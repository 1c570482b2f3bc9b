"""The four tools over an index: what each takes, and what it answers, in text that a model reads.

Every answer says how much there is beyond what it shows, and how to get it: nothing is cut silently.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from fulmen.agents.documents.arguments import checked_arguments
from fulmen.agents.documents.framing import framed, span_text
from fulmen.agents.documents.grep import TIME_LIMIT_S, compiled, grep
from fulmen.agents.documents.index import Document, DocumentIndex
from fulmen.agents.documents.passages import span_of
from fulmen.errors import DocumentError

# Characters of an answer, and of one line in it.
RESULT_LIMIT, LINE_LIMIT = 16_000, 400
LIST_ROWS, SEARCH_PASSAGES, GREP_LINES, NAMED_FILES = 200, 8, 100, 20
_GLOB = {"type": "string", "description": "Only documents whose path fits, as docs/*.md"}

# Name, what it is for, and the arguments: JSON schemas for MCP and for OpenAI's tools alike.
TOOLS: dict[str, tuple[str, dict[str, Any]]] = {
    "list": (
        "List the documents: path, lines, characters; and the files that cannot be read, with the reason.",
        {"glob": _GLOB, "start": {"type": "integer", "minimum": 1, "description": "First row to show"}},
    ),
    "search": (
        "Find passages by words (BM25): the best first, with file and lines. No operators, just words.",
        {
            "query": {"type": "string", "description": "Words that the passage should have"},
            "glob": _GLOB,
            "limit": {"type": "integer", "minimum": 1, "maximum": 50, "description": "8 if not given"},
        },
    ),
    "open": (
        "Read a document from a line on, or from a character on; long ones in parts.",
        {
            "path": {"type": "string", "description": "As list and search write it"},
            "first_line": {"type": "integer", "minimum": 1, "description": "From 1"},
            "last_line": {"type": "integer", "minimum": 1, "description": "Included"},
            "first_character": {"type": "integer", "minimum": 0, "description": "From 0, in place of lines"},
            "end_character": {"type": "integer", "minimum": 1, "description": "Not included"},
        },
    ),
    "grep": (
        "Find lines by a regular expression (Python's syntax), with file and line number.",
        {
            "pattern": {"type": "string", "description": "^ and $ are a line's ends"},
            "glob": _GLOB,
            "ignore_case": {"type": "boolean"},
        },
    ),
}
_REQUIRED = {"search": ["query"], "open": ["path"], "grep": ["pattern"]}


def tool_schema(name: str) -> dict[str, Any]:
    """A tool's arguments as a JSON schema."""
    return {
        "type": "object",
        "properties": TOOLS[name][1],
        "required": _REQUIRED.get(name, []),
        "additionalProperties": False,
    }


class DocumentTools:
    """Answers calls of the tools from an index, which is refreshed before each.

    Args:
        index: of the folder.
        result_limit: characters that an answer may have, but for its last lines on what is not shown.
    """

    def __init__(self, index: DocumentIndex, result_limit: int = RESULT_LIMIT) -> None:
        self._index, self._limit = index, result_limit
        self._methods: dict[str, Callable[..., str]] = {
            "list": self._list,
            "search": self._search,
            "open": self._open,
            "grep": self._grep,
        }

    def call(self, name: str, arguments: Any) -> str:
        """A tool's answer.

        Raises DocumentError for a tool or an argument that is none, a document that is not there, a folder
        that cannot be read any more.
        """
        if name not in TOOLS:
            raise DocumentError(f"tool {name[:80]!r} is none; call one of {', '.join(TOOLS)}")
        taken = checked_arguments(arguments, tool_schema(name))
        self._index.refresh()
        return self._methods[name](**taken)

    def _list(self, glob: str = "*", start: int = 1) -> str:
        documents = self._index.documents(glob)
        if start > max(1, len(documents)):
            raise DocumentError(f"start={start} cannot be; there are {len(documents):,} documents")
        lines: list[str] = []
        # Half of the room: files that are not read follow.
        while (
            len(lines) < min(LIST_ROWS, len(documents) - start + 1) and sum(map(len, lines)) < self._limit / 2
        ):
            one = documents[start - 1 + len(lines)]
            remark = f" ({one.remark})" if one.remark else ""
            lines.append(f"{one.path}  {one.lines:,} lines, {one.characters:,} characters{remark}")
        head, end = f"{len(documents):,} documents", start - 1 + len(lines)
        if len(lines) < len(documents):
            head += f", {start:,} to {end:,} shown"
        if end < len(documents):
            head += f"; go on with start={end + 1}"
        return _within_limit([head, *lines, *passed_over_lines(self._index)], self._limit)

    def _search(self, query: str, glob: str = "*", limit: int = SEARCH_PASSAGES) -> str:
        found = self._index.search(query, glob, limit)
        if not found:
            self._fitting(glob)
            return "no passage has any of these words; try others, or grep"
        parts, left_out, size = [], [], 0
        for one in found:
            part = framed(one.path, one.text, one.span)
            size += len(part)
            if size <= self._limit:
                parts.append(part)
            else:
                left_out.append(f"not shown for length: {one.path}, {span_text(one.span)}")
        return "\n".join([f"{len(found)} passages, best first", *parts, *left_out])

    def _fitting(self, glob: str) -> list[Document]:
        """The documents whose path fits. Raises DocumentError, with paths that there are, if none does."""
        if fitting := self._index.documents(glob):
            return fitting
        there = _named([one.path for one in self._index.documents()]) or "none"
        raise DocumentError(f"no document's path fits glob={glob!r:.80}; leave glob out. There are: {there}")

    def _open(
        self,
        path: str,
        first_line: int | None = None,
        last_line: int | None = None,
        first_character: int | None = None,
        end_character: int | None = None,
    ) -> str:
        by_lines, by_characters = (first_line, last_line), (first_character, end_character)
        if any(by_lines) and by_characters != (None, None):
            raise DocumentError("give lines or characters, not both")
        path = path.removeprefix("./")
        text = self._index.text(path)
        if any(by_lines):
            begin, end = _characters_of_lines(text, first_line or 1, last_line)
        else:
            begin, end = first_character or 0, min(end_character or len(text), len(text))
        if begin >= end:
            lines = text.count("\n") + (not text.endswith("\n"))
            raise DocumentError(
                f"path={path!r} has nothing there; it has {lines:,} lines, {len(text):,} characters"
            )
        return _opened(path, text, begin, min(end, _cut(text, begin, self._limit)))

    def _grep(self, pattern: str, glob: str = "*", ignore_case: bool = False) -> str:
        search = compiled(pattern, ignore_case)
        paths = [one.path for one in self._fitting(glob)]
        result = grep(paths, self._index.text, search, GREP_LINES)
        by_path: dict[str, list[str]] = {}
        size, shown = 0, 0
        for match in result.matches:
            line = f"{match.line}: {_line_within_limit(match.text)}\n"
            size += len(line)
            if size > self._limit:
                break
            by_path.setdefault(match.path, []).append(line)
            shown += 1
        parts = [framed(path, "".join(lines)) for path, lines in by_path.items()]
        if left := len(result.matches) - shown:
            parts.append(f"not shown for length: {left} more lines; narrow the pattern")
        if result.unread:
            reason = f"{TIME_LIMIT_S:g} s" if result.is_out_of_time else f"{GREP_LINES} lines"
            parts.append(f"ended after {reason}; not searched to the end: {_named(result.unread)}")
        return "\n".join([f"{len(result.matches)} lines found in {len(paths)} documents", *parts])


def passed_over_lines(index: DocumentIndex) -> list[str]:
    """One line for each reason why files are no documents: how many, and which."""
    passed_over = index.passed_over()
    counts = Counter(one.reason for one in passed_over)
    return [
        f"not read, {reason}: {count:,} ({_named([one.path for one in passed_over if one.reason == reason])})"
        for reason, count in counts.most_common()
    ]


def _named(paths: list[str]) -> str:
    more = len(paths) - NAMED_FILES
    return ", ".join(paths[:NAMED_FILES]) + (f" and {more:,} more" if more > 0 else "")


def _cut(text: str, begin: int, limit: int) -> int:
    """Where an answer that begins there has to end: at the end of a line, if there is one."""
    if len(text) - begin <= limit:
        return len(text)
    return text.rfind("\n", begin, begin + limit) + 1 or begin + limit


def _opened(path: str, text: str, begin: int, end: int) -> str:
    shown = framed(path, text[begin:end], span_of(text, begin, end))
    if end == len(text):
        return f"{shown}This is the end of the document."
    return f"{shown}The document has {len(text):,} characters; go on with first_character={end}"


def _characters_of_lines(text: str, first: int, last: int | None) -> tuple[int, int]:
    lengths = [len(line) + 1 for line in text.split("\n")]
    begin = sum(lengths[: first - 1])
    return begin, min(begin + sum(lengths[first - 1 : last]), len(text))


def _line_within_limit(line: str) -> str:
    more = len(line) - LINE_LIMIT
    return line if more <= 0 else f"{line[:LINE_LIMIT]} [{more:,} more characters]"


def _within_limit(lines: Iterable[str], limit: int) -> str:
    """Lines as one text, those beyond the limit counted at its end."""
    shown: list[str] = []
    size, left_out = 0, 0
    for line in lines:
        size += len(line) + 1
        if size <= limit:
            shown.append(line)
        else:
            left_out += 1
    return "\n".join([*shown, f"not shown for length: {left_out:,} more entries"] if left_out else shown)
