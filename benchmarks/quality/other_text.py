"""Does an indexer fit text unlike that it was calibrated on? Inherit from one kind, measure on both.

    python -m benchmarks.quality.other_text smollm2-135m --windows 4

Prints one JSON line per kind of calibration text: loss of the inherited model over dense on held-out texts of
each kind (second half of the windows).
"""

import json
from itertools import islice
from typing import Annotated

import torch
import typer

from fulmen.data import iter_sequences, load_corpus
from fulmen.evaluation.parity.losses import second_half_loss
from fulmen.evaluation.variants import ModelInput, VariantRunner
from fulmen.modeling.checkpoint import load_dense
from fulmen.modeling.families import family_for
from fulmen.modeling.gqa.inherit import inherit_gqa
from fulmen.modeling.gqa.model import set_topk_ratios
from fulmen.modeling.gqa.topk_ratios import fit_topk_ratios
from fulmen.modeling.index_shape import default_dsa
from fulmen.pipeline.texts import kinds_of


def main(
    source: str,
    topk: int = 256,
    windows: Annotated[int, typer.Option(help="Held-out texts per kind.")] = 4,
    length: int = 2048,
    calibration: Annotated[int, typer.Option(help="Calibration texts, of twice the length.")] = 4,
) -> None:
    """Measure and print."""
    dense, tokenizer = load_dense(source, torch.float32)
    model = family_for(dense.config).from_dense(dense, default_dsa(dense.config, topk)).eval()
    corpus, runner = load_corpus(), VariantRunner(model, None)
    kinds = kinds_of(corpus.heldout)

    def losses(variant: str) -> dict[str, float]:
        mean = {}
        for kind in kinds:
            texts = islice(iter_sequences(corpus.heldout, tokenizer, length, kind=kind), windows)
            found = [
                second_half_loss(
                    runner.hidden(variant, ModelInput.of(text), topk, text.name),
                    model.get_output_embeddings(),
                    text.input_ids,
                )
                for text in texts
            ]
            mean[kind] = sum(found) / len(found)
        return mean

    reference = losses("dense")
    for kind in kinds:
        texts = islice(iter_sequences(corpus.calibration, tokenizer, 2 * length, kind=kind), calibration)
        ids_BT = torch.stack([text.input_ids for text in texts])
        set_topk_ratios(model, fit_topk_ratios(model, ids_BT[:2], topk))
        inherit_gqa(model, ids_BT, topk)
        over = {name: loss / reference[name] - 1 for name, loss in losses("dsa").items()}
        print(json.dumps({"calibrated_on": kind, "over_dense": over}), flush=True)


if __name__ == "__main__":
    typer.run(main)
