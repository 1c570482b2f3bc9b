"""`NAME:key=value,…`: a task's name and its parameters."""

import ast
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fulmen.errors import ConfigError

_COMMA = re.compile(r",(?![^\[(]*[\])])")  # not within brackets
_WORDS = {"true": True, "false": False, "none": None}


def parse_parameters(spec: str, text: str) -> dict[str, Any]:
    """ "min_len=3,flag=true" as a dict of numbers, booleans, strings, lists and None.

    Raises ConfigError, which quotes `spec`.
    """
    parameters: dict[str, Any] = {}
    for part in _COMMA.split(text) if text else []:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key.isidentifier() and equals and value):
            raise ConfigError(f"task {spec!r}: {part!r} is no parameter; write NAME:key=value,key=value")
        if key in parameters:
            raise ConfigError(f"task {spec!r} has {key} twice; leave one out")
        parameters[key] = _value(value)
    return parameters


def checked_parameters(spec: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The given parameters, as kinds of value that the defaults have.

    Raises ConfigError for a parameter that is not among the defaults, and for one of another kind.
    """
    for key, value in given.items():
        if key not in defaults:
            known = ", ".join(f"{name}={default!r}" for name, default in defaults.items()) or "none"
            raise ConfigError(f"task {spec!r} has no parameter {key}{_meant(key, defaults)}; it has {known}")
        if not _is_alike(value, defaults[key]):
            kind = type(defaults[key]).__name__
            raise ConfigError(f"task {spec!r}: {key}={value!r} cannot be; give {kind}, as {defaults[key]!r}")
    return {
        key: type(defaults[key])(value) if isinstance(defaults[key], (float, tuple, list)) else value
        for key, value in given.items()
    }


def unknown_task(name: str, names: Iterable[str]) -> ConfigError:
    """The error for a name that no task has, with the names near it."""
    names = sorted(names)
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.5) or [one for one in names if name in one]
    meant = f"did you mean {', '.join(near[:5])}?" if near else f"there are {', '.join(names)}"
    return ConfigError(f"task {name!r} is not known; {meant}")


def _meant(key: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(names), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _is_alike(value: object, default: object) -> bool:
    if default is None:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, (int, float))
    if isinstance(default, (list, tuple)):
        return isinstance(value, (list, tuple))
    return isinstance(value, type(default))
