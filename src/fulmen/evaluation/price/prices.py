"""What a million tokens cost against their position, dense and with DSA: figure 3 of DeepSeek-V3.2.

A machine at p dollars an hour that needs t seconds for a token sells a million of them for p t 10^6 / 3600.
The seconds of a token are those of its weights and those of its attention, one after the other:

    weights     max(bytes / bandwidth, FLOPs / speed); in decoding a batch shares the read of the bytes, in a
                prompt so many tokens share it that only the FLOPs count
    attention   by `Roofline` the same maximum, for attention and index scores apart; or by `Measured`, lines
                fitted to times on a machine (`fulmen.evaluation.price.speed`)

A roofline leaves out the same for both: launches, communication, caches on chip, several tokens a step.
Bytes and FLOPs are those of `fulmen.modeling.cost`. Sources: arXiv 2512.02556, figure 3; Williams, Waterman
and Patterson, "Roofline", 2009.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from transformers import PreTrainedConfig

from fulmen.config import DsaConfig
from fulmen.modeling.cost import (
    LayerStep,
    StepParts,
    Work,
    decode_parts,
    layer_steps,
    prefill_parts,
    read_weights,
)

KINDS = ("prefill", "decode")
TOKENS_OF_PRICE = 1_000_000
SECONDS_PER_HOUR = 3600
# Positions where the search for a crossover looks, per doubling of the position; between them it halves.
SEARCH_STEPS = 16
# A curve's even steps, and the first power of two in it.
CURVE_STEPS, FIRST_POWER = 64, 10


class Pair(NamedTuple):
    """The same quantity of one token by both attentions."""

    dense: float
    dsa: float


class PriceRow(NamedTuple):
    """Dollars per million tokens at a position."""

    position: int
    prefill: Pair
    decode: Pair


@dataclass(frozen=True)
class ModelShape:
    """A model to price: its config, what DSA it has or would get, the dtype of weights and cache."""

    config: PreTrainedConfig
    dsa: DsaConfig
    dtype: torch.dtype

    def parts(self, kind: str, position: int) -> StepParts:
        """A token's work, read ("prefill") or generated ("decode")."""
        parts = prefill_parts if kind == "prefill" else decode_parts
        return parts(self.config, self.dsa, position, self.dtype.itemsize)


@dataclass(frozen=True)
class Machine:
    """FLOPs and bytes a second."""

    flops: float
    bandwidth: float

    def seconds(self, work: Work) -> float:
        """The roofline: what takes longer of computing and reading."""
        return max(work.bytes / self.bandwidth, work.flops / self.flops)


@dataclass(frozen=True)
class Terms:
    """What is paid and how it is used.

    Attributes:
        per_hour: dollars an hour for the machine.
        hit_rate: share of the prompts' tokens that a prefix cache holds; they cost nothing.
        batch: sequences decoded together.
    """

    per_hour: float
    hit_rate: float = 0.0
    batch: int = 1


class AttentionTime(Protocol):
    """Seconds that a token's attention takes in all layers, index scores included, weights left out."""

    def __call__(self, shape: ModelShape, kind: str, position: int) -> Pair: ...


@dataclass(frozen=True)
class Roofline:
    """Attention as fast as the machine's bandwidth and speed allow."""

    machine: Machine

    def __call__(self, shape: ModelShape, kind: str, position: int) -> Pair:
        """See `AttentionTime`."""
        parts, seconds = shape.parts(kind, position), self.machine.seconds
        linear = seconds(parts.linear_attention)
        dsa = seconds(parts.dsa_attention) + seconds(parts.index_scores)
        return Pair(seconds(parts.dense_attention) + linear, dsa + linear)


class Line(NamedTuple):
    """Seconds of one layer and token: `fixed` + `per_token` times the tokens in the cache.

    `error`: the largest distance of a measured median from the line, over the median.
    """

    fixed: float
    per_token: float
    error: float

    def at(self, tokens: int) -> float:
        """Seconds."""
        return self.fixed + self.per_token * tokens


class LayerLines(NamedTuple):
    """What was measured of one layer: dense attention, the indexer's selection, attention to the selected."""

    dense: Line
    select: Line
    sparse: Line


