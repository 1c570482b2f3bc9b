"""`fulmen sft`: options only; the work is `fulmen.sft`."""

from pathlib import Path
from typing import Annotated

import typer

from fulmen.cli.device_option import Device
from fulmen.cli.progress import reporter
from fulmen.pipeline.api_sft import sft
from fulmen.pipeline.settings import AUTO_DEVICE


def sft_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A converted model's directory, or a dense model: its directory, hub name or GGUF file.",
            show_default=False,
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="JSON lines with messages, the last one the assistant's: that reply is learned.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(help="Directory for the trained model; made whole or not at all.", show_default=False),
    ],
    steps: Annotated[int, typer.Option(help="Optimizer steps.", show_default=False)],
    batch: Annotated[int, typer.Option(help="Chats a step.")] = 8,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", "--lr", help="Default: 2e-4, with --full 2e-5.", show_default=False),
    ] = None,
    lora: Annotated[
        int | None,
        typer.Option(
            metavar="RANK", help="Of low-rank updates, merged at the end. Default: 16.", show_default=False
        ),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Train all weights but the indexers' instead.")
    ] = False,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Compute in bfloat16, as is done anyway where weights are.")
    ] = False,
    device: Device = AUTO_DEVICE,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model directory at --out.")
    ] = False,
) -> None:
    """Fine-tune a model on chats, under sparse attention where it has it.

    The indexers stay as they are. Interrupted, even killed, the same command goes on.

    Example: [bold]fulmen sft out/smollm2-dsa --data verifier.jsonl --steps 300 --out out/verifier[/]
    """
    told = reporter()
    sft(
        model,
        data=data,
        out=out,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        lora=lora,
        full=full,
        bf16=bf16,
        device=device,
        save_every=save_every,
        seed=seed,
        overwrite=overwrite,
        reporter=told,
    )
    told.note(f"Wrote {out}; each step's loss: {out / 'stages' / 'sft.jsonl'}")
