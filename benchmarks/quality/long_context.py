"""Loss over dense at a long context, for a few variants: all of `fulmen eval` takes hours there on a CPU.

    python -m benchmarks.quality.long_context out/smollm2-135m-dsa --length 8192 --topk 512 --windows 8
    python -m benchmarks.quality.long_context out/trained --before out/smollm2-135m-dsa \
        --variants dense,dsa
    python -m benchmarks.quality.long_context out/trained --variants dsa \
        --dense-of out/dsa/long-8192-512.jsonl
    python -m benchmarks.quality.long_context out/trained --before out/dsa --data texts/de --out de.jsonl

One JSON line per text goes to the output file at once, and texts that it holds already are skipped, so the
run can be stopped and continued. The table at the end has the mean loss over dense per kind of text.
"""

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer
from safetensors.torch import load_file

from fulmen.data import iter_sequences, load_corpus
from fulmen.evaluation.parity.losses import second_half_loss
from fulmen.evaluation.variants import ModelInput, VariantRunner
from fulmen.evaluation.wording import signed_percent
from fulmen.pipeline.load import load_converted
from fulmen.pipeline.texts import kinds_of


def main(
    model_dir: Path,
    length: int = 8192,
    topk: int = 512,
    windows: Annotated[int, typer.Option(help="Texts per kind.")] = 8,
    variants: str = "dense,dsa,inherited",
    before: Annotated[
        Path | None,
        typer.Option(
            help="What fulmen train began with: it is read densely, the model itself only sparsely."
        ),
    ] = None,
    dense_of: Annotated[
        Path | None, typer.Option(help="JSON lines of an earlier run, whose dense losses are taken.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="Text; its held-out part is read.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON lines; default: beside the model.")] = None,
) -> None:
    """Measure and print; second half of each text, nats a token."""
    out = out or model_dir / f"long-{length}-{topk}.jsonl"
    done = read_lines(out) if out.exists() else []
    known = {(row["kind"], row["number"]): row["loss"]["dense"] for row in read_lines(dense_of)}
    model, tokenizer = load_converted(model_dir)
    runner = VariantRunner(model, load_file(model_dir / "stages/inherit.safetensors"))
    runners = dict.fromkeys(variants.split(","), runner)
    if before is not None:
        runners["dense"] = VariantRunner(load_converted(before)[0], None)
    heldout = load_corpus(*(data or ())).heldout
    for kind in kinds_of(heldout):
        for number, window in zip(
            range(windows), iter_sequences(heldout, tokenizer, length, kind=kind), strict=False
        ):
            if any((row["kind"], row["number"]) == (kind, number) for row in done):
                continue
            row = {"kind": kind, "number": number, "name": window.name, "loss": {}, "seconds": {}}
            if (kind, number) in known:
                row["loss"]["dense"] = known[kind, number]
            for variant, one in runners.items():
                clock = time.perf_counter()
                text = ModelInput.of(window)
                hidden_TC = one.hidden(variant, text, topk, window.name)
                head = one.model.get_output_embeddings()
                row["loss"][variant] = second_half_loss(hidden_TC, head, text.ids_T)
                row["seconds"][variant] = round(time.perf_counter() - clock, 1)
            done.append(row)
            with open(out, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    print_table(done)


def read_lines(file: Path | None) -> list[dict]:
    """What was measured before; nothing where there is no file."""
    return [] if file is None else [json.loads(line) for line in file.read_text().splitlines()]


def print_table(rows: list[dict]) -> None:
    """Mean loss per kind and variant, and how far it lies over dense."""
    by_kind = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row["loss"])
    for kind, losses in by_kind.items():
        mean = {name: sum(loss[name] for loss in losses) / len(losses) for name in losses[0]}
        if "dense" not in mean:
            print(kind, f"{len(losses)} texts", mean)
            continue
        over = {
            name: f"{value:.4f} ({signed_percent(value / mean['dense'] - 1)})" for name, value in mean.items()
        }
        print(kind, f"{len(losses)} texts", over)


if __name__ == "__main__":
    typer.run(main)
