"""A parity measurement in words: its headline, and a table for people."""

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from fulmen.evaluation.parity.results import AccuracyRow, LookupRow, ParityResults, VariantRow
from fulmen.evaluation.statistics import IntervalRow
from fulmen.evaluation.style import VARIANT_LABELS
from fulmen.evaluation.wording import (
    interval_text,
    limits_text,
    nats_text,
    percent,
    points_text,
    signed_percent,
)

# The loss over dense that still counts as parity.
PARITY_MARGIN = 0.01
# The answers, in points, whose loss still counts as none: what 128 questions can tell.
ANSWER_MARGIN = 5.0
PARTS = {2: "half", 4: "a quarter", 8: "an 8th", 16: "a 16th", 32: "a 32nd", 64: "a 64th"}


class _Judged(NamedTuple):
    """holds: whether it is as good as dense; None: not shown. finding, reason: what was found, and why so."""

    holds: bool | None
    finding: str
    reason: str


def short_summary(result: ParityResults) -> list[tuple[str, ...]]:
    """Rows of a table for people, the header first; the same in terminal, README and report."""
    header = ["variant", "loss", "over dense (95 % interval)", "worse kind", "same next token", "KL to dense"]
    columns = _answer_columns(result)
    rows = [(*header, *columns)]
    for name, row in result.variants.items():
        cells = [VARIANT_LABELS[name], f"{row['second_half']:.4f}"]
        if name == "dense":
            cells += ["", "", "", ""]
        else:
            cells += [interval_text(row["over_dense"]), worse_kind_text(row)]
            cells += [percent(row["agreement"], 1), f"{row['kl']:.4f}"]
        answered = [_counted(column[name]) if name in column else "" for column in columns.values()]
        rows.append((*cells, *answered))
    return rows


def _answer_columns(result: ParityResults) -> dict[str, dict[str, AccuracyRow]]:
    """Right answers by variant, under what stands above them."""
    columns: dict[str, dict[str, AccuracyRow]] = {}
    if result.lookups:
        rows = result.lookups["rows"]
        for difference in result.lookups["differences"]:
            k = difference["k"]
            at_k = {row["variant"]: row for row in rows if row["variant"] == "dense" or row["k"] == k}
            columns[f"answers at k = {k:,}"] = {**at_k}
    if result.needles and result.needles["overall"]:
        columns["needles"] = result.needles["overall"]
    return columns


def _counted(row: AccuracyRow) -> str:
    return f"{row['right']} of {row['n']}"


def verdict(result: ParityResults) -> str:
    """The headline in plain words: on loss and answers both, as loss hardly moves while retrieval breaks."""
    length, topk = result.length, result.topk
    asked = result.lookups["length"] if result.lookups else 0
    if topk >= max(length, asked):
        return f"Nothing was tested: k = {topk} covers all {length} tokens, so DSA is dense attention here."
    judged = [_judged_loss(result), _judged_answers(result)]
    if any(one.holds is False for one in judged):
        word = "No parity"
    else:
        word = "Parity" if all(one.holds for one in judged) else "Not shown"
    sentences = "; ".join(f"{one.finding}, {one.reason}" for one in judged)
    return f"{'A quick look. ' if result.quick else ''}{word}: {sentences}."


def _judged_loss(result: ParityResults) -> _Judged:
    row = result.variants["dsa"]
    worse = row["by_kind"][row["worse_kind"]]["over_dense"]
    kind = f"{row['worse_kind']} text" + (", the worse kind" if len(row["by_kind"]) > 1 else "")
    size = f"{_above_or_below(worse['estimate'])} dense on {kind} ({limits_text(worse)})"
    finding = f"with {result.topk} of {result.length} tokens kept, the loss is {size}"
    margin = f"the margin of {percent(PARITY_MARGIN, 0)}"
    if result.topk >= result.length:
        return _Judged(
            None, f"k = {result.topk} covers all {result.length} tokens", "where loss tells nothing"
        )
    if worse["low"] is None or worse["high"] is None:
        return _Judged(None, finding, "which more sequences would tell")
    if worse["high"] <= PARITY_MARGIN:
        return _Judged(True, finding, f"within {margin}")
    if worse["low"] > PARITY_MARGIN:
        return _Judged(False, finding, f"beyond {margin}")
    return _Judged(None, finding, f"where the interval reaches beyond {margin}")


def _judged_answers(result: ParityResults) -> _Judged:
    found = _answers_judged_by(result)
    if found is None:
        return _Judged(None, "no question was asked", "and answers are lost long before loss tells")
    lost, gained, dense_right, n, gap = found
    low, high = gap["low"], gap["high"]
    finding = f"of dense's {dense_right} answers to {n} questions {lost} are lost and {gained} others gained"
    if low is not None and high is not None:
        finding += f" ({gap['estimate']:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f})"
    margin = f"the margin of {ANSWER_MARGIN:.0f} points"
    if 2 * dense_right < n:
        return _Judged(None, finding, "where dense has too few to lose")
    if low is None or high is None:
        return _Judged(None, finding, "which more texts would tell")
    if low >= -ANSWER_MARGIN:
        return _Judged(True, finding, f"within {margin}")
    if high < 0 and gap["estimate"] < -ANSWER_MARGIN:
        return _Judged(False, finding, f"beyond {margin}")
    return _Judged(None, finding, f"where the interval reaches beyond {margin}")


