"""Look-ups among 16 like sentences, answered by generation: dense against DSA, before and after training.

    python -m benchmarks.quality.retrieval out/qwen --lengths 4096,8192 --over 16,8
    python -m benchmarks.quality.retrieval out/qwen-trained --dense out/qwen --lengths 4096,8192 --over 16,8

k is the length over each number of `--over`, or `--topk`. A line of JSON per text, variant and k goes to the
output file at once; what it holds is not measured again, so that a run can be stopped and continued. The
table at the end counts right answers, those lost and gained against dense, and the difference with an
interval that knows which questions share a text.
"""

import json
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from fulmen.data import LookupText, load_corpus, lookup_texts
from fulmen.data.lookup_words import JUDGED, JUDGED_IN_WORDS
from fulmen.evaluation.parity.lookups import is_right, write_answers
from fulmen.evaluation.statistics import clustered_difference_interval
from fulmen.evaluation.variants import VariantRunner
from fulmen.modeling.families import accelerated
from fulmen.pipeline.load import load_converted


class Answers(StrEnum):
    """What is asked for: a code, or a colour and an animal."""

    DIGITS = "digits"
    WORDS = "words"


WORDINGS = {Answers.DIGITS: JUDGED, Answers.WORDS: JUDGED_IN_WORDS}


def main(
    model_dir: Path,
    lengths: str = "4096,8192",
    over: Annotated[str, typer.Option(help="k is the length over each of these.")] = "16,8",
    topk: Annotated[int | None, typer.Option(help="k, instead of --over.")] = None,
    texts: Annotated[int, typer.Option(help="Texts per length.")] = 8,
    keys: Annotated[int, typer.Option(help="Sentences and questions per text.")] = 16,
    answers: Annotated[Answers, typer.Option(help="What is asked for.")] = Answers.DIGITS,
    variants: str = "dense,dsa",
    data: Annotated[list[str] | None, typer.Option(help="Text; its held-out part is read.")] = None,
    kind: Annotated[str | None, typer.Option(help="Of text; default: the kinds take turns.")] = None,
    dense: Annotated[
        Path | None,
        typer.Option(help="What fulmen train began with: read densely. Default: the model itself."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON lines; default: beside the model.")] = None,
) -> None:
    """Measure and print."""
    out = out or model_dir / "lookups.jsonl"
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    model, tokenizer = load_converted(model_dir)
    runners = dict.fromkeys(variants.split(","), VariantRunner(model, None))
    if dense is not None and "dense" in runners:
        runners["dense"] = VariantRunner(load_converted(dense)[0], None)
    heldout = load_corpus(*(data or ())).heldout
    for length in map(int, lengths.split(",")):
        asked = lookup_texts(
            heldout, tokenizer, length, texts, n_keys=keys, kind=kind, wordings=WORDINGS[answers]
        )
        ks = [topk] if topk else [length // int(part) for part in over.split(",")]
        for number, text in enumerate(asked):
            for variant, runner in runners.items():
                for k in [length] if variant == "dense" else ks:
                    row = {"length": length, "answers": answers, "variant": variant, "k": k, "text": number}
                    row["name"] = text.name
                    if any(row.items() <= done.items() for done in rows):
                        continue
                    rows.append({**row, **answered(runner, variant, k, text, tokenizer)})
                    with open(out, "a", encoding="utf-8") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
                    print(length, variant, k, number, sum(rows[-1]["right"]), len(text.lookups), flush=True)
    print_table(rows)


def answered(runner: VariantRunner, variant: str, k: int, text: LookupText, tokenizer: Any) -> dict[str, Any]:
    """What one variant writes about a text, and which of it is right."""
    clock = time.perf_counter()
    with accelerated(runner.model), runner.running(variant, k, 0, text.name):
        written = write_answers(runner.model, text, tokenizer)
    right = [is_right(answer, lookup) for answer, lookup in zip(written, text.lookups, strict=True)]
    return {"right": right, "written": written, "seconds": round(time.perf_counter() - clock, 1)}


def asked_in(row: dict[str, Any]) -> tuple[int, str, int]:
    """Which text was asked what."""
    return row["length"], row["answers"], row["text"]


def print_table(rows: list[dict[str, Any]]) -> None:
    """Per length, answers, variant and k: right ones, lost and gained against dense, difference in points."""
    dense = {asked_in(row): row["right"] for row in rows if row["variant"] == "dense"}
    groups = sorted({(row["length"], row["answers"], row["variant"], row["k"]) for row in rows})
    for length, answers, variant, k in groups:
        same = [
            (row["text"], one, other)
            for row in rows
            if (row["length"], row["answers"], row["variant"], row["k"]) == (length, answers, variant, k)
            for one, other in zip(row["right"], dense.get(asked_in(row), []), strict=False)
        ]
        if not same:
            continue
        where, ours, theirs = zip(*same, strict=True)
        interval = [100 * value for value in clustered_difference_interval(ours, theirs, where)]
        lost = sum(other and not one for _, one, other in same)
        gained = sum(one and not other for _, one, other in same)
        points = " ".join(f"{value:+.1f}" for value in interval)
        print(
            f"{length} {answers} {variant} k={k}: {sum(ours)} of {len(ours)}, dense {sum(theirs)}; "
            f"lost {lost}, gained {gained}; points: mean and interval {points}"
        )


if __name__ == "__main__":
    typer.run(main)
