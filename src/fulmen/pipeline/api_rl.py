"""rl, as `import fulmen` has it: what it is asked is checked before work is imported."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fulmen.pipeline.arguments import Place, flag_argument, path_argument, place_argument
from fulmen.pipeline.conversion import Conversion
from fulmen.pipeline.reporter import Reporter, reporter_of
from fulmen.pipeline.rl_settings import DEFAULT_KL, RlRunSettings, lora_argument, tasks_argument
from fulmen.pipeline.settings import AUTO_DEVICE
from fulmen.tasks.own import GivenTask

if TYPE_CHECKING:
    import torch


def rl(
    source: Place,
    *,
    tasks: GivenTask | Sequence[GivenTask],
    out: Place,
    steps: int,
    prompts: int = 8,
    group: int = 8,
    updates: int = 1,
    micro_batch: int | None = None,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 0.95,
    top_k: int = 64,
    kl: float = DEFAULT_KL,
    learning_rate: float | None = None,
    lora: int | None = None,
    full: bool = False,
    indexer: str = "frozen",
    indexer_learning_rate: float = 3e-5,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    off_policy: float = 0.05,
    cut_weight: float = 0.5,
    rollouts: str = "generate",
    memory_gib: float | None = None,
    held_out: int = 64,
    checkpointing: bool = False,
    bf16: bool = False,
    device: "str | torch.device" = AUTO_DEVICE,
    save_every: int = 10,
    report_to: str = "none",
    seed: int = 0,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Conversion:
    """Train a model, dense or converted, by what its replies to problems are worth (GRPO as DeepSeek-V3.2).

    Under sparse attention, where the model has it. Interrupted, the same call goes on where it was. With the
    model come `metrics.jsonl`, a line a step, and `rl.html`: curves, and held-out scores before and after.

    Args:
        source: a model directory, dense or converted, a name on the hub, a `.gguf` file or "smollm2-135m".
        tasks: what is rewarded: names with parameters, as "spell_backward:max_word_len=5" (`fulmen.tasks`),
            with a KL of their own as "NAME:kl=0.01"; a Python function of `index` that returns a mapping
            with `prompt`, and `answer` or `score`; objects with `problem` and `score`; environments with a
            data set and a rubric, as those of `verifiers`. Each step's prompts are theirs in turn.
        out: directory to write, whole or not at all.
        steps: optimizer steps.
        prompts: problems of a step, of all processes together.
        group: replies to each, which are compared with one another.
        updates: optimizer steps on one call of the engine; above 1 the later ones are off-policy.
        micro_batch: replies in one forward pass; None: 8, and more where they and their prompts are short.
        max_new_tokens: where a reply is cut.
        temperature: divides the logits, in sampling and in training.
        top_p: the smallest set of tokens with this probability is kept; both policies are over that set.
        top_k: tokens kept at most; 0 keeps all, with `top_p` 1.
        kl: strength of the KL to the first model, for tasks that say none.
        learning_rate: None: 1e-4, with `full` 1e-5.
        lora: rank of updates that are merged at the end; None: 16.
        full: train all weights instead.
        indexer: "frozen", or "trained" by a loss of its own.
        indexer_learning_rate: where it is trained.
        clip_low: how far below 1 the ratio of policy and engine has a gradient.
        clip_high: how far above 1.
        off_policy: nats a token that the policy may have moved away from a bad reply; beyond, it is masked.
        cut_weight: what the strict score of a reply that was cut counts for; where scores are partial, one
            that never ends may else be worth as much as a right one.
        rollouts: what writes the replies: "generate" (Transformers, the model itself) or "vllm" (in this
            process).
        memory_gib: of vLLM's cache; None: what it needs.
        held_out: problems of each task, never trained on, that are answered before and after.
        checkpointing: recompute layers: less memory, a third slower.
        bf16: compute in bfloat16: faster where the machine is made for it, and engine and trainer agree less.
            Weights are held in float32 either way.
        device: where to compute, as "cpu" or "cuda"; "auto": on a GPU if torch sees one.
        save_every: steps between checkpoints.
        report_to: "none", "tensorboard" or "wandb"; `metrics.jsonl` is written anyway.
        seed: of every random choice.
        overwrite: replace a model directory at `out`.
        reporter: whom to tell how far it is, as `fulmen.LineReporter()`; None: nobody.

    Raises:
        ConfigError: an argument that cannot be, a task that is not known, or no room in memory.
        CheckpointError, UnsupportedModelError: a source that cannot be read.
        EngineError: vLLM is asked for and not installed.
        RolloutError: engine and trainer do not agree about the sampled tokens.
        OutputError, ResumeError, TrainingDivergedError: as `convert`.
    """
    options = {
        "steps": steps,
        "prompts": prompts,
        "group": group,
        "updates": updates,
        "micro_batch": micro_batch,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "learning_rate": learning_rate,
        "lora": lora_argument(lora, full),
        "indexer": indexer,
        "indexer_learning_rate": indexer_learning_rate,
        "clip_low": clip_low,
        "clip_high": clip_high,
        "off_policy": off_policy,
        "cut_weight": cut_weight,
        "held_out": held_out,
        "checkpointing": checkpointing,
        "bf16": bf16,
        "save_every": save_every,
        "report_to": report_to,
        "seed": seed,
    }
    settings = RlRunSettings(
        model=place_argument("source", source),
        out=path_argument("out", out),
        tasks=tasks_argument(tasks, kl),
        rollouts=rollouts,
        memory_gib=memory_gib,
        overwrite=flag_argument("overwrite", overwrite),
        device=device,
        options=options,
    )
    reporter = reporter_of(reporter)
    with reporter.stage("Start"):
        from fulmen.pipeline.quiet import quiet
        from fulmen.pipeline.rl import run_rl
    with quiet(reporter):
        return run_rl(settings, reporter)
