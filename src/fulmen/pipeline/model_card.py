"""The model card (README.md) of a converted model: how it was made, how to load it, what was measured."""

from pathlib import Path
from typing import Any

from fulmen.files import write_file
from fulmen.modeling.families import dsa_family_for_type
from fulmen.modeling.lengths import LENGTH_OVER_UNTRAINED_TOPK

PARITY_BEGIN, PARITY_END = "<!-- parity:begin -->", "<!-- parity:end -->"


def conversion_card(record: dict[str, Any], model_type: str) -> str:
    """The card of a fresh conversion; the parity table is filled in by `fulmen eval`."""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- deepseek-sparse-attention
- fulmen
---

# {record["source"]} with DeepSeek Sparse Attention

Made by fulmen {record["made_with"]["fulmen"]} from `{record["source"]}`. {_indexer_sentence(record["dsa"])}
{_backbone_sentence(record["stages"])} Stages: {", ".join(record["stages"])};
seed {record["seed"]}.

```python
import fulmen  # or trust_remote_code=True without it
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/of/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/of/this/directory")
```

`fulmen.set_topk(model, k)` changes how many tokens a query keeps; at or above the length the model is dense.
{_untrained_paragraph(record)}{_ties_paragraph(model_type)}
## Parity with the dense model

{PARITY_BEGIN}
Not measured yet: `fulmen eval` on this directory writes the table here.
{PARITY_END}
"""


def card_with_images(card: str) -> str:
    """The card of a model that reads images: how it is loaded, and what it was calibrated with."""
    for text, images in (
        ("text-generation", "image-text-to-text"),
        ("AutoModelForCausalLM", "AutoModelForImageTextToText"),
        ("tokenizer = AutoTokenizer", "processor = AutoProcessor"),
        ("AutoTokenizer", "AutoProcessor"),
        ("All weights were trained", "All weights of its language model were trained, on texts,"),
    ):
        card = card.replace(text, images)
    calibrated = "Its indexers saw texts, and no image: what is measured below is measured on texts too.\n\n"
    return card.replace("## Parity", f"{calibrated}## Parity")


def _backbone_sentence(stages: list[str]) -> str:
    if "sparse" in stages:
        return "All weights were trained under sparse attention, with the dense model as teacher."
    return "All other weights are the dense model's own, under their own names."


def _untrained_paragraph(record: dict[str, Any]) -> str:
    if set(record["stages"]) != {"inherit"}:
        return ""
    topk = record["dsa"]["topk"]
    longest = LENGTH_OVER_UNTRAINED_TOPK * topk
    return f"""
Nothing was trained. With k = {topk} it is meant for texts of up to {longest} tokens, of which k is an
eighth: of longer ones look-ups are lost before the loss shows it. Take a larger k for those
(`fulmen.set_topk`), or train: `fulmen train`.
"""


def _indexer_sentence(dsa: dict[str, Any]) -> str:
    return (
        f"A lightning indexer ({dsa['index_n_heads']} heads of {dsa['index_head_dim']} dims, "
        f"{dsa['index_n_kv_heads']} index key heads) picks {dsa['topk']} tokens for every query "
        f"in {len(dsa['layers'])} layers{_spread(dsa)}{_levels(dsa)}."
    )


def _levels(dsa: dict[str, Any]) -> str:
    if not (width := dsa.get("coarse_head_dim")):
        return ""
    return f", from {dsa['candidate_factor']} times as many that coarse heads of {width} dims leave"


def _ties_paragraph(model_type: str) -> str:
    if not dsa_family_for_type(model_type).is_stock:
        return ""
    return """
Of tokens with equal index scores fulmen keeps the most recent. Transformers' own class uses `torch.topk`,
which keeps any of them: without fulmen, logits may differ where fewer than k tokens score above 0.
"""


def _spread(dsa: dict[str, Any]) -> str:
    shares = dsa["topk_shares"] or [1]
    if min(shares) == max(shares):
        return ""
    least, most = (round(dsa["topk"] * share) for share in (min(shares), max(shares)))
    return f" on average, {least} to {most} by layer"


def fill_parity(model_dir: Path, table: str) -> None:
    """Put a Markdown table between the card's parity marks; leave a card without marks alone."""
    card = model_dir / "README.md"
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    head, begin, rest = text.partition(PARITY_BEGIN)
    _, end, tail = rest.partition(PARITY_END)
    if begin and end:
        write_file(card, f"{head}{begin}\n{table.strip()}\n{end}{tail}")
