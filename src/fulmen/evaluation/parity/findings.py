"""A parity measurement in words: its headline, and a table for people."""

from fulmen.evaluation.parity.results import ParityResults, VariantRow
from fulmen.evaluation.style import VARIANT_LABELS
from fulmen.evaluation.wording import interval_text, limits_text, percent, signed_percent

# The loss over dense that still counts as parity.
PARITY_MARGIN = 0.01


def short_summary(result: ParityResults) -> list[tuple[str, ...]]:
    """Rows of a table for people, the header first; the same in terminal, README and report."""
    needles = result.needles["overall"]
    header = ["variant", "loss", "over dense (95 % interval)", "worse kind", "same next token", "KL to dense"]
    rows: list[tuple[str, ...]] = [(*header, "needles") if needles else tuple(header)]
    for name, row in result.variants.items():
        cells = [VARIANT_LABELS[name], f"{row['second_half']:.4f}"]
        if name == "dense":
            cells += ["", "", "", ""]
        else:
            cells += [interval_text(row["over_dense"]), worse_kind_text(row)]
            cells += [percent(row["agreement"], 1), f"{row['kl']:.4f}"]
        if needles:
            found = needles.get(name)
            cells.append(f"{found['right']} of {found['n']}" if found else "")
        rows.append(tuple(cells))
    return rows


def verdict(result: ParityResults) -> str:
    """The headline in plain words."""
    row, length, topk = result.variants["dsa"], result.length, result.topk
    if topk >= length:
        return f"Nothing was tested: k = {topk} covers all {length} tokens, so DSA is dense attention here."
    worse = row["by_kind"][row["worse_kind"]]["over_dense"]
    finding = f"with {topk} of {length} tokens kept, the loss is {_above_or_below(worse['estimate'])} dense"
    kind = f"{row['worse_kind']} text" + (", the worse kind" if len(row["by_kind"]) > 1 else "")
    finding = f"{finding} on {kind} ({limits_text(worse)})"
    if worse["low"] is None or worse["high"] is None:
        return f"Not shown: {finding}; measure more sequences."
    if worse["high"] <= PARITY_MARGIN:
        return f"Parity: {finding}, within the margin of {percent(PARITY_MARGIN, 0)}."
    if worse["low"] > PARITY_MARGIN:
        return f"No parity: {finding}, beyond the margin of {percent(PARITY_MARGIN, 0)}."
    return f"Not shown: {finding}; the interval reaches beyond the margin of {percent(PARITY_MARGIN, 0)}."


def needle_verdict(result: ParityResults) -> str:
    """Retrieval in plain words; empty without needles."""
    found = result.needles
    if not found["overall"]:
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
