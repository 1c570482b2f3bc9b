"""What the indexer is measured against: choices of the same k keys with perfect knowledge, or with none."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fulmen.config import COARSE_FROM
from fulmen.modeling.selectors import (
    CoarseInputs,
    IndexerSelector,
    OneLevelSelector,
    SelectionInputs,
    Selector,
    keep_short_pasts,
)
from fulmen.ops.attention.mean import mean_attention
from fulmen.ops.attention.sparse import sparse_attention
from fulmen.ops.common.intervals import selection_mask
from fulmen.ops.topk import select_topk
from fulmen.ops.two_level import two_level_topk

# Numbers of one block of attention probabilities (heads x rows x keys): 8 MB, which caches hold.
BLOCK_PROBS = 2**21
SINKS = 4
RECALL_STRIDE = 16


class OracleSelector(Selector):
    """The keys with the most attention, averaged over the heads: the target that the indexer is trained on.

    The attention is that of this layer over every visible key, given what the layers below did.
    """

    def select(self, inputs: SelectionInputs, topk: int) -> Tensor:
        n_keys = inputs.k_BSGD.shape[1]
        chosen_BTK = _nothing_chosen(inputs, topk)
        for b in range(len(inputs.q_BTHD)):
            for rows in _row_blocks(inputs):
                probs_RS = attention_of_rows(inputs, b, rows)[None]
                start_R, stop_R = inputs.start_BT[b, rows], inputs.stop_BT[b, rows]
                found_RK = select_topk(probs_RS, start_R[None], stop_R[None], min(topk, n_keys))[0]
                chosen_BTK[b, rows, : found_RK.shape[-1]] = found_RK
        return chosen_BTK


class KeyHeadOracleSelector(OracleSelector):
    """The oracle of each key/value head: its query heads keep the keys with their own mean attention.

    Tells how far one set of keys for all heads can go: no index can do what this does. It reads G times as
    many keys.
    """

    def attend(self, inputs: SelectionInputs, topk: int, dense_up_to: int) -> Tensor | None:
        n_groups = inputs.k_BSGD.shape[2]
        outs = []
        sinks = [None] * n_groups if inputs.sinks_H is None else inputs.sinks_H.chunk(n_groups)
        for g, q_BTMD in enumerate(inputs.q_BTHD.chunk(n_groups, dim=2)):
            k_BSGD, v_BSGV = inputs.k_BSGD[:, :, g : g + 1], inputs.v_BSGV[:, :, g : g + 1]
            alone = replace(inputs, q_BTHD=q_BTMD, k_BSGD=k_BSGD, v_BSGV=v_BSGV, sinks_H=sinks[g])
            topk_BTK = keep_short_pasts(
                self.select(alone, topk), inputs.start_BT, inputs.stop_BT, dense_up_to
            )
            q_BTMD, k_BSGD, v_BSGV = (x.contiguous() for x in (q_BTMD, k_BSGD, v_BSGV))
            outs.append(sparse_attention(q_BTMD, k_BSGD, v_BSGV, topk_BTK, *alone.softmax)[0])
        return torch.cat(outs, dim=2)


@dataclass(frozen=True)
class WindowSelector(Selector):
    """The first `sinks` visible keys and the most recent ones: sparse attention without an indexer.

    Source: StreamingLLM (arXiv 2309.17453). The sinks take at most half of the k keys.
    """

    sinks: int = SINKS

    def select(self, inputs: SelectionInputs, topk: int) -> Tensor:
        start_BT1, stop_BT1 = inputs.start_BT[..., None], inputs.stop_BT[..., None]
        column_K = torch.arange(min(topk, inputs.k_BSGD.shape[1]), device=start_BT1.device)
        skipped_BT1 = (stop_BT1 - start_BT1 - topk).clamp(min=0)
        is_recent_K = column_K >= min(self.sinks, topk // 2)
        keys_BTK = start_BT1 + column_K + torch.where(is_recent_K, skipped_BT1, 0)
        return torch.where(keys_BTK < stop_BT1, keys_BTK, -1).int()


@dataclass(frozen=True)
class RandomSelector(Selector):
    """Any visible keys, all equally likely: the floor.

    A pure function of the seed, the layer, and the positions of query and key in the row's text; so a text
    gives the same keys whole, in chunks, token by token and padded.
    """

    seed: int = 0

    def select(self, inputs: SelectionInputs, topk: int) -> Tensor:
        n_keys = inputs.k_BSGD.shape[1]
        chosen_BTK = _nothing_chosen(inputs, topk)
        for b in range(len(inputs.q_BTHD)):
            for rows in _row_blocks(inputs):
                start_R, stop_R = inputs.start_BT[b, rows], inputs.stop_BT[b, rows]
                key_RS = torch.arange(n_keys, device=start_R.device) - start_R[:, None]
                query_R1 = (stop_R - start_R)[:, None]
                noise_RS = _hash_noise((self.seed, inputs.layer_idx), query_R1, key_RS)[None]
                chosen_BTK[b, rows] = select_topk(noise_RS, start_R[None], stop_R[None], topk)[0]
        return chosen_BTK


class LayerRecall(NamedTuple):
    """Attention on the keys that a selection keeps in one layer, and on the best k keys; shares of 1."""

    layer: int
    captured: float
    oracle: float


class RecallSelector(Selector):
    """Selects as `inner` does, and adds up shares of attention of every `stride`-th query that counts."""

    def __init__(self, inner: Selector, stride: int = RECALL_STRIDE) -> None:
        self.inner, self.stride = inner, stride
        self._sums: dict[int, list[float]] = {}

    def is_needed(self, n_keys: int, topk: int) -> bool:
        return self.inner.is_needed(n_keys, topk)

    def sums(self) -> list[list[float]]:
        """The sums so far, of plain JSON types: rows of layer, queries, and attention as in the result."""
        return [[layer, *sums] for layer, sums in sorted(self._sums.items())]

    def add_sums(self, sums: Sequence[Sequence[float]]) -> None:
        """Add those of another text."""
        for layer, *more in sums:
            before = self._sums.get(int(layer), [0.0] * len(more))
            self._sums[int(layer)] = [old + new for old, new in zip(before, more, strict=True)]

    def _means(self) -> list[tuple[int, list[float]]]:
        return [(layer, [x / n for x in sums]) for layer, (n, *sums) in sorted(self._sums.items())]

    def _sampled_rows(self, inputs: SelectionInputs, b: int, least: int) -> Iterator[Tensor]:
        """Blocks of the rows that see more than `least` keys."""
        chooses_T = inputs.stop_BT[b] - inputs.start_BT[b] > least
        chooses_T &= torch.arange(len(chooses_T), device=chooses_T.device) % self.stride == 0
        rows_R = chooses_T.nonzero().squeeze(1)
        return iter(rows_R.split(_rows_of_a_block(inputs)) if len(rows_R) else ())

    def _add(self, layer: int, *shares_R: Tensor) -> None:
        self.add_sums([[layer, float(len(shares_R[0])), *(share_R.sum().item() for share_R in shares_R)]])


class AttentionRecallSelector(RecallSelector):
    """Selects as `inner` does, and adds up the attention that this recalls, beside the oracle's.

    Of every `stride`-th query row, those that see more than k keys count; the others lose nothing.
    """

    def select(self, inputs: SelectionInputs, topk: int) -> Tensor | None:
        chosen_BTK = self.inner.select(inputs, topk)
        for b in range(len(inputs.q_BTHD)):
            for rows_R in self._sampled_rows(inputs, b, topk):
                probs_RS = attention_of_rows(inputs, b, rows_R)
                captured_R = probs_RS.sum(-1)
                if chosen_BTK is not None:
                    captured_R = _attention_on(probs_RS, chosen_BTK[b, rows_R], inputs)
                self._add(inputs.layer_idx, captured_R, _most_attention(probs_RS, topk))
        return chosen_BTK

    def result(self) -> list[LayerRecall]:
        """The means so far, in layer order; empty if no query had to leave a key out."""
        return [LayerRecall(layer, *shares) for layer, shares in self._means()]


class LayerCandidates(NamedTuple):
    """Attention on the candidates of a coarse level in one layer, on the keys that two levels and that one
    level would keep, and on the best k keys; shares of 1.
    """

    layer: int
    candidates: float
    two_levels: float
    one_level: float
    oracle: float


class CandidateRecallSelector(RecallSelector):
    """Selects in one level, and adds up the attention that candidates and two levels would recall there.

    Of every `stride`-th query row, those whose candidates are chosen count; of the others all keys are.
    """

    def __init__(self, stride: int = RECALL_STRIDE) -> None:
        super().__init__(OneLevelSelector(), stride)

    def select(self, inputs: SelectionInputs, topk: int) -> Tensor | None:
        one_BTK = self.inner.select(inputs, topk)
        if inputs.coarse is None or one_BTK is None:
            return one_BTK
        count = max(inputs.coarse.n_candidates, topk)
        for b in range(len(inputs.q_BTHD)):
            for rows_R in self._sampled_rows(inputs, b, COARSE_FROM * count):
                probs_RS, some = attention_of_rows(inputs, b, rows_R), _some_rows(inputs, b, rows_R)
                kept = (_candidates(some, count), IndexerSelector().select(some, topk)[0], one_BTK[b, rows_R])
                shares = (_attention_on(probs_RS, chosen_RK, inputs) for chosen_RK in kept)
                self._add(inputs.layer_idx, *shares, _most_attention(probs_RS, topk))
        return one_BTK

    def result(self) -> list[LayerCandidates]:
        """The means so far, in layer order; empty if no query's candidates were chosen."""
        return [LayerCandidates(layer, *shares) for layer, shares in self._means()]


