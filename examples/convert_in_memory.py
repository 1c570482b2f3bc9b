"""A model that is already in memory becomes sparse: no training, one minute for a model of 135 M parameters.

    python examples/convert_in_memory.py Qwen/Qwen3-0.6B --out out/qwen3 --topk 512

Texts to calibrate on are a list of strings, here Python's own sources.
"""

import argparse
import os
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import fulmen


def main(model: str, out: Path, topk: int, files: int) -> None:
    """Load the dense model, convert it, generate with both."""
    dense = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    sources = sorted(Path(os.__file__).parent.glob("*.py"))[:files]
    texts = [source.read_text(encoding="utf-8", errors="replace") for source in sources]

    made = fulmen.convert(
        dense,
        tokenizer=tokenizer,
        out=out,
        topk=topk,
        stages=("inherit",),
        texts=texts,
        reporter=fulmen.LineReporter(),
    )
    sparse, _ = made.load()
    inputs = tokenizer(texts[0], return_tensors="pt", truncation=True, max_length=2 * topk)
    for name, one in (("dense", dense), ("sparse", sparse)):
        answer = one.generate(**inputs, max_new_tokens=16, do_sample=False)[0]
        print(f"{name:6} {tokenizer.decode(answer[inputs['input_ids'].shape[1] :])!r}")
    print(f"wrote {made.path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a directory, or a name on the Hugging Face hub")
    parser.add_argument("--out", type=Path, default=Path("out/in-memory"))
    parser.add_argument("--topk", type=int, default=256, help="keys that each query keeps")
    parser.add_argument("--files", type=int, default=60, help="of Python's sources, to calibrate on")
    main(**vars(parser.parse_args()))
