"""What `fulmen eval --suite` is asked to do, checked before anything is loaded."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fulmen.config import require_positive_int
from fulmen.errors import ConfigError
from fulmen.evaluation.suites.catalog import suite_names

PARITY, ALL = "parity", "all"
SUITE_NAMES = (PARITY, *suite_names(), ALL)
DEFAULT_SAMPLES = 20
MAX_LENGTH = "max"
SHORTEST_POWER = 1024


@dataclass(frozen=True)
class SuiteSettings:
    """One run of suites.

    Attributes:
        source: a converted model's directory, any model, or with `url` the place of the tokenizer.
        suites: some of SUITE_NAMES.
        lengths: tokens; empty: every power of two from 1k to the model's context; None: k decides.
        samples: of each task and length, or texts of each length.
        tasks: names of RULER tasks; empty: all.
        seed: of every random choice.
        data: as for `EvalSettings`.
        topk: None: the model's own.
        dense: the dense model that a converted one is compared with; None: itself, read densely.
        url, model: an OpenAI-compatible endpoint and its name for the model; both or neither.
        out: folder to write to; None: beside the model, or in the working directory.
    """

    source: str
    suites: tuple[str, ...]
    lengths: tuple[int, ...] | None
    samples: int = DEFAULT_SAMPLES
    tasks: tuple[str, ...] = ()
    seed: int = 0
    data: tuple[str, ...] = ()
    topk: int | None = None
    dense: str | None = None
    url: str | None = None
    model: str | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        require_positive_int("samples", self.samples)
        if (self.url is None) != (self.model is None):
            raise ConfigError("--url and --model go together: the address, and the model's name there")
        if self.url and PARITY in self.suites:
            raise ConfigError("suite='parity' needs the model's weights, which an endpoint does not give")

    @property
    def folder(self) -> Path:
        """Where results go."""
        if self.out is not None:
            return self.out.expanduser()
        if self.url is None and Path(self.source).is_dir():
            return Path(self.source) / "suites"
        return Path("eval-" + re.sub(r"[^\w.-]+", "-", Path(self.model or self.source).name))


def parse_names(text: str, what: str, known: Sequence[str]) -> tuple[str, ...]:
    """The names of "a,b", each once. Raises ConfigError for one that is not among `known`."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise ConfigError(f"{what}={name!r} is not known; choose from {', '.join(known)}")
    return names


def parse_lengths(text: str) -> tuple[int, ...]:
    """The tokens of "1k,2k,4096", ascending; none of "max". Raises ConfigError for anything else."""
    if text.strip().lower() == MAX_LENGTH:
        return ()
    lengths = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(k?)\s*", part, re.IGNORECASE)
        tokens = int(found[1]) * (SHORTEST_POWER if found[2] else 1) if found else 0
        if tokens < 1:
            raise ConfigError(f"length={part.strip()!r} cannot be read; write tokens as in 1k,2k,4096 or max")
        lengths.add(tokens)
    return tuple(sorted(lengths))


def lengths_up_to(context: int) -> tuple[int, ...]:
    """Every power of two from 1k to a context; a shorter context itself."""
    lengths = [SHORTEST_POWER]
    while 2 * lengths[-1] <= context:
        lengths.append(2 * lengths[-1])
    return tuple(length for length in lengths if length <= context) or (context,)
