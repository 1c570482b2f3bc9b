"""Whether vLLM and Transformers stay one policy while its weights change: log-probabilities and chosen keys.

    python -m benchmarks.quality.rollout_gap out/smollm2-135m-dsa --dtype float32
    python -m benchmarks.quality.rollout_gap out/smollm2-135m-dsa --dtype bfloat16 --updates 5

All weights move by a share of their spread, at random; the engine is given them, samples from prompts of
held-out text, and both models score what it sampled. Prints a line of JSON for each update.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import PreTrainedModel

from fulmen.data import load_corpus
from fulmen.modeling.checkpoint import load_directory
from fulmen.modeling.rollouts import Sampling
from fulmen.pipeline.rollout_gap import logprob_gap, selection_gap
from fulmen.serving.engine.rollouts import VllmRollouts
from fulmen.training.rl.gap import GAP_LIMITS


def main(
    model_dir: Path,
    dtype: str = "float32",
    updates: int = 5,
    step: Annotated[float, typer.Option(help="Of a weight, in spreads of its matrix.")] = 0.02,
    length: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 384,
    prompts: int = 2,
    new: Annotated[int, typer.Option(help="Tokens of a reply.")] = 16,
    stale: Annotated[bool, typer.Option(help="Leave the engine its first weights, as a control.")] = False,
) -> None:
    """Measure and print."""
    model, tokenizer = load_directory(model_dir, getattr(torch, dtype))
    text = "\n\n".join(document.text for document in load_corpus().heldout)
    ids = tokenizer(text[: 8 * prompts * length], add_special_tokens=False)["input_ids"]
    asked = [ids[length * number : length * (number + 1)] for number in range(prompts)]
    sampling = Sampling(per_prompt=2, max_new_tokens=new, top_p=0.9, top_k=64)
    engine = VllmRollouts(model_dir, max_model_len=length + new, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for update in range(updates + 1):
        if update:
            move(model, step, generator)
        clock = time.perf_counter()
        if not stale:
            engine.update(model.state_dict().items())
        seconds = time.perf_counter() - clock
        rollouts = engine.generate(asked, sampling)
        gap = logprob_gap(model, asked, rollouts)
        row = {"update": update, **asdict(gap), "limit": GAP_LIMITS[dtype], "update_s": round(seconds, 2)}
        if getattr(model.config, "dsa", None):
            row |= {"selection": asdict(selection_gap(model, engine, asked[:2]))}
        print(json.dumps(row), flush=True)
    engine.close()


@torch.no_grad()
def move(model: PreTrainedModel, step: float, generator: torch.Generator) -> None:
    """A random step of all weights."""
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        spread = parameter.float().std(correction=0)
        parameter.add_(noise, alpha=step * float(spread))


if __name__ == "__main__":
    typer.run(main)
