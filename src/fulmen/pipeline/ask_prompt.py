"""What a model is asked about a folder, and how its answer is read.

The documents come first, in the order of their paths, and the question last: the next question about the same
folder begins with the same bytes, which the server's prefix cache has.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from fulmen.agents.documents.citations import Quote
from fulmen.agents.documents.framing import RULE, framed
from fulmen.agents.documents.tools import TOOLS, tool_schema
from fulmen.endpoints import read_json

_HOW = (
    "Answer from the documents alone. If they do not have the answer, say so. For what you say, give quotes: "
    f"words copied exactly from a document, one sentence or line each. {RULE}"
)
WHOLE = f"You answer questions about documents, all of which are given to you. {_HOW}"
BY_TOOLS = (
    "You answer questions about a folder of documents. Look for what you need with the tools, one at a time: "
    "search by words, grep by pattern, open to read, list to see what there is; call answer when you know. "
    f"{_HOW}"
)
IN_TEXT = "\n\nWrite the answer. Below it, write each quote on a line of its own, as: QUOTE [file] words"
NO_CALL = "Call a tool, or answer."
ANSWER = "answer"
_ANSWER_SCHEMA = {
    "type": "object",
    "properties": {
        "quotes": {
            "type": "array",
            "maxItems": 8,
            "items": {
                "type": "object",
                "properties": {
                    "file": {"type": "string", "description": "The document's path"},
                    "quote": {"type": "string", "description": "Words copied exactly from it"},
                },
                "required": ["file", "quote"],
                "additionalProperties": False,
            },
        },
        "answer": {"type": "string", "description": "The answer to the question"},
    },
    "required": ["quotes", "answer"],
    "additionalProperties": False,
}
_QUOTE_LINE = re.compile(r"^\W{0,3}QUOTE \[(.+?)\]:? (.+)$", re.MULTILINE)
# What may end JSON that was cut in the answer, which is last in it.
_ENDS = ('"}', "}")


class Written(NamedTuple):
    """A model's answer as it wrote it; nothing is checked yet."""

    text: str
    quotes: tuple[Quote, ...]


def documents_text(documents: Iterable[tuple[str, str]]) -> str:
    """All documents (path, text), framed, one after the other."""
    return "\n".join(framed(path, text) for path, text in documents)


def whole_messages(documents: str, question: str) -> list[dict[str, Any]]:
    """The messages of a question about documents that are all given."""
    return [
        {"role": "system", "content": WHOLE},
        {"role": "user", "content": f"{documents}\nQuestion: {question}"},
    ]


def tool_messages(question: str, overview: str) -> list[dict[str, Any]]:
    """The messages that a search begins with. overview: what there is, in a line."""
    content = f"{overview}\n\nQuestion: {question}"
    return [{"role": "system", "content": BY_TOOLS}, {"role": "user", "content": content}]


def answer_tools() -> dict[str, Any]:
    """Fields of a request that has to be answered with a call of `answer`."""
    tools = [_function(ANSWER, "Give the answer, with quotes.", _ANSWER_SCHEMA)]
    return {"tools": tools, "tool_choice": {"type": "function", "function": {"name": ANSWER}}}


def search_tools(choice: str) -> dict[str, Any]:
    """Fields of a request that may call all tools. choice: "required", "auto", or the name of one tool."""
    answered = answer_tools()
    tools = [_function(name, TOOLS[name][0], tool_schema(name)) for name in TOOLS]
    is_name = choice not in ("required", "auto")
    named = {"type": "function", "function": {"name": choice}} if is_name else choice
    # Where calls are forced a small model may go on calling to the end of its room.
    single = {} if choice == "auto" else {"parallel_tool_calls": False}
    return {"tools": [*tools, *answered["tools"]], "tool_choice": named, **single}


def is_answer(name: str) -> bool:
    """Whether a call is the one that ends a search."""
    return name == ANSWER


def written_as_call(arguments: str, is_cut: bool) -> Written | None:
    """The answer in a call's arguments, also in part if they were cut; None if there is none."""
    for end in ("", *(_ENDS if is_cut else ())):
        try:
            found = read_json(arguments.rstrip("\\") + end)
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("answer"), str):
            quotes = found.get("quotes") or []
            listed = quotes if isinstance(quotes, list) else [quotes]
            return Written(found["answer"].strip(), tuple(map(_quote, listed)))
    return None


def written_as_text(text: str) -> Written:
    """The answer in plain text, with lines of quotes below."""
    quotes = tuple(Quote(file.strip(), words) for file, words in _QUOTE_LINE.findall(text))
    return Written(_QUOTE_LINE.sub("", text).strip(), quotes)


def _quote(found: Any) -> Quote:
    """A quote; what is none in form is looked up as it stands, so that it is told if it is dropped."""
    if isinstance(found, dict) and isinstance(found.get("quote"), str):
        return Quote(str(found.get("file") or ""), found["quote"])
    return Quote("", str(found))


def _function(name: str, description: str, parameters: dict[str, Any]) -> dict[str, Any]:
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}
