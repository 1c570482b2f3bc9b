"""Times of one layer's attention on this machine's CPU, in a model's shape, as lines against position.

Timed are fulmen's own operations: dense attention; unpacking, scoring and selecting by index keys; attention
to the selected. Decoding is one token after a cache, prefill a block of PREFILL_BLOCK tokens after
one; of either one sequence, of random numbers. The three are checked against the specification first, where
more keys are visible than kept, then timed in turn, round after round; a figure is the median of the rounds.
Lines are of least squares in relative distances: a short text's time counts as much as a long one's.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from fulmen.errors import BackendError, ConfigError
from fulmen.evaluation.price.prices import KINDS, LayerLines, Line, Machine, ModelShape
from fulmen.modeling.cost import PREFILL_BLOCK
from fulmen.modeling.families import family_like
from fulmen.modeling.family import AttentionLayout
from fulmen.ops.attention.dense import dense_attention
from fulmen.ops.attention.sparse import sparse_attention
from fulmen.ops.common.index_keys import pack_index_keys, unpack_index_keys
from fulmen.ops.dispatch import pin_backend, resolve
from fulmen.ops.scores.reference import index_scores_reference
from fulmen.ops.topk import index_topk

OPERATIONS = {"dense": "dense_attention", "select": "index_topk", "sparse": "sparse_attention"}
# Fast calls get as many rounds as fit into the seconds, slow ones the fewest.
FEWEST_ROUNDS, MOST_ROUNDS, ROUNDS_SECONDS, WARM_UP = 5, 101, 1.0, 1
CHECKED_QUERIES = 4
# Shorter texts are over before a clock says much.
SHORTEST_POSITION = 1024
DOUBLINGS, FEWEST_POSITIONS = 4, 3
# Of the largest number of the right answer.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# What the speed of weights is measured with: more than caches hold, and tokens enough to keep a core busy.
WEIGHT_BYTES, WEIGHT_TOKENS = 2**27, 256


class Timing(NamedTuple):
    """Times of one part at one position: the mean number of keys that its queries see.

    `seconds`: of each round, per token.
    """

    kind: str
    part: str
    position: float
    seconds: list[float]


@dataclass(frozen=True)
class Speed:
    """What was measured.

    Attributes:
        machine: speed and bandwidth of products with weights, one token and many.
        lines: fitted to the samples' medians, for each kind of token.
        samples: every time.
        backends: what computed each part.
        errors: of each part from the specification, over the largest number there.
    """

    machine: Machine
    lines: dict[str, LayerLines]
    samples: list[Timing]
    backends: dict[str, str]
    errors: dict[str, float]

    @property
    def last_position(self) -> int:
        """The longest text that was timed, in tokens."""
        return int(max(sample.position for sample in self.samples))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        lines = {
            kind: {part: line._asdict() for part, line in parts._asdict().items()}
            for kind, parts in self.lines.items()
        }
        samples = [sample._asdict() for sample in self.samples]
        return {"lines": lines, "samples": samples, "backends": self.backends, "errors": self.errors}


class LayerCase(NamedTuple):
    """Inputs of one layer for its last T tokens of S; axes as in the operations.

    `dense_qkv` differ from `qkv` where dense MLA reads a prompt: with each head's own keys and values.
    """

    qkv: tuple[Tensor, Tensor, Tensor]
    dense_qkv: tuple[Tensor, Tensor, Tensor]
    scale: float
    index_q_BTJE: Tensor
    index_keys: Tensor
    w_BTJ: Tensor
    start_BT: Tensor
    stop_BT: Tensor
    topk: int

    def index_k_BSIE(self) -> Tensor:
        """Index keys as scoring takes them; GQA models' caches keep them packed."""
        return unpack_index_keys(self.index_keys) if self.index_keys.dtype == torch.int8 else self.index_keys

    def select(self) -> Tensor:
        """topk_BTK."""
        index = (self.index_q_BTJE, self.index_k_BSIE(), self.w_BTJ, None)
        return index_topk(*index, self.start_BT, self.stop_BT, self.topk)

    def attend(self, topk_BTK: Tensor) -> Tensor:
        """out_BTHV over the selected keys."""
        return sparse_attention(*self.qkv, topk_BTK, self.scale)[0]

    def attend_densely(self) -> Tensor:
        """out_BTHV over all keys."""
        return dense_attention(*self.dense_qkv, self.start_BT, self.stop_BT, self.scale)[0]


