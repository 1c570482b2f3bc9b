"""What Python callers pass, made into what settings hold; every mistake is a ConfigError that names it."""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

from fulmen.errors import ConfigError

Place = str | os.PathLike[str]
Data = Place | Sequence[Place]
Duration = float | str

# A data set on the hub, as `fulmen.data` reads it.
HUB_PREFIX = "hf:"

_SECONDS = {"h": 3600, "m": 60, "s": 1}
_DURATION = re.compile(r"(?=.)" + "".join(rf"(?:(?P<{unit}>\d+(?:\.\d+)?){unit})?" for unit in _SECONDS))


def path_argument(name: str, value: object, what: str = "a directory") -> Path:
    """A path. Raises ConfigError for anything else, and for an empty one."""
    return Path(place_argument(name, value, what))


def place_argument(name: str, value: object, what: str = "a model directory or a model's name") -> str:
    """A path, or the name of something elsewhere. Raises ConfigError."""
    try:
        place = os.fspath(value)  # type: ignore[call-overload]
    except TypeError:
        place = None
    if not isinstance(place, str) or not place.strip() or "\0" in place:
        raise refused(name, value, f"name {what}")
    return place


def flag_argument(name: str, value: object) -> bool:
    """True or False. Raises ConfigError for anything else."""
    if not isinstance(value, bool):
        raise refused(name, value, "use True or False")
    return value


def number_argument(name: str, value: object, what: str = "a number") -> float:
    """A finite number. Raises ConfigError for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise refused(name, value, f"use {what}")
    return value


def names_argument(name: str, value: object) -> tuple[str, ...]:
    """The names of "a,b" or of a sequence of them, each once. Raises ConfigError for anything else."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, Sequence) or not all(isinstance(one, str) for one in names):
        raise refused(name, value, "use names, as 'a,b' or ('a', 'b')")
    return tuple(dict.fromkeys(one.strip() for one in names))


def seconds_argument(name: str, value: object) -> float | None:
    """Seconds of a number, or of a text as `parse_duration`; None stays. Raises ConfigError."""
    if value is None:
        return None
    if isinstance(value, str):
        return parse_duration(value, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise refused(name, value, "use seconds above 0, or a text as '90s', '8m', '1h30m'")
    return float(value)


def parse_duration(text: str, name: str = "budget") -> float:
    """Seconds of "90s", "8m", "1h30m" or "1.5h". Raises ConfigError for anything else, and for zero."""
    found = _DURATION.fullmatch(text.strip().lower())
    amounts = found.groupdict(default="0") if found else {}
    seconds = sum(float(amount) * _SECONDS[unit] for unit, amount in amounts.items())
    if seconds <= 0:
        raise ConfigError(
            f"{name}: duration {text!r} cannot be read; write hours, minutes, seconds as in 90s, 8m, 1h30m",
            arguments=[name],
        )
    return seconds


def data_argument(data: object, texts: object) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Places of text, and texts in memory: `texts`, and what of `data` has a line break.

    Raises ConfigError for what is neither, for a place that is not there, and if both are given.
    """
    given = [data] if isinstance(data, (str, os.PathLike)) else data
    if not isinstance(given, Sequence):
        raise refused("data", data, "name a file, a directory or hf:name, or several in a list")
    if texts is not None and given:
        raise ConfigError("data and texts exclude each other; give one of them", arguments=["data", "texts"])
    if texts is not None:
        return (), _texts_argument(texts)
    places = [one for one in given if not (isinstance(one, str) and "\n" in one)]
    in_memory = tuple(one for one in given if isinstance(one, str) and "\n" in one)
    return require_existing(places), in_memory


def require_existing(data: Sequence[object]) -> tuple[str, ...]:
    """The places of text, as strings. Raises ConfigError for one that is not there."""
    for one in data:
        place = place_argument("data", one, "a file, a directory or hf:name")
        if not place.startswith(HUB_PREFIX) and not _exists(place):
            raise ConfigError(
                f"data={place!r} does not exist; name a file, a directory or hf:name", arguments=["data"]
            )
    return tuple(os.fspath(one) for one in data)  # type: ignore[call-overload]


def refused(name: str, value: object, remedy: str) -> ConfigError:
    """The error for a value that an argument cannot have."""
    shown = " ".join(repr(value).split())
    if len(shown) > 100:
        shown = f"{shown[:97]}..."
    return ConfigError(f"{name}={shown} cannot be; {remedy}", arguments=[name])


def _texts_argument(texts: object) -> tuple[str, ...]:
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence) or not texts:
        raise refused("texts", texts, "give a list of texts")
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise refused(f"texts[{number}]", text, "give a text that is not empty")
    return tuple(texts)


def _exists(place: str) -> bool:
    try:
        return Path(place).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        # A name that no file can have.
        return False
