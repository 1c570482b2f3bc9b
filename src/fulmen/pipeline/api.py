"""convert and train, as `import fulmen` has them.

What they are asked is checked here, then the work is imported. Silent unless a reporter is given. The command
line calls the same functions.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fulmen.errors import ConfigError
from fulmen.pipeline.arguments import (
    Data,
    Duration,
    Place,
    data_argument,
    flag_argument,
    path_argument,
    place_argument,
    refused,
    seconds_argument,
)
from fulmen.pipeline.conversion import Conversion
from fulmen.pipeline.reporter import Reporter, reporter_of
from fulmen.pipeline.settings import (
    AUTO_DEVICE,
    ConvertSettings,
    ModelInMemory,
    parse_stages,
    stage_names,
)
from fulmen.pipeline.train_settings import TrainSettings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def convert(
    source: "Place | PreTrainedModel",
    *,
    out: Place,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    topk: int | None = None,
    stages: Sequence[str] | str | None = None,
    data: Data = (),
    texts: Sequence[str] | None = None,
    budget: Duration | None = None,
    steps: int | None = None,
    sparse_budget: Duration | None = None,
    sparse_steps: int | None = None,
    length: int | None = None,
    dtype: "str | torch.dtype" = "auto",
    device: "str | torch.device" = AUTO_DEVICE,
    seed: int = 0,
    index_heads: int | None = None,
    index_head_dim: int | None = None,
    index: str | None = None,
    by_layers: bool | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Conversion:
    """Give a dense language model DeepSeek Sparse Attention, and write it as a model directory.

    Interrupted, even killed, the same call goes on where it was.

    Args:
        source: a model directory, a name on the Hugging Face hub, a `.gguf` file or "smollm2-135m"; or a
            model in memory, which stays as it is.
        out: directory to write, whole or not at all.
        tokenizer: of a model in memory.
        topk: tokens that each query keeps; below it attention stays dense. None: context / 32, within 256
            and 2048, context / 2 at most; where nothing is trained, `length` / 8 (without one context / 8, up
            to 2048).
        stages: "inherit" builds the indexer from the model's own heads, "warmup" trains it to match the
            dense attention, "sparse" trains all weights under sparse attention, taught by the dense model.
            Each needs the ones before it. None: the first two, or "inherit" alone by layers.
        data: text to calibrate and train on: a file, a directory of them, hf:name, or several; a string with
            a line break is itself a text. Without any: the documentation and sources that come with Python.
        texts: texts in memory, instead of `data`.
        budget: time for the warm-up, in seconds or as "90s", "8m", "1h30m"; None: 8 minutes.
        steps: optimizer steps of the warm-up, instead of `budget`.
        sparse_budget: time for the stage "sparse"; None: 30 minutes.
        sparse_steps: optimizer steps of it, instead of `sparse_budget`.
        length: tokens per training sequence, more than `topk`. None: 4 `topk`, at least 2048, within the
            context; less if the text does not fill that.
        dtype: of the weights: "float32", "bfloat16", "float16", or "auto": as in `source`.
        device: where to compute, as "cpu" or "cuda"; "auto": on a GPU if torch sees one, a model in memory
            where it lies.
        seed: of every random choice.
        index_heads: index heads per layer; None: one per attention head (MLA: at most 64).
        index_head_dim: width of an index head, even; None: a fifth of the cache at most (MLA: 128).
        index: "two-level": a coarse index looks at every key and leaves the indexer a few times `topk` of
            them; "one-level": the indexer looks at all. None: two, where the context has more than 32 `topk`
            tokens, as it is not asked before, and a coarse level costs less than it spares (not with MLA or
            very small heads). Given to a converted `source`, it gets that index, in a minute, and stays
            otherwise as it is.
        by_layers: have one layer at a time in memory, and link the source's files into `out` as they are;
            None: where model and work have no room in the memory that is free (`inspect(source).plan`), or
            the weights are quantized, which they stay.
        overwrite: replace a model directory at `out`.
        reporter: whom to tell how far it is, as `fulmen.LineReporter()`; None: nobody.

    Raises:
        ConfigError: an argument that cannot be.
        CheckpointError, UnsupportedModelError, AlreadyConvertedError: a source that cannot be converted.
        CorpusError: text that is missing, empty, binary or too short.
        OutputError: `out` exists, cannot be written, or has no room.
        ResumeError: an unfinished run with other arguments lies beside `out`.
        TrainingDivergedError: a loss became NaN or infinite.
    """
    places, in_memory = data_argument(data, texts)
    settings = ConvertSettings(
        source=_source(source, tokenizer),
        out=path_argument("out", out),
        topk=topk,
        stages=None if stages is None else parse_stages(stages),
        budget_s=seconds_argument("budget", budget),
        steps=steps,
        sparse_budget_s=seconds_argument("sparse_budget", sparse_budget),
        sparse_steps=sparse_steps,
        data=places,
        texts=in_memory,
        overwrite=flag_argument("overwrite", overwrite),
        dtype=str(dtype).removeprefix("torch."),
        seed=seed,
        index_heads=index_heads,
        index_head_dim=index_head_dim,
        index=index,
        length=length,
        device=device,
        by_layers=None if by_layers is None else flag_argument("by_layers", by_layers),
    )
    reporter = reporter_of(reporter)
    with reporter.stage("Start"):
        from fulmen.pipeline.convert import run_conversion
        from fulmen.pipeline.index_change import is_index_change, run_index_change
        from fulmen.pipeline.quiet import quiet
    with quiet(reporter):
        if is_index_change(settings):
            return run_index_change(settings, reporter)
        return run_conversion(settings, reporter)


def train(
    source: Place,
    *,
    out: Place,
    budget: Duration | None = None,
    steps: int | None = None,
    data: Data = (),
    texts: Sequence[str] | None = None,
    length: int | None = None,
    sequences: int | None = None,
    topk: int | None = None,
    stages: Sequence[str] | str = ("sparse",),
    teacher: Place | None = None,
    alpha: float = 1.0,
    teacher_place: str = "auto",
    learning_rate: float | None = None,
    indexer_learning_rate: float = 3e-5,
    indexer_loss: str = "both",
    k_schedule: str = "none",
    lora: int | None = None,
    accumulate: int = 1,
    checkpointing: bool = False,
    bf16: bool = False,
    device: "str | torch.device" = AUTO_DEVICE,
    save_every: int | None = None,
    report_to: str = "none",
    seed: int = 0,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Conversion:
    """Train all weights of a converted model under its sparse attention, taught by the dense model.

    Every second sequence is a text that asks and looks up, in the model's chat template: loss hardly moves
    while look-ups break, so the teacher's answers there count as much as the rest. The best step by held-out
    loss, on ordinary text and at answers, is kept; if none is better, the weights stay as they were.
    Interrupted, the same call goes on where it was.

    Args:
        source: what `convert` wrote.
        out: directory to write, whole or not at all.
        budget: time, in seconds or as "30m"; None: 30 minutes.
        steps: optimizer steps, instead of `budget`.
        data: as for `convert`. Data sets of 100 texts or more are streamed, in their order.
        texts: texts in memory, instead of `data`.
        length: tokens per sequence, more than `topk`. None: as `convert`, but at most 4,096 or 2 `topk`.
        sequences: different ones at most; None: as many as the steps use.
        topk: tokens that each query keeps; None: the model's own. The stage "sparse" keeps a 16th of `length`
            where that is less.
        stages: "sparse"; "warmup" for the indexers alone, or both, for a model that was only inherited.
            `steps` and `budget` are those of the last; a warm-up before the sparse stage takes 8 minutes.
        teacher: a dense model to learn from, with the same tokenizer; None: `source` itself before training,
            read densely.
        alpha: share of the teacher in the loss: 1 restores the dense model's own function, 0 only continues
            its training on `data`.
        teacher_place: where its answers come from: "live" (a copy in memory), "disk" (asked once, 512 bytes
            a token), "auto": disk where sequences come more than once.
        learning_rate: peak of all weights but the indexers'; None: 3e-5, with `lora` 1e-4.
        indexer_learning_rate: peak of the indexers'.
        indexer_loss: "kl" over the selected keys, as DeepSeek; "output": what the selection changes in the
            layer's output; "both".
        k_schedule: "none": k from the first step on; "shrink": from the whole text down to k over half of
            the steps; "layers": one layer after the other; "dense": never sparse, as a control.
        lora: rank of updates that are merged at the end, where memory is short; needs peft.
        accumulate: sequences per step (and process).
        checkpointing: recompute layers: less memory, a third slower.
        bf16: compute in bfloat16, as is done anyway where weights are.
        device: as of `convert`.
        save_every: steps between checkpoints; None: at the 3 evaluations.
        report_to: "none", "tensorboard" or "wandb"; a log is written anyway.
        seed: of every random choice.
        overwrite: replace a model directory at `out`.
        reporter: whom to tell how far it is, as `fulmen.LineReporter()`; None: nobody.

    Raises:
        ConfigError: an argument that cannot be.
        CheckpointError, UnsupportedModelError: a source or teacher that cannot be read.
        CorpusError, OutputError, ResumeError, TrainingDivergedError: as `convert`.
    """
    places, in_memory = data_argument(data, texts)
    options = {
        "steps": steps,
        "budget_s": seconds_argument("budget", budget),
        "learning_rate": learning_rate,
        "indexer_learning_rate": indexer_learning_rate,
        "alpha": alpha,
        "teacher_place": teacher_place,
        "indexer_loss": indexer_loss,
        "k_schedule": k_schedule,
        "lora": lora,
        "accumulate": accumulate,
        "checkpointing": checkpointing,
        "bf16": bf16,
        "save_every": save_every,
        "report_to": report_to,
        "seed": seed,
    }
    settings = TrainSettings(
        model_dir=path_argument("source", source),
        out=path_argument("out", out),
        topk=topk,
        stages=stage_names(stages, "use warmup, sparse or both"),
        data=places,
        texts=in_memory,
        teacher=None if teacher is None else place_argument("teacher", teacher),
        length=length,
        sequences=sequences,
        overwrite=flag_argument("overwrite", overwrite),
        device=device,
        options=options,
    )
    reporter = reporter_of(reporter)
    with reporter.stage("Start"):
        from fulmen.pipeline.quiet import quiet
        from fulmen.pipeline.train import run_training
    with quiet(reporter):
        return run_training(settings, reporter)


def _source(source: object, tokenizer: Any) -> str | ModelInMemory:
    """A place, or a model in memory with its tokenizer. Raises ConfigError."""
    if isinstance(source, (str, os.PathLike)):
        if tokenizer is not None:
            raise ConfigError(
                "tokenizer is for a model in memory; source has its own, leave it out",
                arguments=["tokenizer", "source"],
            )
        return place_argument("source", source)
    if not callable(getattr(source, "state_dict", None)):
        raise refused("source", source, "give a model's directory or name, or a model of Transformers")
    if tokenizer is None:
        raise ConfigError(
            "tokenizer=None cannot be with a model in memory; give the tokenizer it was loaded with",
            arguments=["tokenizer"],
        )
    return ModelInMemory(source, tokenizer)  # type: ignore[arg-type]
