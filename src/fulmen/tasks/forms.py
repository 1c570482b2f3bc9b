"""The form in which a task asks for its answer, and where an answer may be found in a reply."""

import json
import re

ASKED = "Give the final answer, and nothing else, between <answer> and </answer>."
_INSIDE = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_TAG = re.compile(r"</?answer>")
# What people put around an answer within a line.
_MARKED = re.compile(r"\*\*(.+?)\*\*|`(.+?)`|\"(.+?)\"|\\boxed\{(.+?)\}")
_AFTER = re.compile(r".*(?::|=|\bis\b)(.*)")
_EDGES = " \t.,;:!?*`'\"$()"


def in_form(answer: str) -> str:
    """An answer as the reply that is asked for."""
    return f"<answer>{answer}</answer>"


def without_thinking(reply: str) -> str:
    """What follows the reasoning of a model that thinks; all of the reply, if nothing ends its reasoning."""
    return reply.rpartition("</think>")[2]


def inside_form(reply: str) -> str | None:
    """What stands in the last answer's form; None without one. An earlier guess does not count."""
    found = _INSIDE.findall(without_thinking(reply))
    return found[-1].strip() if found else None


def first_list(text: str) -> str:
    """The first JSON list of objects that stands anywhere in a text; empty without one."""
    start = text.find("[{")
    if start < 0:
        return ""
    try:
        return text[start : json.JSONDecoder().raw_decode(text, start)[1]]
    except (ValueError, RecursionError):
        return ""


def candidates(reply: str) -> list[str]:
    """Where a lenient reader finds an answer: the reply, and pieces of its first and its last line."""
    text = _TAG.sub("\n", without_thinking(reply)).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = [text]
    for line in dict.fromkeys([*lines[:1], *lines[-1:]]):
        words = line.split()
        found += [line, words[0], words[-1]]
        found += [piece for marked in _MARKED.findall(line) for piece in marked if piece]
        found += [match.group(1) for match in [_AFTER.match(line)] if match]
    return list(dict.fromkeys(piece for one in found for piece in (one.strip(), one.strip(_EDGES)) if piece))
