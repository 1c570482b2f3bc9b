"""What `fulmen suite` is asked to do, checked before anything is loaded."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fulmen.config import require_positive_int
from fulmen.errors import ConfigError
from fulmen.evaluation.suites.catalog import suite_names
from fulmen.pipeline.arguments import refused, require_existing
from fulmen.pipeline.settings import AUTO_DEVICE, require_positive, require_seed

if TYPE_CHECKING:
    import torch

PARITY, ALL = "parity", "all"
# Parity was one of them before it had `fulmen eval` for itself, which still takes these.
SUITES_ALONE = (*suite_names(), ALL)
SUITE_NAMES = (PARITY, *SUITES_ALONE)
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
        data, texts: as for `EvalSettings`.
        topk: None: the model's own.
        dense: the dense model that a converted one is compared with; None: itself, read densely.
        url, model: an OpenAI-compatible endpoint and its name for the model; both or neither.
        out: folder for results, kept as they come; None: nothing is written.
        device: where to compute, as torch names it, or AUTO_DEVICE; not with `url`.
    """

    source: str
    suites: tuple[str, ...]
    lengths: tuple[int, ...] | None
    samples: int = DEFAULT_SAMPLES
    tasks: tuple[str, ...] = ()
    seed: int = 0
    data: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    topk: int | None = None
    dense: str | None = None
    url: str | None = None
    model: str | None = None
    out: Path | None = None
    device: "str | torch.device" = AUTO_DEVICE

    def __post_init__(self) -> None:
        require_positive_int("samples", self.samples)
        require_positive(self, "topk")
        require_seed(self.seed)
        object.__setattr__(self, "data", require_existing(self.data))
        if (self.url is None) != (self.model is None):
            raise ConfigError(
                "url and model go together: the address, and the model's name there",
                arguments=["url", "model"],
            )
        if self.url and self.device != AUTO_DEVICE:
            raise ConfigError(f"device={str(self.device)!r} is for a model that runs here, not an endpoint's")
        if self.url and PARITY in self.suites:
            raise ConfigError("suite='parity' needs the model's weights, which an endpoint does not give")
        if self.out is not None and self.out.expanduser().exists() and not self.out.expanduser().is_dir():
            raise ConfigError(f"out={str(self.out)!r} is a file; name a folder")


def default_folder(source: str, model: str | None) -> Path:
    """Where the program puts results: beside the model, or of an endpoint's in the working directory."""
    if model is None and Path(source).is_dir():
        return Path(source) / "suites"
    return Path("eval-" + re.sub(r"[^\w.-]+", "-", Path(model or source).name))


def known_names(names: Sequence[str], what: str, known: Sequence[str]) -> tuple[str, ...]:
    """The names, each once. Raises ConfigError for one that is not among `known`."""
    for name in names:
        if name not in known:
            raise ConfigError(f"{what}={name!r} is not known; choose from {', '.join(known)}")
    return tuple(dict.fromkeys(names))


def parse_lengths(lengths: object) -> tuple[int, ...] | None:
    """The tokens of "1k,2k,4096" or of these numbers, ascending; none of "max"; None stays.

    Raises ConfigError for anything else.
    """
    if lengths is None:
        return None
    if isinstance(lengths, str):
        return () if lengths.strip().lower() == MAX_LENGTH else tuple(_lengths(lengths.split(",")))
    given = [lengths] if isinstance(lengths, int) else lengths
    if not isinstance(given, Sequence) or not given:
        raise refused("lengths", lengths, "use tokens, as (1024, 2048), '1k,2k' or 'max'")
    return tuple(_lengths([str(one) for one in given]))


def _lengths(parts: Sequence[str]) -> list[int]:
    lengths = set()
    for part in parts:
        found = re.fullmatch(r"\s*(\d+)\s*(k?)\s*", part, re.IGNORECASE)
        tokens = int(found[1]) * (SHORTEST_POWER if found[2] else 1) if found else 0
        if tokens < 1:
            raise ConfigError(
                f"lengths: length={part.strip()!r} cannot be read; write tokens as in 1k,2k,4096 or max",
                arguments=["lengths"],
            )
        lengths.add(tokens)
    return sorted(lengths)


def lengths_up_to(context: int) -> tuple[int, ...]:
    """Every power of two from 1k to a context; a shorter context itself."""
    lengths = [SHORTEST_POWER]
    while 2 * lengths[-1] <= context:
        lengths.append(2 * lengths[-1])
    return tuple(length for length in lengths if length <= context) or (context,)
