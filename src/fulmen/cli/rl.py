"""`fulmen rl`: options only; the work is `fulmen.rl`."""

from pathlib import Path
from typing import Annotated

import typer

from fulmen.cli.device_option import Device
from fulmen.cli.progress import reporter
from fulmen.pipeline.api_rl import rl
from fulmen.pipeline.rl_settings import DEFAULT_KL
from fulmen.pipeline.settings import AUTO_DEVICE


def rl_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A converted model's directory, or a dense model: its directory, hub name or GGUF file.",
            show_default=False,
        ),
    ],
    task: Annotated[
        list[str],
        typer.Option(
            metavar="NAME[:KEY=VALUE,...]",
            help="What is rewarded, with parameters, as spell_backward:max_word_len=5; kl=0.01 among them is "
            "this task's KL. May be repeated: a step's prompts are theirs in turn.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(help="Directory for the trained model; made whole or not at all.", show_default=False),
    ],
    steps: Annotated[int, typer.Option(help="Optimizer steps.", show_default=False)],
    prompts: Annotated[int, typer.Option(help="Problems of a step.")] = 8,
    group: Annotated[int, typer.Option(help="Replies to each, compared with one another.")] = 8,
    updates: Annotated[
        int, typer.Option(help="Steps on one call of the engine; above 1 the later ones are off-policy.")
    ] = 1,
    micro_batch: Annotated[
        int | None,
        typer.Option(
            help="Replies in one forward pass. Default: 8, more where they are short.", show_default=False
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Where a reply is cut.")] = 128,
    temperature: Annotated[float, typer.Option(help="Divides the logits.")] = 1.0,
    top_p: Annotated[
        float,
        typer.Option(help="Keep the smallest set of tokens with this probability; training keeps it too."),
    ] = 0.95,
    top_k: Annotated[int, typer.Option(help="Tokens kept at most; 0: all, with --top-p 1.")] = 64,
    kl: Annotated[
        float, typer.Option(help="Strength of the KL to the first model, for tasks that say none.")
    ] = DEFAULT_KL,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", "--lr", help="Default: 1e-4, with --full 1e-5.", show_default=False),
    ] = None,
    lora: Annotated[
        int | None,
        typer.Option(
            metavar="RANK", help="Of low-rank updates, merged at the end. Default: 16.", show_default=False
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Train all weights instead.")] = False,
    indexer: Annotated[
        str, typer.Option(help="frozen, or trained: by a loss of its own beside the policy's.")
    ] = "frozen",
    indexer_learning_rate: Annotated[
        float,
        typer.Option(
            "--indexer-learning-rate", "--indexer-lr", help="Of the indexers, where they are trained."
        ),
    ] = 3e-5,
    clip_low: Annotated[float, typer.Option(help="The ratio's clip below 1.")] = 0.2,
    clip_high: Annotated[float, typer.Option(help="The ratio's clip above 1.")] = 0.2,
    off_policy: Annotated[
        float,
        typer.Option(help="Nats a token that the policy may be away from a bad reply; beyond, it is masked."),
    ] = 0.05,
    cut_weight: Annotated[
        float, typer.Option(help="What the score of a reply that was cut counts for: 1 all, 0 nothing.")
    ] = 0.5,
    rollouts: Annotated[
        str,
        typer.Option(help="What writes the replies: generate (the model itself), vllm (in this process)."),
    ] = "generate",
    memory_gib: Annotated[
        float | None,
        typer.Option("--memory", metavar="GIB", help="Of vLLM's cache. Default: what it needs."),
    ] = None,
    held_out: Annotated[
        int, typer.Option(help="Problems of each task, never trained on, answered before and after.")
    ] = 64,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute layers: less memory, a third slower.")
    ] = False,
    bf16: Annotated[
        bool,
        typer.Option("--bf16", help="Compute in bfloat16; else in float32, whatever the weights are in."),
    ] = False,
    device: Device = AUTO_DEVICE,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 10,
    report_to: Annotated[
        str, typer.Option(help="none, tensorboard or wandb; metrics.jsonl is written anyway.")
    ] = "none",
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model directory at --out.")
    ] = False,
) -> None:
    """Train a model by what its replies are worth: GRPO with the four changes of DeepSeek-V3.2.

    Under sparse attention where the model has it. Problems and scores are those of --task. --out gets the
    model, metrics.jsonl (a line a step) and rl.html (curves, held-out scores before and after); until then
    the metrics are in .NAME.run/rl beside it. Interrupted, even killed, the same command goes on.

    Example: [bold]fulmen rl out/smollm2-dsa --task spell_backward:max_word_len=5 --steps 50 --out out/rl[/]
    """
    told = reporter()
    rl(
        model,
        tasks=task,
        out=out,
        steps=steps,
        prompts=prompts,
        group=group,
        updates=updates,
        micro_batch=micro_batch,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        kl=kl,
        learning_rate=learning_rate,
        lora=lora,
        full=full,
        indexer=indexer,
        indexer_learning_rate=indexer_learning_rate,
        clip_low=clip_low,
        clip_high=clip_high,
        off_policy=off_policy,
        cut_weight=cut_weight,
        rollouts=rollouts,
        memory_gib=memory_gib,
        held_out=held_out,
        checkpointing=checkpointing,
        bf16=bf16,
        device=device,
        save_every=save_every,
        report_to=report_to,
        seed=seed,
        overwrite=overwrite,
        reporter=told,
    )
    told.note(f"Wrote {out}; curves: {out / 'rl.html'}")
