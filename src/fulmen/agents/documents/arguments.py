"""Arguments of a tool as a model or a client sent them: checked, and put right where the meaning is plain."""

import re
from typing import Any

from fulmen.errors import DocumentError

_TYPES = {"integer": int, "string": str, "boolean": bool}


def checked_arguments(arguments: Any, schema: dict[str, Any]) -> dict[str, Any]:
    """The arguments that fit a schema of strings, integers and booleans; null counts as not given.

    A number that came as a string is taken as one. Raises DocumentError that names the argument.
    """
    if not isinstance(arguments, dict):
        raise DocumentError(f"arguments={str(arguments)[:80]!r} are no JSON object; send one")
    given = {name: value for name, value in arguments.items() if value is not None}
    known = schema["properties"]
    if unknown := [name for name in given if name not in known]:
        raise DocumentError(f"argument {unknown[0][:80]!r} is none; use {', '.join(known)}")
    if missing := [name for name in schema["required"] if name not in given]:
        raise DocumentError(f"argument {missing[0]!r} is missing")
    return {name: _checked(name, value, known[name]) for name, value in given.items()}


def _checked(name: str, value: Any, schema: dict[str, Any]) -> Any:
    kind = schema["type"]
    if kind == "integer" and isinstance(value, str) and re.fullmatch(r"\s*-?[0-9]{1,12}\s*", value):
        value = int(value)
    fits = isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))
    if not fits:
        raise DocumentError(f"{name}={str(value)[:80]!r} cannot be; it is of type {kind}")
    if kind == "string":
        _require_text(name, value)
    if kind == "integer" and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        limits = f"at least {schema['minimum']}" + (
            f" and at most {schema['maximum']}" if "maximum" in schema else ""
        )
        raise DocumentError(f"{name}={value} cannot be; it is {limits}")
    return value


def _require_text(name: str, value: str) -> None:
    """Raises DocumentError for half a surrogate pair, which JSON can spell and no document has."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DocumentError(f"{name}={value[:80]!r} is no Unicode text; correct it") from error
