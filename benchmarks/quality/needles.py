"""Multi-key needles with enough questions to tell a few points apart, dense against DSA.

    python -m benchmarks.quality.needles out/smollm2-135m-dsa --lengths 1024,2048 --texts 8
    python -m benchmarks.quality.needles out/smollm2-135m-trained --before out/smollm2-135m-dsa

Eight numbers in a text, one question about each; a text is read once per variant. Prints the counts and DSA
minus dense in points, with an interval that knows which questions share a text, as JSON.
"""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from fulmen.data import load_corpus
from fulmen.evaluation.parity.needles import needle_samples, sample_groups, score_samples
from fulmen.evaluation.parity.tables import needle_tables
from fulmen.evaluation.variants import VariantRunner, current_topk
from fulmen.modeling.families import accelerated
from fulmen.pipeline.load import load_converted


def main(
    model_dir: Path,
    lengths: str = "1024,2048",
    texts: Annotated[int, typer.Option(help="Texts per length.")] = 8,
    keys: Annotated[int, typer.Option(help="Needles and questions per text.")] = 8,
    topk: Annotated[int | None, typer.Option(help="Default: the model's own.")] = None,
    before: Annotated[
        Path | None,
        typer.Option(help="What fulmen train began with, to be read densely. Default: the model itself."),
    ] = None,
    seed: int = 0,
) -> None:
    """Measure and print."""
    model, tokenizer = load_converted(model_dir)
    topk = topk or current_topk(model)
    first = model if before is None else load_converted(before)[0]
    runners, heldout = (
        {"dense": VariantRunner(first, None), "dsa": VariantRunner(model, None)},
        load_corpus().heldout,
    )
    samples = [
        sample
        for length in lengths.split(",")
        for sample in needle_samples(heldout, tokenizer, int(length), texts, n_keys=keys, seed=seed)
    ]
    answers: dict[str, list[bool]] = {"dense": [], "dsa": []}
    clock = time.perf_counter()
    with accelerated(model), accelerated(first):
        for group in sample_groups(samples):
            for name, right in answers.items():
                with runners[name].running(name, topk, 0, "needles"):
                    right += score_samples(runners[name].model, group)
    table = needle_tables(samples, answers)
    seconds = round(time.perf_counter() - clock)
    for row in [*table["differences"], {"task": "all", "n": len(samples), "pairs": table["pairs"]}]:
        print(json.dumps(row))
    print(json.dumps({"topk": topk, "dsa_minus_dense": table["dsa_minus_dense"], "seconds": seconds}))


if __name__ == "__main__":
    typer.run(main)