def _answers_judged_by(result: ParityResults) -> tuple[int, int, int, int, IntervalRow] | None:
    """Answers lost, gained, right by dense, and in all, and the difference; of its own k, or the worst."""
    if result.lookups:
        differences = result.lookups["differences"]
        own = [row for row in differences if row["k"] == result.topk] or differences
        row = min(own, key=lambda row: row["dsa_minus_dense"]["estimate"])
        dense = next(row["right"] for row in result.lookups["rows"] if row["variant"] == "dense")
        return row["lost"], row["gained"], dense, row["n"], row["dsa_minus_dense"]
    needles = result.needles
    if not needles or not needles["pairs"] or not needles["dsa_minus_dense"]:
        return None
    pairs = needles["pairs"]
    dense, n = pairs["both"] + pairs["dense_only"], sum(pairs.values())
    return pairs["dense_only"], pairs["dsa_only"], dense, n, needles["dsa_minus_dense"]


def lookup_verdict(result: ParityResults) -> str:
    """Answers written, lost and gained, and what took them; empty where none was asked for."""
    found = result.lookups
    if found is None:
        return ""
    dense = next(row for row in found["rows"] if row["variant"] == "dense")
    how = "in the model's chat template" if found["is_chat"] else "behind two worked examples"
    sentences = [
        f"Look-ups, {how}: {dense['n']} questions about {found['texts']} texts of {found['length']:,} tokens "
        f"with {found['n_keys']} keys of one form each; dense answers {dense['right']}."
    ]
    for row in found["differences"]:
        split = row["split"]
        sentences.append(
            f"At k = {row['k']:,} ({share_of(row['k'], found['length'])}) DSA loses {row['lost']} of these "
            f"answers and gains {row['gained']}: {points_text(row['dsa_minus_dense'])} points, of which "
            f"budget {split['budget']:+.1f}, index {split['index']:+.1f}, "
            f"split of k {split['split_of_k']:+.1f}"
            + (f", coarse level {split['coarse']:+.1f}." if "coarse" in split else ".")
        )
    alone = [row for row in found["rows"] if row["variant"] == "key_head_oracle"]
    return " ".join([*sentences, _per_head(alone)] if alone else sentences)


def _per_head(rows: Sequence[LookupRow]) -> str:
    """How far one set of keys for all heads can go, told by what does not have that limit."""
    texts, dense = rows[0]["texts"], rows[0]["dense_right"]
    counts = " and ".join(f"{row['right']} of {row['n']} at k = {row['k']:,}" for row in rows)
    return (
        f"An oracle with keys of its own for each key head (on {texts} texts alone, as it is slow) answers "
        f"{counts}, dense {dense}."
    )


def share_of(k: int, length: int) -> str:
    """What part of the text a query keeps: "a 16th", or percent."""
    if length % k == 0 and (named := PARTS.get(length // k)):
        return named
    return percent(k / length, 1)


def coarse_verdict(result: ParityResults) -> str:
    """What two levels lose beyond one, and what candidates hold; empty for an index of one level."""
    found = result.coarse
    if found is None:
        return ""
    why = ""
    if found["k"] != result.topk:
        nothing = found["asked_from"] // found["k"] * result.topk
        why = f", as at k = {result.topk:,} both levels are one up to {nothing:,} tokens"
    over = found["over_one_level"]
    sentences = [
        f"Coarse level, at k = {found['k']:,}{why}: of more than {found['asked_from']:,} tokens it chooses "
        f"{found['candidates']:,} candidates; against one level two lose {nats_text(found['gap'])} nats a "
        f"token, {signed_percent(over['estimate'])} ({limits_text(over)})."
    ]
    if found["layers"]:
        mean = fmean(row["candidates"] for row in found["layers"])
        least = min(found["layers"], key=lambda row: row["candidates"])
        held = f"Candidates hold {percent(mean)} of the attention"
        sentences.append(f"{held}, in layer {least['layer']} the least: {percent(least['candidates'])}.")
    return " ".join(sentences)


def needle_verdict(result: ParityResults) -> str:
    """Retrieval in plain words; empty without needles."""
    found = result.needles
    if not found or not found["overall"]:
        return ""
    dsa, dense = found["overall"]["dsa"], found["overall"]["dense"]
    pairs, gap = found["pairs"], found["dsa_minus_dense"]
    assert pairs, "questions have answers in pairs"
    assert gap
    limits = "no interval from one text"
    if gap["low"] is not None:
        limits = f"95 % interval {gap['low']:+.1f} to {gap['high']:+.1f}"
    return (
        f"Retrieval: DSA answers {dsa['right']} of {dsa['n']} questions about {found['texts']} texts, dense "
        f"{dense['right']}: {gap['estimate']:+.1f} points ({limits}). Both right {pairs['both']}, only dense "
        f"{pairs['dense_only']}, only DSA {pairs['dsa_only']}, neither {pairs['neither']}."
    )


def source_verdict(result: ParityResults) -> str:
    """The comparison with the model before conversion, in plain words; empty without it."""
    source = result.source
    if source is None:
        return ""
    over = source["dsa_over_source"]
    return (
        f"Against the model before conversion: its dense loss and ours differ by at most "
        f"{source['max_window_difference']:.1e} nats per token on a text; DSA's loss is "
        f"{_above_or_below(over['estimate'])} it ({limits_text(over)})."
    )


def worse_kind_text(row: VariantRow) -> str:
    """The loss over dense of the worse kind of text, with its name."""
    kind = row["worse_kind"]
    return f"{signed_percent(row['by_kind'][kind]['over_dense']['estimate'])} {kind}"


def _above_or_below(share: float) -> str:
    return f"{percent(abs(share))} {'above' if share >= 0 else 'below'}"