def _attention_on(probs_RS: Tensor, chosen_RK: Tensor, inputs: SelectionInputs) -> Tensor:
    """[R]: what falls on the chosen keys."""
    kept_RS = selection_mask(chosen_RK, inputs.k_BSGD.shape[1])[:, : probs_RS.shape[-1]]
    return probs_RS.mul(kept_RS).sum(-1)


def _most_attention(probs_RS: Tensor, topk: int) -> Tensor:
    """[R]: what falls on the best `topk` keys."""
    return probs_RS.topk(min(topk, probs_RS.shape[-1])).values.sum(-1)


def _some_rows(inputs: SelectionInputs, b: int, rows_R: Tensor) -> SelectionInputs:
    """What an index needs of some queries of one text, as a batch of its own."""
    coarse = inputs.coarse
    assert coarse is not None
    at, text = (slice(b, b + 1), rows_R), slice(b, b + 1)
    return replace(
        inputs,
        index_q_BTJE=inputs.index_q_BTJE[at],
        index_k_BSIE=inputs.index_k_BSIE[text],
        index_w_BTJ=inputs.index_w_BTJ[at],
        index_b_BTJ=inputs.index_b_BTJ[at],
        start_BT=inputs.start_BT[at],
        stop_BT=inputs.stop_BT[at],
        coarse=CoarseInputs(coarse.q_BTMN[at], coarse.k_BSX[text], coarse.b_BTM[at], coarse.n_candidates),
    )


