"""What is reported: medians of the rounds, ratios of a round, straight lines to lengths that were not run."""

from collections.abc import Iterable
from statistics import median
from typing import Any

OURS, QUANTISED = "vllm dsa", "Q4_1"

Seconds = dict[str, list[float]]
"""Of each engine, in each round."""


def times_faster(seconds: Seconds, engine: str, peer: str) -> float:
    """Median over rounds of how often an engine's time goes into the peer's."""
    return median(b / a for a, b in zip(seconds[engine], seconds[peer], strict=True))


def extrapolate(
    shorter: tuple[int, list[float]], longer: tuple[int, list[float]], length: int
) -> list[float]:
    """Seconds of each round at `length`, on the line through two (length, seconds of each round)."""
    (near, low), (far, high) = shorter, longer
    return [a + (b - a) * (length - near) / (far - near) for a, b in zip(low, high, strict=True)]


def finished(cells: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cells in order of length, with ratios, and with decode times of engines run at two shorter lengths."""
    run: dict[str, list[tuple[int, list[float]]]] = {}
    done = []
    for cell in cells:
        seconds = dict(cell["seconds"])
        if cell["work"] == "decode":
            for name in [name for name in run if name not in seconds and len(run[name]) > 1]:
                seconds[name] = extrapolate(*run[name][-2:], cell["length"])
            for name, times in cell["seconds"].items():
                run.setdefault(name, []).append((cell["length"], times))
        extrapolated = [name for name in seconds if name not in cell["seconds"]]
        done.append({**cell, "seconds": seconds, "extrapolated": extrapolated, "ratios": compare(seconds)})
    return done


def compare(seconds: Seconds) -> dict[str, Any]:
    """Times faster: DSA than dense in each engine; ours than the best dense engine, of all and of 16 bits."""
    ratios: dict[str, Any] = {
        f"{name} over dense": times_faster(seconds, name, peer)
        for name in seconds
        if (peer := name.replace("dsa", "dense")) != name and peer in seconds
    }
    dense = [name for name in seconds if not name.endswith("dsa")]
    for title, peers in (
        ("best peer", dense),
        ("best 16-bit peer", [name for name in dense if QUANTISED not in name]),
    ):
        if OURS in seconds and peers:
            best = min(peers, key=lambda name: median(seconds[name]))
            ratios[f"{OURS} over {title}"] = times_faster(seconds, OURS, best)
            ratios[title] = best
    return ratios


def table(cells: list[dict[str, Any]], engines: Iterable[str]) -> str:
    """Markdown, a column for each cell: "~" before what was extrapolated, "-" for what was not measured."""
    heads = [f"{cell['work']} {cell['length']}" for cell in cells]
    rows = [["", *heads], ["---"] * (len(heads) + 1)]
    rows += [[name, *(time_text(cell, name) for cell in cells)] for name in engines]
    ratios = [cell["ratios"] for cell in cells]
    for name in (OURS, "transformers dsa"):
        rows.append(
            [f"{name}, times faster than dense", *(number(x.get(f"{name} over dense")) for x in ratios)]
        )
    for title in ("best peer", "best 16-bit peer"):
        texts = [f"{number(x.get(f'{OURS} over {title}'))} ({x.get(title, 'none')})" for x in ratios]
        rows.append([f"{OURS}, times faster than the {title}", *texts])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def time_text(cell: dict[str, Any], name: str) -> str:
    """Milliseconds of a token, or seconds of a prompt."""
    if name not in cell["seconds"]:
        return "-"
    seconds = median(cell["seconds"][name])
    text = f"{seconds * 1e3:.1f} ms" if cell["work"] == "decode" else f"{seconds:.2f} s"
    return f"~{text}" if name in cell["extrapolated"] else text


def number(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"