def measured_positions(topk: int, length: int) -> list[int]:
    """Tokens to measure at, doubling from twice `topk`. Raises ConfigError if there are too few."""
    first = max(SHORTEST_POSITION, 2 * topk)
    positions = [first * 2**n for n in range(DOUBLINGS) if first * 2**n <= length]
    if len(positions) < FEWEST_POSITIONS:
        raise ConfigError(
            f"length={length} has too few positions well above k = {topk} to fit a line; "
            f"use {first * 2 ** (FEWEST_POSITIONS - 1)} or more"
        )
    return positions


@torch.no_grad()
def measure_speed(
    shape: ModelShape,
    positions: Sequence[int],
    seconds: float = ROUNDS_SECONDS,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Speed:
    """Check the operations, then time them and the weights' products.

    Args:
        positions: tokens, all well above the shape's k.
        seconds: that the rounds at one position may take; FEWEST_ROUNDS are run anyway.
        progress: is told steps done, steps in all, and what comes next.

    Raises BackendError if an operation does not do what its specification says.
    """
    steps = [(kind, position) for kind in KINDS for position in positions]
    progress(0, len(steps) + 1, "checking against the specification")
    errors = check_operations(shape)
    samples: list[Timing] = []
    for done, (kind, position) in enumerate(steps):
        progress(done, len(steps) + 1, f"{kind} at {position:,}")
        samples += time_layer(shape, kind, position, seconds)
    progress(len(steps), len(steps) + 1, "weights")
    machine = time_weights(shape, seconds)
    progress(len(steps) + 1, len(steps) + 1, "")
    backends = {part: resolve(name, "cpu", shape.dtype) for part, name in OPERATIONS.items()}
    return Speed(machine, fit_lines(samples), samples, backends, errors)


def check_operations(shape: ModelShape) -> dict[str, float]:
    """Each operation against its specification, on twice as many keys as a query keeps.

    Raises BackendError if one is further off than rounding explains.
    """
    errors: dict[str, float] = {}
    for kind in KINDS:
        case = layer_case(shape, kind, CHECKED_QUERIES, 2 * shape.dsa.topk + CHECKED_QUERIES)
        topk_BTK = case.select()
        with pin_backend("reference"):
            wanted = {"dense": case.attend_densely(), "sparse": case.attend(topk_BTK)}
        found = {"dense": case.attend_densely(), "sparse": case.attend(topk_BTK)}
        for part, out_BTHV in found.items():
            errors[f"{kind} {part}"] = _relative_error(out_BTHV, wanted[part])
        errors[f"{kind} select"] = _selection_error(case, topk_BTK)
    tolerance = TOLERANCES[shape.dtype]
    for name, error in errors.items():
        if not error <= tolerance:
            part = name.split()[-1]
            backend = resolve(OPERATIONS[part], "cpu", shape.dtype)
            raise BackendError(
                f"{OPERATIONS[part]} by {backend!r} is {error:.1e} off its specification in this shape; "
                "nothing was timed; install fulmen here again, or set FULMEN_BACKEND=torch"
            )
    return errors


def time_layer(shape: ModelShape, kind: str, position: int, seconds: float) -> list[Timing]:
    """One layer's parts at a position, in turn."""
    queries = PREFILL_BLOCK if kind == "prefill" else 1
    case = layer_case(shape, kind, queries, position)
    topk_BTK = case.select()
    assert case.topk < int(case.stop_BT.min()), "every query must leave something out"
    parts = {"dense": case.attend_densely, "select": case.select, "sparse": lambda: case.attend(topk_BTK)}
    visible = float(case.stop_BT.float().mean())
    return [
        Timing(kind, part, visible, [second / queries for second in times])
        for part, times in alternate(parts, seconds).items()
    ]


def time_weights(shape: ModelShape, seconds: float) -> Machine:
    """FLOPs a second of a product with weights for many tokens, bytes a second of one for a single token."""
    hidden, dtype = shape.config.hidden_size, shape.dtype
    weight = torch.randn(WEIGHT_BYTES // (hidden * dtype.itemsize), hidden).to(dtype)
    one, many = (torch.randn(tokens, hidden).to(dtype) for tokens in (1, WEIGHT_TOKENS))
    times = alternate({"one": lambda: linear(one, weight), "many": lambda: linear(many, weight)}, seconds)
    flops = 2 * WEIGHT_TOKENS * weight.numel() / statistics.median(times["many"])
    return Machine(flops, weight.nbytes / statistics.median(times["one"]))


def alternate(calls: Mapping[str, Callable[[], Tensor]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call in each round, one after another; rounds before that warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    begun = time.perf_counter()
    for number in range(WARM_UP + MOST_ROUNDS):
        if number >= WARM_UP + FEWEST_ROUNDS and time.perf_counter() - begun > seconds:
            break
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if number >= WARM_UP:
                times[name].append(time.perf_counter() - started)
    return times


def fit_lines(samples: Sequence[Timing]) -> dict[str, LayerLines]:
    """A line for every part and kind, through the medians."""

    def line(kind: str, part: str) -> Line:
        chosen = [sample for sample in samples if (sample.kind, sample.part) == (kind, part)]
        return fit_line([s.position for s in chosen], [statistics.median(s.seconds) for s in chosen])

    return {kind: LayerLines(*(line(kind, part) for part in LayerLines._fields)) for kind in KINDS}


def fit_line(positions: Sequence[float], seconds: Sequence[float]) -> Line:
    """The line whose relative distances have the least squares, among those without negative numbers."""
    x, y = np.array(positions), np.array(seconds)
    terms = np.stack((1 / y, x / y))
    fixed, slope = np.linalg.lstsq(terms.T, np.ones_like(y))[0]
    if slope < 0 or fixed < 0:
        # The least squares under the bounds then lie where one of the two is 0.
        alone = terms.sum(1) / np.square(terms).sum(1)
        corners = [(alone[0], 0.0), (0.0, alone[1])]
        fixed, slope = min(corners, key=lambda pair: np.square(terms.T @ pair - 1).sum())
    return Line(float(fixed), float(slope), float(np.abs((fixed + slope * x) / y - 1).max()))


def layer_case(shape: ModelShape, kind: str, queries: int, tokens: int) -> LayerCase:
    """Random inputs of one layer for the last `queries` of `tokens` tokens."""
    config, dsa = shape.config, shape.dsa
    J, I, E = dsa.index_n_heads, dsa.index_n_kv_heads, dsa.index_head_dim  # noqa: E741
    family = family_like(config)
    layout = family.attention_layout(config)
    dense_layout = layout if kind == "decode" else family.prefill_layout(config)
    index_dtype = torch.float32 if family.packs_index_keys else shape.dtype
    generator = torch.Generator().manual_seed(tokens)

    def normal(*sizes: int, dtype: torch.dtype = index_dtype) -> Tensor:
        return torch.randn(1, *sizes, generator=generator).to(dtype)

    def heads(layout: AttentionLayout) -> tuple[Tensor, Tensor, Tensor]:
        q_BTHD = normal(queries, layout.heads, layout.key_width, dtype=shape.dtype)
        k_BSGD = normal(tokens, layout.key_heads, layout.key_width, dtype=shape.dtype)
        if layout.values_in_keys:
            return q_BTHD, k_BSGD, k_BSGD[..., : layout.value_width]
        return q_BTHD, k_BSGD, normal(tokens, layout.key_heads, layout.value_width, dtype=shape.dtype)

    index_k_BSIE = normal(tokens, I, E)
    qkv = heads(layout)
    stop_BT = torch.arange(tokens - queries + 1, tokens + 1)[None]
    return LayerCase(
        qkv=qkv,
        dense_qkv=qkv if dense_layout == layout else heads(dense_layout),
        scale=layout.scale,
        index_q_BTJE=normal(queries, J, E),
        index_keys=pack_index_keys(index_k_BSIE) if family.packs_index_keys else index_k_BSIE,
        w_BTJ=normal(queries, J, dtype=torch.float32),
        start_BT=torch.zeros_like(stop_BT),
        stop_BT=stop_BT,
        topk=dsa.topk,
    )


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def _selection_error(case: LayerCase, topk_BTK: Tensor) -> float:
    """By how much the worst selected score misses the worst of the true best k, over the largest score."""
    index = (case.index_q_BTJE, case.index_k_BSIE(), case.w_BTJ, None)
    scores_BTS = index_scores_reference(*index, case.start_BT, case.stop_BT).scores_BTS
    is_whole = topk_BTK.shape[-1] == case.topk and bool((topk_BTK.diff(dim=-1) > 0).all())
    if not is_whole or int(topk_BTK.min()) < 0:
        return float("inf")
    kept_BTK = scores_BTS.gather(-1, topk_BTK.long())
    missed = scores_BTS.topk(case.topk).values[..., -1] - kept_BTK.amin(-1)
    return float(missed.max() / scores_BTS[scores_BTS.isfinite()].abs().max())
