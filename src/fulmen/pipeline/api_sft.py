"""sft, as `import fulmen` has it: what it is asked is checked before work is imported."""

from typing import TYPE_CHECKING

from fulmen.pipeline.arguments import Place, flag_argument, path_argument, place_argument
from fulmen.pipeline.conversion import Conversion
from fulmen.pipeline.reporter import Reporter, reporter_of
from fulmen.pipeline.rl_settings import lora_argument
from fulmen.pipeline.settings import AUTO_DEVICE, require_seed
from fulmen.training.sft.settings import SftSettings

if TYPE_CHECKING:
    import torch


def sft(
    source: Place,
    *,
    data: Place,
    out: Place,
    steps: int,
    batch: int = 8,
    learning_rate: float | None = None,
    lora: int | None = None,
    full: bool = False,
    bf16: bool = False,
    device: "str | torch.device" = AUTO_DEVICE,
    save_every: int = 50,
    seed: int = 0,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Conversion:
    """Fine-tune a model, dense or converted, on chats: the last reply of each is learned.

    Under sparse attention, where the model has it; its indexers stay as they are. Interrupted, the same call
    goes on where it was.

    Args:
        source: a model directory, dense or converted, a name on the hub, a `.gguf` file or "smollm2-135m".
        data: JSON lines with `messages`, the last one the assistant's, as `fulmen verify make --chat` writes.
        out: directory to write, whole or not at all.
        steps: optimizer steps; a chat comes again when all have come.
        batch: chats a step.
        learning_rate: its peak; None: 2e-4, with `full` 2e-5.
        lora: rank of updates that are merged at the end; None: 16.
        full: train all weights but the indexers' instead.
        bf16: compute in bfloat16, as is done anyway where weights are.
        device: where to compute, as "cpu" or "cuda"; "auto": on a GPU if torch sees one.
        save_every: steps between checkpoints.
        seed: of every random choice.
        overwrite: replace a model directory at `out`.
        reporter: whom to tell how far it is, as `fulmen.LineReporter()`; None: nobody.

    Raises:
        ConfigError: an argument that cannot be, or a chat that the model's template or context does not take.
        CorpusError: a file or a line that has no chat.
        CheckpointError, UnsupportedModelError: a source that cannot be read.
        OutputError, ResumeError, TrainingDivergedError: as `convert`.
    """
    require_seed(seed)
    settings = SftSettings(
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        lora=lora_argument(lora, full),
        bf16=bf16,
        save_every=save_every,
        seed=seed,
    )
    is_replacing = flag_argument("overwrite", overwrite)
    place, file = place_argument("source", source), path_argument("data", data, "a file")
    folder, reporter = path_argument("out", out).expanduser().absolute(), reporter_of(reporter)
    with reporter.stage("Start"):
        from fulmen.pipeline.devices import training_device
        from fulmen.pipeline.lessons import read_lessons
        from fulmen.pipeline.quiet import quiet
        from fulmen.pipeline.sft import run_sft
    with quiet(reporter):
        lessons, where = read_lessons(file), training_device(device)
        return run_sft(place, lessons, folder, settings, where, reporter, overwrite=is_replacing)
