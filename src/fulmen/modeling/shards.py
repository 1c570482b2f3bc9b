"""The safetensors files of a model as they lie: what each holds, a few tensors at a time, links to them."""

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fulmen.errors import CheckpointError, one_line
from fulmen.modeling.weight_files import INDEX_FILE, WEIGHTS_FILE, require_sound_files, weight_files
from fulmen.modeling.weights import unreadable

# A file of this name would hide the index; both begin as the files of every other model do.
LINKED_FILE, INDEXERS_FILE = "model-dense.safetensors", "model-indexers.safetensors"
SHARD_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
KIND_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}
CHECKED_KINDS = {*SHARD_DTYPES, "F8_E4M3", "F8_E5M2"}
# Of a tensor that is compared or searched, at once.
BLOCK_BYTES = 1 << 26


class Held(NamedTuple):
    """A tensor in a file. kind: its type in safetensors' words, as "BF16"."""

    file: Path
    shape: tuple[int, ...]
    kind: str


class Shards:
    """All tensors of a model directory by their names; none is in memory until it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Read the headers alone. Raises CheckpointError as `require_sound_files`."""
        require_sound_files(folder)
        self.folder, self.files = folder, weight_files(folder)
        self.held = {name: held for file in self.files for name, held in _header(file).items()}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor."""
        return {name: held.shape for name, held in self.held.items()}

    @property
    def kinds(self) -> list[str]:
        """Types of the tensors, in safetensors' words, sorted."""
        return sorted({held.kind for held in self.held.values()})

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors as they are stored, read from the disk as they are used and never all of a file."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.held[name].file, []).append(name)
        found = {}
        # Opened anew each time: what was read of a file is let go with the last of its tensors.
        for file, some in by_file.items():
            with safe_open(file, "pt") as opened:
                found.update({name: opened.get_tensor(name) for name in some})
        return found

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The rows of one tensor, some megabytes after the other."""
        return self.stored_blocks(name)

    def stored_blocks(self, name: str) -> Iterator[Tensor]:
        """`blocks` of what lies in the files by this name."""
        held = self.held[name]
        rows = held.shape[0] if held.shape else 0
        if not rows:
            with safe_open(held.file, "pt") as opened:
                yield opened.get_tensor(name)
            return
        row_bytes = KIND_BYTES.get(held.kind, 1) * math.prod(held.shape[1:])
        step = max(1, BLOCK_BYTES // max(1, row_bytes))
        for low in range(0, rows, step):
            with safe_open(held.file, "pt") as opened:
                yield opened.get_slice(name)[low : low + step]

    def are_equal(self, one: str, other: str) -> bool:
        """Whether two tensors are the same, number for number."""
        return self.shapes[one] == self.shapes[other] and all(
            torch.equal(*pair) for pair in zip(self.blocks(one), self.blocks(other), strict=True)
        )

    def require_finite(self, names: Iterable[str]) -> None:
        """Raise CheckpointError that names the first of these tensors with a NaN or an infinity."""
        for name in names:
            # By the extremes, which NaN spoils; those of 8 bits have none of their own.
            blocks = (
                x.float() if x.dtype.itemsize == 1 else x for x in self.stored_blocks(name) if x.numel()
            )
            if self.held[name].kind in CHECKED_KINDS and not all(
                bool(torch.isfinite(end)) for x in blocks for end in x.aminmax()
            ):
                raise CheckpointError(
                    f"{self.folder} has NaN or infinite values in {name}; get intact weights"
                )

    def bytes_to_copy(self, folder: Path) -> int:
        """What `put_into` takes of the disk of `folder`: nothing where files can be linked."""
        device = folder.stat().st_dev
        sizes = (file.resolve().stat() for file in self.files)
        return sum(size.st_size for size in sizes if size.st_dev != device)

    def put_into(self, folder: Path, more: Path) -> None:
        """Link all files into `folder`, and the tensors of the file `more` as one more; write the index."""
        names = {file: LINKED_FILE if file.name == WEIGHTS_FILE else file.name for file in self.files}
        for file, name in names.items():
            link_or_copy(file, folder / name)
        link_or_copy(more, folder / INDEXERS_FILE)
        weight_map = {name: names[held.file] for name, held in self.held.items()}
        weight_map |= dict.fromkeys(_header(more), INDEXERS_FILE)
        size = sum((folder / name).stat().st_size for name in {*names.values(), INDEXERS_FILE})
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def folder_of_shards(place: str) -> Path:
    """A directory, or that of a hub model's weights, which are fetched. Raises CheckpointError."""
    if Path(place).is_dir():
        return Path(place)
    try:
        folder = snapshot_download(place, allow_patterns=["*.safetensors", INDEX_FILE], ignore_patterns="*/*")
    except Exception as error:
        raise unreadable(place, one_line(error)) from error
    return Path(folder)


def link_or_copy(file: Path, to: Path) -> None:
    """A hard link, or a copy where the file system has none: two disks, or one without links."""
    real = file.resolve()
    try:
        os.link(real, to)
    except OSError:
        shutil.copyfile(real, to)


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors as Transformers reads them."""
    save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, file, {"format": "pt"})


def _header(file: Path) -> dict[str, Held]:
    with safe_open(file, "pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        return {name: Held(file, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
