"""A request's JSON, read once and within bounds, before anything looks at what it says.

Python's `json` takes halves of surrogate pairs, NaN, and numbers of any length, and all of these break
something further on: text that cannot be encoded, bodies for the engine that are no JSON. Lists of lists in
millions are small as text and take seconds to build, during which no other stream goes on.
"""

import json
import math
import re
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from fulmen.serving.gateway.errors import ApiError

# Values between commas: token ids of the longest contexts. Parts: lists, objects, and members of objects.
MOST_VALUES, MOST_PARTS = 2**21, 100_000
# Bodies up to here are searched for the field that is to blame; in larger ones the place is told.
EXPLAINED_BYTES = 2**20
INTEGER_BITS = 64
_JSON_TYPE = re.compile(r"application/(?:[\w.+-]+\+)?json", re.IGNORECASE)
_LONG_NUMBER = re.compile(rb"[0-9](?:[0-9]{18}|[eE]\+?[0-9]{3})")
_SURROGATE = re.compile("[\ud800-\udfff]")


class JsonRoute(APIRoute):
    """A route that takes its body as `read_json` reads it, or refuses it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As the base class."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def read_and_handle(request: Request) -> Response:
            strict = _JsonRequest(request.scope, request.receive)
            _require_json(strict)
            await strict.json()
            return await handle(strict)

        return read_and_handle


class _JsonRequest(Request):
    _read: Any = None

    async def json(self) -> Any:
        """The body, read once."""
        if self._read is None:
            self._read = read_json(await self.body())
        return self._read


def _require_json(request: Request) -> None:
    kind, coding = request.headers.get("content-type", ""), request.headers.get("content-encoding", "")
    if not _JSON_TYPE.fullmatch(kind.partition(";")[0].strip()):
        said = f"{kind[:80]!r}" if kind else "missing"
        raise ApiError(415, f"Content-Type is {said}; send the header application/json", "Content-Type")
    if coding.lower() not in ("identity", ""):
        why = f"Content-Encoding {coding[:80]!r} is not read; send plain JSON"
        raise ApiError(415, why, "Content-Encoding")


def read_json(body: bytes) -> Any:
    """The value of a JSON text.

    Raises ApiError 400 for what is no JSON in UTF-8, nested too deep, of too many values, or has a string or
    a number that cannot be passed on; then it names the field.
    """
    _require_few(body)
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise _explain(body, str(error)) from None
    if _LONG_NUMBER.search(body):
        _require_sound(value)
    return value


def _require_few(body: bytes) -> None:
    """Bound what the text stands for; counted roughly, and within strings only if that is too much."""
    for text in (lambda: body, lambda: _outside_strings(body)):
        counted = text()
        parts = sum(map(counted.count, (b"[", b"{", b":")))
        if parts <= MOST_PARTS and counted.count(b",") <= MOST_VALUES:
            return
    most = f"{MOST_PARTS:,} lists, objects and members, or {MOST_VALUES:,} values"
    raise ApiError(400, f"the body has more than {most}; send less")


def _outside_strings(body: bytes) -> bytes:
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    return b"".join(plain.split(b'"')[::2])


def _explain(body: bytes, said: str) -> ApiError:
    """Why the text was not read: by field where Python's reader is less strict, else by line and column."""
    if len(body) <= EXPLAINED_BYTES and "recursion" not in said:
        try:
            _require_sound(json.loads(body.decode()))
        except ApiError as error:
            return error
        except (ValueError, RecursionError):
            pass
    if "recursion" in said:
        said = said.replace("recursion limit exceeded", "nested too deep")
    return ApiError(400, f"the body is no JSON ({said})")


def _require_sound(value: Any) -> None:
    """Raise ApiError 400 for the first string or number that cannot be passed on."""
    for place, found in _leaves(value, ""):
        if isinstance(found, str) and _SURROGATE.search(found):
            field = _SURROGATE.sub("\ufffd", place) or "the body"
            raise ApiError(400, f"{field} has half of a surrogate pair; send whole characters", field)
        if _is_out_of_range(found):
            raise ApiError(400, f"{place or 'the body'} is a number out of range", place or None)


def _is_out_of_range(found: Any) -> bool:
    if isinstance(found, float):
        return not math.isfinite(found)
    return isinstance(found, int) and found.bit_length() > INTEGER_BITS


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Strings and numbers with their places; keys come with the place of their member."""
    waiting = [(place, value)]
    while waiting:
        place, found = waiting.pop()
        if isinstance(found, dict):
            for key, inner in found.items():
                inside = f"{place}.{key}" if place else key
                yield inside, key
                waiting.append((inside, inner))
        elif isinstance(found, list):
            waiting += [(f"{place}[{index}]", inner) for index, inner in enumerate(found)]
        else:
            yield place, found
