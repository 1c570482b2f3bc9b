"""`fulmen train`: options only; the work is `fulmen.train`."""

from pathlib import Path
from typing import Annotated

import typer

from fulmen.cli.console import renamed
from fulmen.cli.device_option import Device
from fulmen.cli.progress import reporter
from fulmen.pipeline.api import train
from fulmen.pipeline.settings import AUTO_DEVICE, DEFAULT_SPARSE_BUDGET


def train_command(
    model_dir: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="What fulmen convert wrote.", show_default=False),
    ],
    out: Annotated[
        Path,
        typer.Option(help="Directory for the trained model; made whole or not at all.", show_default=False),
    ],
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION",
            help=f"Time: 90s, 30m, 2h. Not with --steps. [dim]Default: {DEFAULT_SPARSE_BUDGET}.[/]",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps, instead of --budget.", show_default=False)
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="Text: a file, a directory of them, or hf:name; may be repeated. Data sets (hf:name, JSONL, "
            "Parquet, directories of these alone) of 100 texts or more are streamed, in their order. "
            "[dim]Default: the documentation and sources that come with Python.[/]",
            show_default=False,
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens per sequence; more than k. [dim]Default: 4 k, at least 2048, at most 4096 (or 2 k "
            "if that is more), within the context; less if the text does not fill that.[/]",
            show_default=False,
        ),
    ] = None,
    sequences: Annotated[
        int | None,
        typer.Option(help="Different sequences at most. [dim]Default: as many as the steps use.[/]"),
    ] = None,
    windows: Annotated[int | None, typer.Option(hidden=True)] = None,
    topk: Annotated[
        int | None,
        typer.Option(
            help="Tokens that each query keeps. [dim]Default: the model's own; the sparse stage keeps a 16th "
            "of --length where that is less.[/]"
        ),
    ] = None,
    stages: Annotated[
        str,
        typer.Option(
            help="sparse: all weights; warmup: the indexers alone; warmup,sparse: both, for a model that was "
            "only inherited. --steps and --budget are the last one's.",
        ),
    ] = "sparse",
    alpha: Annotated[
        float,
        typer.Option(
            help="Share of the teacher in the loss: 1 restores the dense model's own function, 0 "
            "only continues its training on --data.",
        ),
    ] = 1.0,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="A dense model to learn from, with the same tokenizer. [dim]Default: DIR itself before "
            "training, read densely.[/]",
        ),
    ] = None,
    teacher_place: Annotated[
        str,
        typer.Option(
            help="Where its answers come from: live (a copy in memory, asked in every step), disk (asked "
            "once, 512 bytes a token), auto: disk where sequences come more than once.",
        ),
    ] = "auto",
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            "--lr",
            help="Peak learning rate of all weights but the indexers'. Default: 3e-5, with --lora 1e-4.",
        ),
    ] = None,
    indexer_learning_rate: Annotated[
        float,
        typer.Option(
            "--indexer-learning-rate", "--indexer-lr", help="Peak learning rate of the indexers' weights."
        ),
    ] = 3e-5,
    indexer_loss: Annotated[
        str,
        typer.Option(
            help="kl: over the selected keys, as DeepSeek; output: what the selection changes in the layer's "
            "output; both.",
        ),
    ] = "both",
    k_schedule: Annotated[
        str,
        typer.Option(
            help="none: k from the first step on; shrink: from the whole text down to k over half of the "
            "steps; layers: one layer after the other, the last first; dense: never sparse, as a control.",
        ),
    ] = "none",
    lora: Annotated[
        int | None,
        typer.Option(
            metavar="RANK",
            help="Train low-rank updates, merged at the end, where memory is short. Needs peft.",
        ),
    ] = None,
    accumulate: Annotated[int, typer.Option(help="Sequences per step (and process).")] = 1,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute layers: less memory, a third slower.")
    ] = False,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Compute in bfloat16, as is done anyway where weights are.")
    ] = False,
    device: Device = AUTO_DEVICE,
    save_every: Annotated[
        int | None,
        typer.Option(help="Steps between checkpoints. [dim]Default: at the 3 evaluations.[/]"),
    ] = None,
    report_to: Annotated[
        str, typer.Option(help="none, tensorboard or wandb; a log is written anyway.")
    ] = "none",
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model directory at --out.")
    ] = False,
) -> None:
    """Train all weights of a converted model under its sparse attention, taught by the dense model.

    Every second sequence asks and looks up, in the model's chat template: what a sparse model loses first.
    The best step by held-out loss, on ordinary text and at answers, is kept; if none is better, the weights
    stay as they were. Interrupted, the same command goes on. Several processes: accelerate launch
    --num_processes 2 -m fulmen.cli.main train ...

    Example: [bold]fulmen train out/smollm2-dsa --out out/smollm2-trained --budget 1h[/]
    """
    told = reporter()
    train(
        model_dir,
        out=out,
        budget=budget,
        steps=steps,
        data=data or (),
        length=length,
        sequences=renamed("windows", windows, "sequences", sequences),
        topk=topk,
        stages=stages,
        teacher=teacher,
        alpha=alpha,
        teacher_place=teacher_place,
        learning_rate=learning_rate,
        indexer_learning_rate=indexer_learning_rate,
        indexer_loss=indexer_loss,
        k_schedule=k_schedule,
        lora=lora,
        accumulate=accumulate,
        checkpointing=checkpointing,
        bf16=bf16,
        device=device,
        save_every=save_every,
        report_to=report_to,
        seed=seed,
        overwrite=overwrite,
        reporter=told,
    )
    told.note(f"Wrote {out}; next: fulmen eval {out} --dense SOURCE --html report.html")