@dataclass(frozen=True)
class Measured:
    """Attention by lines that were fitted to measured times, for each kind of token.

    Layers with a k of their own count as the mean, which the shares of k preserve; those with linear
    attention are not measured, and left out.
    """

    lines: dict[str, LayerLines]

    def __call__(self, shape: ModelShape, kind: str, position: int) -> Pair:
        """See `AttentionTime`."""
        lines = self.lines[kind]

        def dsa(layer: LayerStep) -> float:
            if layer.topk is None:
                return lines.dense.at(layer.visible)
            return lines.sparse.at(position) + (lines.select.at(position) if layer.has_indexer else 0.0)

        layers = [step for step in layer_steps(shape.config, shape.dsa, position) if step.visible]
        return Pair(sum(lines.dense.at(layer.visible) for layer in layers), sum(map(dsa, layers)))


@dataclass(frozen=True)
class Pricing:
    """Prices of one model on one machine. Positions are of at least 1, else ConfigError."""

    shape: ModelShape
    machine: Machine
    attention: AttentionTime
    terms: Terms

    def seconds(self, kind: str, position: int) -> Pair:
        """Machine seconds of one token that is really read or generated, dense or DSA."""
        parts = self.shape.parts(kind, position)
        attention = self.attention(self.shape, kind, position)
        return Pair(
            self._weights_seconds(kind, parts.weights, 0) + attention.dense,
            self._weights_seconds(kind, parts.weights, parts.index_weights) + attention.dsa,
        )

    def dollars(self, kind: str, position: int) -> Pair:
        """Price of a million tokens; in a prompt, of those from the prefix cache and the others together."""
        paid = 1 - self.terms.hit_rate if kind == "prefill" else 1.0
        price = paid * self.terms.per_hour / SECONDS_PER_HOUR * TOKENS_OF_PRICE
        dense, dsa = self.seconds(kind, position)
        return Pair(price * dense, price * dsa)

    def rows(self, positions: Iterable[int]) -> list[PriceRow]:
        """Prices at each position."""
        return [PriceRow(at, self.dollars("prefill", at), self.dollars("decode", at)) for at in positions]

    def cheaper_from(self, kind: str, length: int) -> int | None:
        """The position from which DSA is the cheaper one up to `length`; None if it is not there."""
        return cheaper_from(lambda at: self.seconds(kind, at), search_positions(self.shape.dsa, length))

    def _weights_seconds(self, kind: str, weights: int, index_weights: int) -> float:
        flops = 2 * (weights + index_weights)
        if kind == "prefill":
            return flops / self.machine.flops
        read = read_weights(self.shape.config, self.terms.batch) + index_weights
        return self.machine.seconds(Work(read * self.shape.dtype.itemsize / self.terms.batch, flops))


def curve_positions(dsa: DsaConfig, length: int) -> list[int]:
    """Ascending positions to draw, up to `length`: even steps, powers of two, both sides of each jump."""
    powers = {2**power for power in range(FIRST_POWER, length.bit_length())}
    even = {-(-length * step // CURVE_STEPS) for step in range(1, CURVE_STEPS + 1)}
    return sorted(at for at in {1} | powers | even | _jumps(dsa) if at <= length)


def search_positions(dsa: DsaConfig, length: int) -> list[int]:
    """Ascending positions 1 to `length` between which a comparison is taken to change its mind once."""
    found = {1, length} | _jumps(dsa)
    at = 1.0
    while at < length:
        found.add(round(at))
        at *= 2 ** (1 / SEARCH_STEPS)
    return sorted(at for at in found if at <= length)


def _jumps(dsa: DsaConfig) -> set[int]:
    """The last position without selection and the first with it, of every layer: DSA's cost jumps there."""
    kept = {max(dsa.topk, dsa.layer_topk(layer)) for layer in dsa.layers}
    return kept | {topk + 1 for topk in kept}


def cheaper_from(cost: Callable[[int], Pair], positions: Sequence[int]) -> int | None:
    """The first position from which `dsa` is below `dense` at all that follow; None if not at the last.

    Args:
        cost: of a position, at those given and at any integer between them.
        positions: ascending; between two of them the comparison changes once at most.
    """

    def is_cheaper(position: int) -> bool:
        pair = cost(position)
        return pair.dsa < pair.dense

    last = next((place for place in reversed(range(len(positions))) if not is_cheaper(positions[place])), -1)
    if last == len(positions) - 1:
        return None
    if last < 0:
        return positions[0]
    dearer, cheaper = positions[last], positions[last + 1]
    while cheaper - dearer > 1:
        middle = (dearer + cheaper) // 2
        dearer, cheaper = (dearer, middle) if is_cheaper(middle) else (middle, cheaper)
    return cheaper
