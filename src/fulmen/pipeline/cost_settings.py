"""What `fulmen cost` is asked to do, checked before anything is read."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from fulmen.config import require_positive_int
from fulmen.errors import ConfigError

DEFAULT_PRICE = 2.0
DEFAULT_BATCH = 32
DEFAULT_POSITIONS = 131_072


@dataclass(frozen=True)
class CostSettings:
    """One price curve.

    Attributes:
        source: a model, dense or converted.
        flops, bandwidth: FLOPs and bytes a second of a machine; both, or neither with `measure`.
        measure: take this machine's CPU, and time it.
        price: dollars an hour.
        hit_rate: share of the prompts' tokens that come from the prefix cache.
        batch: sequences decoded together.
        length: the last position.
        out: folder to write to; None: one in the working directory.
    """

    source: str
    flops: float | None = None
    bandwidth: float | None = None
    measure: bool = False
    price: float = DEFAULT_PRICE
    hit_rate: float = 0.0
    batch: int = DEFAULT_BATCH
    length: int = DEFAULT_POSITIONS
    out: Path | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.flops, self.bandwidth) if value is not None]
        if self.measure and given:
            raise ConfigError(
                "measure takes this machine's own speed; leave flops and bandwidth out",
                arguments=["measure", "flops", "bandwidth"],
            )
        if not self.measure and len(given) < 2:
            raise ConfigError(
                "flops and bandwidth go together: a machine's FLOPs and bytes a second, as 989e12 and "
                "3.35e12 for an H100; or use measure to time this machine",
                arguments=["flops", "bandwidth", "measure"],
            )
        for name in ("flops", "bandwidth", "price"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name}={value!r} cannot be; use a number above 0")
        if not 0 <= self.hit_rate <= 1:
            raise ConfigError(f"hit_rate={self.hit_rate!r} cannot be; use a share from 0 to 1")
        require_positive_int("batch", self.batch)
        require_positive_int("length", self.length)
        if self.out is not None and self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"out={str(self.out)!r} is a file; name a folder")

    def given_speed(self) -> tuple[float, float]:
        """FLOPs and bytes a second."""
        assert self.flops, "without measure both are given"
        assert self.bandwidth, "without measure both are given"
        return self.flops, self.bandwidth

    @property
    def folder(self) -> Path:
        """Where results go."""
        if self.out is not None:
            return self.out.expanduser()
        return Path("cost-" + re.sub(r"[^\w.-]+", "-", Path(self.source).name))
