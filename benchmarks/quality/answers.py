"""What answers need: the change at answers and in the text around, with k shared otherwise among the layers.

    python -m benchmarks.quality.answers out/qwen --length 4096 --topk 256 --texts 4
    python -m benchmarks.quality.answers out/qwen --variants as-made,key-head-oracle,oracle --texts 1

Held-out texts that ask several questions each (forms of training), read once by the dense model and once per
variant: KL(dense || variant) in nats a token at answers' tokens and over the second half of the text, and how
many of the answers' tokens are still the dense model's likeliest. "dense:A-B" leaves nothing out in layers A
to B, which costs more k; "double:A-B" doubles k there and takes it from the others. A JSON line per variant.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel

from fulmen.data import load_corpus, lookup_sequences
from fulmen.evaluation.controls import KeyHeadOracleSelector, OracleSelector
from fulmen.modeling.families import accelerated, dsa_of, set_topk
from fulmen.modeling.gqa.model import set_topk_ratios
from fulmen.modeling.selectors import DenseSelector, IndexerSelector, Selector, use_selector
from fulmen.pipeline.load import load_converted
from fulmen.training.rows import before_answers

SELECTORS: dict[str, Callable[[], Selector]] = {
    "key-head-oracle": KeyHeadOracleSelector,
    "oracle": OracleSelector,
}
USUAL = "as-made,even,half-way,k+50%,dense:0-3,dense:10-13,dense:20-23,double:0-3,double:10-13,double:20-23"
# Rows of the text around, at most.
TEXT_ROWS = 256


def main(
    model_dir: Path,
    length: int = 4096,
    topk: int = 256,
    texts: Annotated[int, typer.Option(help="Held-out texts, each with several questions.")] = 4,
    variants: Annotated[str, typer.Option(help="Of k, split and selection.")] = USUAL,
) -> None:
    """Measure and print."""
    model, tokenizer = load_converted(model_dir)
    asked = lookup_sequences(load_corpus().heldout, tokenizer, length, texts, seed=1)
    rows = [(before_answers(one.answers), text_rows(one.input_ids)) for one in asked]
    with accelerated(model):
        dense = [
            read(model, one.input_ids, parts, DenseSelector()) for one, parts in zip(asked, rows, strict=True)
        ]
        own = dsa_of(model.config).topk_shares or (1.0,) * len(dsa_of(model.config).layers)
        for variant in variants.split(","):
            clock = time.perf_counter()
            wanted = ratios_of(variant, own, length / topk)
            mean = sum(wanted) / len(wanted)
            set_topk_ratios(model, [ratio / mean for ratio in wanted])
            set_topk(model, round(topk * mean))
            selector = SELECTORS.get(variant, IndexerSelector)()
            found = [
                changes(read(model, one.input_ids, parts, selector), reference)
                for one, parts, reference in zip(asked, rows, dense, strict=True)
            ]
            answers, text, same = torch.tensor(found).mean(0).tolist()
            row = {"variant": variant, "length": length, "topk": topk, "texts": texts}
            row |= {
                "kl_answers": round(answers, 4),
                "kl_text": round(text, 5),
                "same_likeliest": round(same, 4),
            }
            print(json.dumps({**row, "seconds": round(time.perf_counter() - clock)}), flush=True)


def ratios_of(variant: str, own: Sequence[float], dense: float) -> list[float]:
    """k of each layer over the usual k; `dense` is the ratio at which nothing is left out."""
    if variant == "even":
        return [1.0] * len(own)
    if variant == "half-way":
        return [(1 + ratio) / 2 for ratio in own]
    if variant == "k+50%":
        return [1.5 * ratio for ratio in own]
    name, _, layers = variant.partition(":")
    if name not in ("dense", "double"):
        return list(own)
    first, last = map(int, layers.split("-"))
    raised = [
        (dense if name == "dense" else 2 * ratio) if first <= layer <= last else ratio
        for layer, ratio in enumerate(own)
    ]
    factor = 1.0 if name == "dense" else len(own) / sum(raised)
    return [ratio * factor for ratio in raised]


def text_rows(ids_T: Tensor) -> Tensor:
    """Evenly over the second half."""
    return torch.linspace(len(ids_T) // 2, len(ids_T) - 1, TEXT_ROWS).long().unique()


@torch.no_grad()
def read(model: PreTrainedModel, ids_T: Tensor, parts: Sequence[Tensor], selector: Selector) -> list[Tensor]:
    """Log probabilities [R, V] of the next token at the rows of each part."""
    with use_selector(model, selector):
        hidden_TC = model.base_model(ids_T[None], use_cache=False).last_hidden_state[0]
    head = model.get_output_embeddings()
    return [head(hidden_TC[rows]).float().log_softmax(-1) for rows in parts]


def changes(sparse: Sequence[Tensor], dense: Sequence[Tensor]) -> tuple[float, float, float]:
    """KL at answers and in the text, and the share of answers' tokens with the same likeliest one."""
    kl = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(dense, sparse, strict=True)]
    same = (sparse[0].argmax(-1) == dense[0].argmax(-1)).float().mean()
    return kl[0], kl[1], float(same)


if __name__ == "__main__":
    typer.run(main)
