"""The teacher: a frozen model read densely, asked in every step, or once for all with answers on disk."""

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from fulmen.errors import ConfigError, OutputError
from fulmen.files import atomic_write
from fulmen.modeling.selectors import DenseSelector, Selector, use_selector
from fulmen.training.precision import are_half
from fulmen.training.rows import next_tokens
from fulmen.training.run import OnPart
from fulmen.training.sparse.distill import TeacherTargets, teacher_targets, with_right_answers
from fulmen.training.sparse.lora import without_lora
from fulmen.training.sparse.streamed import StreamedRows

Row = dict[str, Tensor]
TARGET_KEYS = ("teacher_ids", "teacher_logp", "teacher_rest")
# Tried on every tokenizer pair: words, code, digits, spaces, and letters beyond ASCII.
PROBE = "def f(x):\n    return x ** 2  # 1234567890 naïve façade, 你好, Привет\n\n\tThe quick brown fox."


class Teacher:
    """Asks `model` what comes next; a DSA model answers with dense attention, and without its adapters."""

    def __init__(self, model: PreTrainedModel, top_n: int) -> None:
        self.model, self.top_n = model, top_n

    @torch.no_grad()
    def targets(self, row: Row) -> TeacherTargets:
        """Targets for the row's `targets`, on the model's device; right ones at answers."""
        batch = {name: row[name][None].to(self.model.device) for name in ("input_ids", "position_ids")}
        was_training = self.model.training
        self.model.eval()
        try:
            dense = use_selector(self.model, DenseSelector()) if _has_dsa(self.model) else nullcontext()
            # Of a model in training, indexers and adapters are in float32, whatever the rest is in.
            is_half = are_half(self.model.parameters())
            half = torch.autocast(self.model.device.type, torch.bfloat16, enabled=is_half)
            with dense, without_lora(self.model), half:
                hidden_TC = self.model.base_model(**batch, use_cache=False)[0][0]
        finally:
            self.model.train(was_training)
        hidden_NC = hidden_TC[row["targets"].to(hidden_TC.device)]
        said = teacher_targets(hidden_NC, self.model.get_output_embeddings().weight, self.top_n)
        labels_T = next_tokens(row["input_ids"][None], row["position_ids"][None])[0]
        return with_right_answers(said, labels_T[row["targets"]], row["answers"][row["targets"]])


class TargetFiles:
    """A teacher's answers on disk, one file for each row: `top_n` x 8 bytes a token."""

    def __init__(self, folder: Path, teacher: Teacher) -> None:
        self.folder, self.teacher = folder, teacher

    def fill(self, rows: Sequence[Row], on_part: OnPart = lambda *_: None) -> None:
        """Ask about every row that has no file yet. Raises OutputError if the disk is full."""
        self.folder.mkdir(parents=True, exist_ok=True)
        on_part(0, len(rows), "asking the teacher")
        for number, row in enumerate(rows, start=1):
            file = self._file(row)
            if not file.exists():
                self._write(file, self.teacher.targets(row))
            on_part(number, len(rows), "asking the teacher")

    def targets(self, row: Row) -> TeacherTargets:
        """What was answered about this row."""
        stored = load_file(self._file(row))
        return TeacherTargets(*(stored[key] for key in TARGET_KEYS))

    def _file(self, row: Row) -> Path:
        digest = hashlib.sha256(str(self.teacher.top_n).encode())
        for name in ("input_ids", "position_ids", "targets", "answers"):
            digest.update(row[name].cpu().numpy().tobytes())
        return self.folder / f"{digest.hexdigest()[:32]}.safetensors"

    def _write(self, file: Path, targets: TeacherTargets) -> None:
        try:
            tensors = {key: part.cpu() for key, part in zip(TARGET_KEYS, targets, strict=True)}
            atomic_write(file, lambda temporary: save_file(tensors, temporary))
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{file.parent} has no room for the teacher's answers ({error})") from error


class DistilledRows(Dataset):
    """Rows for Trainer, with the teacher's targets beside the tokens; without where there is no teacher."""

    def __init__(self, rows: Sequence[Row] | StreamedRows, source: Teacher | TargetFiles | None) -> None:
        self.rows, self.source = rows, source

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        row = self.rows[index]
        if self.source is None:
            return row
        targets = self.source.targets(row)
        return {**row, **dict(zip(TARGET_KEYS, targets, strict=True))}


def require_same_tokens(tokenizer: object, teachers: object) -> None:
    """Raise ConfigError unless both tokenizers give every token the same id: the KL compares them by id."""
    ours, theirs = (_vocabulary(one) for one in (tokenizer, teachers))
    if ours == theirs and _probe(tokenizer) == _probe(teachers):
        return
    mismatched = next(
        (word for word in sorted(ours.keys() | theirs.keys()) if ours.get(word) != theirs.get(word)), None
    )
    which = (
        f"token {mismatched!r} is {ours.get(mismatched)} here and {theirs.get(mismatched)} there"
        if mismatched
        else "they cut differently"
    )
    raise ConfigError(
        f"the dense model's tokenizer differs ({which}); name a model of the same family, or leave it out"
    )


def _vocabulary(tokenizer: object) -> dict[str, int]:
    return tokenizer.get_vocab()  # type: ignore[attr-defined]


def _probe(tokenizer: object) -> list[int]:
    return tokenizer(PROBE)["input_ids"]  # type: ignore[operator]


def _has_dsa(model: PreTrainedModel) -> bool:
    return any(isinstance(getattr(module, "selector", None), Selector) for module in model.modules())
