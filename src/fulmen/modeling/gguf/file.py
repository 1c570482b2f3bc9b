"""GGUF files: what the header says and where each tensor lies; the parts of a split model are read as one.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Reading a header touches no tensor
data, and takes milliseconds where `gguf.GGUFReader` makes arrays of every token of the vocabulary (a minute).
"""

import math
import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as TensorType
from torch import Tensor

from fulmen.errors import CheckpointError, UnsupportedModelError, first_line

SPLIT_NAME = re.compile(
    r"(?P<prefix>.*)-(?P<part>\d{5})-of-(?P<parts>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE
)
FLOAT_TYPES = {TensorType.F32: torch.float32, TensorType.F16: torch.float16, TensorType.BF16: torch.bfloat16}
# What a quantized file is loaded as: its values have 8 bits or fewer.
DEQUANTIZED_DTYPE = torch.bfloat16

# Numbers of a dequantized block of rows: bounds the float32 copies, whatever the tensor's size. So few stay
# in a CPU's cache.
_CHUNK = 2**20
_VERSIONS = (2, 3)
_STRING, _ARRAY, _FLOAT32 = 8, 9, 6
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: where its bytes are, and what they mean.

    Attributes:
        shape: in torch's order, the last axis contiguous.
        offset: bytes from the beginning of the file at `path`.
    """

    path: Path
    shape: tuple[int, ...]
    type: TensorType
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of the last axis, which no block of a quantized type straddles."""
        numbers, size = gguf.GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // numbers * size

    @property
    def end(self) -> int:
        """Offset of the first byte behind it."""
        return self.offset + math.prod(self.shape[:-1]) * self.row_bytes

    def load(self, dtype: torch.dtype) -> Tensor:
        """Its values as `dtype`, dequantized a few rows at a time.

        Raises CheckpointError if the file is cut short.
        """
        loaded = torch.empty(self.shape, dtype=dtype)
        rows = loaded.view(-1, self.shape[-1])
        step = max(1, _CHUNK // self.shape[-1])
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            for start in range(0, len(rows), step):
                block = rows[start : start + step]
                data = np.fromfile(file, np.uint8, len(block) * self.row_bytes)
                if data.size < len(block) * self.row_bytes:
                    raise CheckpointError(
                        f"{self.path} is truncated: it ends inside a tensor; fetch it again"
                    )
                block.copy_(torch.from_numpy(gguf.dequantize(data.reshape(len(block), -1), self.type)))
        return loaded


@dataclass(frozen=True)
class GgufModel:
    """What a file, or all the parts of a split one together, hold.

    Attributes:
        path: the file, or the first part.
        metadata: keys and values; those of strings and arrays in full.
        tensors: by name.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """`general.architecture`, whose name begins the keys of its shape."""
        return str(self.metadata["general.architecture"])

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key in the architecture's own namespace."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights (norms are float32 in every file); DEQUANTIZED_DTYPE if they are quantized."""
        types = {tensor.type for tensor in self.tensors.values()}
        if types - FLOAT_TYPES.keys():
            return DEQUANTIZED_DTYPE
        halves = [dtype for type_, dtype in FLOAT_TYPES.items() if type_ in types and dtype.itemsize == 2]
        return halves[-1] if halves else torch.float32

    @property
    def quantized_types(self) -> list[str]:
        """Names of the quantized types in it, as "Q4_K"; empty if there is none."""
        types = {tensor.type for tensor in self.tensors.values()} - FLOAT_TYPES.keys()
        return sorted(type_.name for type_ in types)


def first_part(path: Path) -> Path:
    """`path`, or where its name is that of a split model's part, the first part's name."""
    return part_paths(path)[0]


def part_paths(path: Path) -> list[Path]:
    """All the parts' names, which count from 1 as llama.cpp's do; `path` alone if it is not named so."""
    named = SPLIT_NAME.fullmatch(path.name)
    if not named or int(named["parts"]) < 2:
        return [path]
    count = int(named["parts"])
    return [
        path.with_name(f"{named['prefix']}-{part:05d}-of-{count:05d}{named['suffix']}")
        for part in range(1, count + 1)
    ]


def read_gguf(path: str | Path) -> GgufModel:
    """Read the header of a GGUF file, or of all its parts, whichever of them `path` names.

    Raises:
        CheckpointError: no GGUF file, damaged or cut short; a part is missing or of another model.
        UnsupportedModelError: tensors of a type that cannot be dequantized.
    """
    paths = part_paths(Path(path))
    if missing := [part for part in paths if not part.is_file()]:
        raise CheckpointError(
            f"{missing[0]} is missing, one of {len(paths)} parts of a split model; put all into one folder"
        )
    parts = [_read_part(part) for part in paths]
    for number, part in enumerate(parts):
        _require_part(part, number, len(paths))
    if len(parts) == 1:
        model = parts[0]
    else:
        model = GgufModel(paths[0], _merged_metadata(parts), _merged_tensors(parts))
    if not isinstance(model.metadata.get("general.architecture"), str):
        raise CheckpointError(f"{model.path} names no general.architecture; it is no language model")
    _require_complete(model)
    _require_types(model)
    return model


def _read_part(path: Path) -> GgufModel:
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path} does not begin with 'GGUF', so it is no GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                metadata, tensors = _Header(data).read(path)
            except (struct.error, ValueError, ArithmeticError, MemoryError, LookupError, TypeError) as error:
                reason = first_line(error)
                raise CheckpointError(f"{path} is truncated or damaged ({reason}); get it anew") from error
    end = max((tensor.end for tensor in tensors.values()), default=0)
    if end > size:
        raise CheckpointError(f"{path} is truncated: {size} of {end} bytes; fetch it again")
    return GgufModel(path, metadata, tensors)