def _candidates(some: SelectionInputs, count: int) -> Tensor:
    """candidates_RC: who keeps as many keys as there are candidates keeps all of these."""
    assert some.coarse is not None
    index = (some.index_q_BTJE, some.index_k_BSIE, some.index_w_BTJ, some.index_b_BTJ)
    return two_level_topk(*some.coarse[:3], *index, some.start_BT, some.stop_BT, count, count)[0]


def attention_of_rows(inputs: SelectionInputs, b: int, rows: slice | Tensor) -> Tensor:
    """probs_RS, `mean_attention` of some rows of one text; S ends with the last key that any of them sees."""
    start_R, stop_R = inputs.start_BT[b, rows], inputs.stop_BT[b, rows]
    last = max(int(stop_R.max()), 1)
    return mean_attention(inputs.q_BTHD[b, rows], inputs.k_BSGD[b, :last], start_R, stop_R, *inputs.softmax)


def _nothing_chosen(inputs: SelectionInputs, topk: int) -> Tensor:
    shape = (*inputs.q_BTHD.shape[:2], min(topk, inputs.k_BSGD.shape[1]))
    return torch.full(shape, -1, dtype=torch.int32, device=inputs.q_BTHD.device)


def _row_blocks(inputs: SelectionInputs) -> Iterator[slice]:
    n_rows = _rows_of_a_block(inputs)
    return (slice(low, low + n_rows) for low in range(0, inputs.q_BTHD.shape[1], n_rows))


def _rows_of_a_block(inputs: SelectionInputs) -> int:
    return max(BLOCK_PROBS // (inputs.q_BTHD.shape[2] * inputs.k_BSGD.shape[1]), 1)


def _hash_noise(seeds: tuple[int, int], query_R1: Tensor, key_RS: Tensor) -> Tensor:
    """Numbers in 0 .. 2**24 - 1, exact in float32, that depend on all of the arguments and look random."""
    mixed = torch.zeros_like(query_R1)
    for value in (*seeds, query_R1, key_RS):
        mixed = _mix_bits(mixed + value)
    return (mixed >> 40 & 0xFFFFFF).float()


def _mix_bits(x: Tensor) -> Tensor:
    """Spread every bit over all 64 (the finaliser of SplitMix64, Steele et al., OOPSLA 2014)."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted_right(x, 31)


def _shifted_right(x: Tensor, bits: int) -> Tensor:
    """Zeros come in from the left, which torch's shift of signed numbers does not do."""
    return x >> bits & (1 << 64 - bits) - 1


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant
