"""Peak memory and time of warm-up steps, in a process of its own.

.venv/bin/python benchmarks/warmup_memory.py out/smollm2-135m-dsa --length 8192 --topk 512
"""

import json
import resource
import time
from pathlib import Path

import torch
import typer

from fulmen.cli.chat_session import load_converted
from fulmen.corpus import load_corpus, windows
from fulmen.modeling.model import set_topk
from fulmen.training.warmup import IndexerStack, WarmupSettings


def main(model_dir: Path, length: int = 8192, topk: int = 512, steps: int = 2) -> None:
    """Run a few steps, backward pass and optimizer included, and print one JSON line."""
    model, tokenizer = load_converted(model_dir)
    set_topk(model, topk)
    model.requires_grad_(False)
    stack = IndexerStack(model, WarmupSettings().n_rows)
    stack.indexers.requires_grad_(True)
    optimizer = torch.optim.Adam(stack.indexers.parameters(), lr=1e-9)
    text = windows(load_corpus().training, tokenizer, length, 1)[0]
    seconds = []
    for _ in range(steps):
        clock = time.perf_counter()
        stack(text.input_ids[None])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(round(time.perf_counter() - clock, 1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"length": length, "topk": topk, "seconds": seconds, "peak_gib": round(peak, 2)}))


if __name__ == "__main__":
    typer.run(main)
