"""The one DSA configuration, frozen; stored under the key `dsa` of a converted model's config.json."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from fulmen.errors import ConfigError

# Ratios are written with a few digits.
MEAN_TOLERANCE = 0.01
DEFAULT_CANDIDATE_FACTOR = 8
# A coarse level is asked where a query sees more than this many times the candidates: with fewer it costs
# more than it saves (docs/log.md).
COARSE_FROM = 4
# What a config may leave out.
OPTIONAL_KEYS = {"topk_shares", "coarse_head_dim", "coarse_n_heads", "candidate_factor"}


class CoarseShape(NamedTuple):
    """Coarse heads with a threshold, their width and that of the one key head (N); both 0: there is none."""

    heads: int
    width: int

    @property
    def query_heads(self) -> int:
        """All coarse query heads (M): the mean of the others has no threshold."""
        return self.heads + 1 if self.heads else 0


@dataclass(frozen=True)
class DsaConfig:
    """Shape of the lightning indexer and its selection (DeepSeek-V3.2, arXiv 2512.02556, section 2.1).

    Attributes:
        topk: tokens that each query keeps (K).
        index_n_heads: index query heads (J).
        index_n_kv_heads: index key heads (I); V3.2 has one. Divides `index_n_heads`.
        index_head_dim: width of an index head (E), even because RoPE rotates pairs.
        layers: indices of the converted layers, ascending.
        topk_shares: per-layer k ratios: what each of them keeps over `topk`; their mean is 1. Empty: all keep
            `topk`.
        coarse_head_dim: width of the coarse heads that look at every key first (N), even; 0: the index has
            one level.
        coarse_n_heads: coarse query heads with a threshold; they, and one of their mean, share a key head.
        candidate_factor: they leave the indexer this many times k keys (c), k being the layer's
            or `topk`, whichever is more.
    """

    topk: int
    index_n_heads: int
    index_n_kv_heads: int
    index_head_dim: int
    layers: tuple[int, ...]
    topk_shares: tuple[float, ...] = ()
    coarse_head_dim: int = 0
    coarse_n_heads: int = 0
    candidate_factor: int = DEFAULT_CANDIDATE_FACTOR

    def __post_init__(self) -> None:
        for name in ("topk", "index_n_heads", "index_n_kv_heads", "index_head_dim", "candidate_factor"):
            require_positive_int(name, getattr(self, name))
        if self.index_n_heads % self.index_n_kv_heads:
            raise ConfigError(
                f"index_n_heads={self.index_n_heads} is not a multiple of "
                f"index_n_kv_heads={self.index_n_kv_heads}; use a multiple"
            )
        if self.index_head_dim % 2:
            raise ConfigError(f"index_head_dim={self.index_head_dim} is odd; RoPE needs an even width")
        width = self.coarse_head_dim
        if isinstance(width, bool) or not isinstance(width, int) or width < 0 or width % 2:
            raise ConfigError(f"coarse_head_dim={width!r} cannot be; use an even number, or 0 for one level")
        if width:
            require_positive_int("coarse_n_heads", self.coarse_n_heads)
        elif self.coarse_n_heads:
            raise ConfigError(
                f"coarse_n_heads={self.coarse_n_heads!r} cannot be without coarse_head_dim; "
                "use both, or neither for one level"
            )
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "topk_shares", tuple(self.topk_shares))
        if self.topk_shares and (
            len(self.topk_shares) != len(self.layers)
            or min(self.topk_shares) <= 0
            or abs(sum(self.topk_shares) / len(self.layers) - 1) > MEAN_TOLERANCE
        ):
            raise ConfigError(
                f"topk_shares={self.topk_shares} cannot be; give each of the {len(self.layers)} layers a "
                "positive number, of mean 1"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DsaConfig":
        """Read what `to_dict` wrote. Raises ConfigError on a missing or unknown key."""
        known = {field.name for field in fields(cls)}
        if mismatched := sorted(known - OPTIONAL_KEYS - set(values) | set(values) - known):
            raise ConfigError(
                f"config key 'dsa' misses or does not know {mismatched}; it holds {sorted(known)}"
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        values = {**asdict(self), "layers": list(self.layers), "topk_shares": list(self.topk_shares)}
        if not self.coarse_head_dim:  # as earlier releases read it
            del values["coarse_head_dim"], values["coarse_n_heads"], values["candidate_factor"]
        return values

    @property
    def coarse(self) -> CoarseShape:
        """The coarse level."""
        return CoarseShape(self.coarse_n_heads, self.coarse_head_dim)

    def candidates(self, layer: int) -> int:
        """Keys that the coarse heads of a converted layer leave to the indexer (`candidates_left`)."""
        return candidates_left(self.candidate_factor, self.layer_topk(layer), self.topk)

    def layer_topk(self, layer: int) -> int:
        """Tokens that a query keeps in a converted layer."""
        return scaled_topk(self.topk, self.topk_shares, self.layers.index(layer))


def scaled_topk(topk: int, ratios: Sequence[float] | None, index: int) -> int:
    """Tokens that a query keeps in converted layer number `index`."""
    return max(1, round(topk * ratios[index])) if ratios else topk


def candidates_left(factor: int, layer_topk: int, topk: int) -> int:
    """Keys that a coarse level leaves to the indexer of a layer that keeps `layer_topk` (C).

    Of a layer that keeps fewer than the model's `topk`, as many as if it kept those: to find very few keys
    among all is what a coarse level is worst at (docs/log.md), and more of them cost little.
    """
    return factor * max(layer_topk, topk)


def require_positive_int(name: str, value: object) -> int:
    """Return `value` if it is a positive integer, else raise ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={value!r} cannot be; use an integer of at least 1")
    return value
