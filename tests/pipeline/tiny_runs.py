"""Runs of tiny models with a tokenizer of 97 words, in this process or in one of their own."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fulmen.pipeline.convert import run_conversion
from fulmen.pipeline.evaluate import measure
from fulmen.pipeline.report_files import ParityFiles
from fulmen.pipeline.reporter import SilentReporter
from fulmen.pipeline.settings import ConvertSettings, EvalSettings
from fulmen.pipeline.train import run_training
from fulmen.pipeline.train_settings import TrainSettings
from tests.fork_server import Forked

VOCAB = 97
LENGTH = 64


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 to w96."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w1", unk_token="w2"
    )


def save_tiny(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def settings(source: Path, out: Path, corpus_dir: Path, **changes) -> ConvertSettings:
    values = {"topk": 8, "steps": 4, "data": (str(corpus_dir),), "length": LENGTH, **changes}
    return ConvertSettings(source=str(source), out=out, **values)


def convert(asked: ConvertSettings, reporter=SilentReporter()) -> Path:  # noqa: B008
    return run_conversion(asked, reporter).path


def train(asked: TrainSettings, reporter=SilentReporter()) -> Path:  # noqa: B008
    return run_training(asked, reporter).path


def evaluate(asked: EvalSettings, reporter=SilentReporter()) -> Any:  # noqa: B008
    """Measured, and written beside the model as `fulmen eval` does."""
    report = measure(asked, reporter)
    ParityFiles(asked.model_dir).write(report)
    return report


PROGRAM = "from fulmen.cli.main import main; main()"


def run_convert(
    source: Path,
    out: Path,
    corpus_dir: Path,
    *more: str,
    before: tuple[str, ...] = (),
    code: str = PROGRAM,
    **forked: Any,
) -> Forked:
    """`fulmen convert`; `before` are arguments of the code itself, `forked` those of `Forked`."""
    arguments = [source, "--out", out, "--topk", 8, "--length", LENGTH, "--data", corpus_dir]
    return Forked(code, *before, "convert", *arguments, *more, **forked)


SIGNALLED_AT = """
import os, signal, sys
from importlib import import_module
sent, module, path, countdown = (sys.argv.pop(1) for _ in range(4))
sent, countdown = signal.Signals[sent], int(countdown)
*holders, name = path.split(".")
holder = import_module(module)
for part in holders:
    holder = getattr(holder, part)
real = getattr(holder, name)
def deadly(*args, **kwargs):
    global countdown
    countdown -= 1
    if countdown == 0:
        os.kill(os.getpid(), sent)
    return real(*args, **kwargs)
setattr(holder, name, deadly)
from fulmen.cli.main import main
main()
"""