class _Header:
    """A walk through a header's bytes. Whatever leaves them raises struct.error or ValueError."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 4

    def read(self, path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        version = self._number("I")
        if version not in _VERSIONS:
            known = " and ".join(map(str, _VERSIONS))
            raise ValueError(f"version {version}, or of a big-endian machine; versions {known} can be read")
        tensor_count, key_count = self._number("Q"), self._number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._string()
            if key in metadata:
                raise ValueError(f"{key} twice")
            metadata[key] = self._value(self._number("I"))
        infos = {}
        for _ in range(tensor_count):
            name, info = self._tensor_info()
            if name in infos:
                raise ValueError(f"tensor {name} twice")
            infos[name] = info
        alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if alignment & (alignment - 1):
            raise ValueError(f"tensors aligned to {alignment} bytes")
        begin = -(-self.position // alignment) * alignment
        return metadata, {
            name: GgufTensor(path, shape, kind, begin + offset)
            for name, (shape, kind, offset) in infos.items()
        }

    def _number(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self.data, self.position)
        self.position += struct.calcsize("<" + form)
        return value

    def _bytes(self, count: int) -> bytes:
        taken = self.data[self.position : self.position + count]
        if len(taken) < count:
            raise ValueError("the header ends early")
        self.position += count
        return taken

    def _string(self) -> str:
        return self._bytes(self._number("Q")).decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(self._number("I"), self._number("Q"))
        value = self._number(_SCALARS[kind])
        # 1e-05, as whoever wrote it meant it, not the nearest float32's 9.999999747378752e-06.
        return float(str(np.float32(value))) if kind == _FLOAT32 else value

    def _array(self, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            return [self._string() for _ in range(count)]
        numbers = np.dtype("<" + _SCALARS[kind])
        return np.frombuffer(self._bytes(count * numbers.itemsize), numbers).tolist()

    def _tensor_info(self) -> tuple[str, tuple[tuple[int, ...], TensorType, int]]:
        name = self._string()
        axes = self._number("I")
        shape = tuple(self._number("Q") for _ in range(axes))[::-1] or (1,)
        kind = TensorType(self._number("I"))
        if 0 in shape or shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            raise ValueError(f"tensor {name} has the shape {shape}, which {kind.name} cannot have")
        return name, (shape, kind, self._number("Q"))


def _require_part(part: GgufModel, number: int, count: int) -> None:
    """A part says which it is, counted from 0; so does a file that is not named like one."""
    stated = (part.metadata.get("split.no", 0), part.metadata.get("split.count", 0) or 1)
    if stated == (number, count):
        return
    if count == 1:
        name = f"NAME-{stated[0] + 1:05d}-of-{stated[1]:05d}.gguf"
        raise CheckpointError(
            f"{part.path} is a part of a split model; name it {name}, and the others so too"
        )
    raise CheckpointError(
        f"{part.path} states that it is part {stated[0] + 1} of {stated[1]}, against its name; get it anew"
    )


def _merged_metadata(parts: list[GgufModel]) -> dict[str, Any]:
    """Most keys stand in the first part alone. Raises CheckpointError where two parts disagree."""
    merged: dict[str, Any] = {}
    for part in parts:
        for key, value in part.metadata.items():
            if key != "split.no" and merged.setdefault(key, value) != value:
                raise CheckpointError(
                    f"{part.path} and {parts[0].path.name} differ in {key}; they are parts of two models"
                )
    return merged


def _merged_tensors(parts: list[GgufModel]) -> dict[str, GgufTensor]:
    merged: dict[str, GgufTensor] = {}
    for part in parts:
        if twice := sorted(merged.keys() & part.tensors.keys()):
            raise CheckpointError(f"{part.path} repeats {twice[0]} of another part; get the parts anew")
        merged |= part.tensors
    return merged


def _require_complete(model: GgufModel) -> None:
    stated = model.metadata.get("split.tensors.count", len(model.tensors))
    if not model.tensors or stated != len(model.tensors):
        raise CheckpointError(
            f"{model.path} holds {len(model.tensors)} tensors and states {stated or 'none'}; get it anew"
        )


def _require_types(model: GgufModel) -> None:
    """Tried on a block of zeros, as the library has no list of what it can dequantize."""
    for name, tensor in _one_of_each_type(model):
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[tensor.type][1]), np.uint8), tensor.type)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"{model.path} holds {name} as {tensor.type.name}, which cannot be read; get another kind"
            ) from error


def _one_of_each_type(model: GgufModel) -> Iterator[tuple[str, GgufTensor]]:
    return iter({tensor.type: (name, tensor) for name, tensor in model.tensors.items()}.values())
