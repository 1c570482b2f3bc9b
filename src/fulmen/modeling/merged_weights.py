"""Weights that lie in files by other names than they have in the model, or in pieces: experts one by one.

Transformers says for each model type how its files are read (`conversion_mapping`); the rules that are looked
at here are names, and experts that become one tensor.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

# The only axes along which experts, and then their matrices, are put together.
EXPERTS_AXIS, ROWS_AXIS = 0, 1


class MergedWeight(NamedTuple):
    """A weight of all experts.

    Attributes:
        sources: of each expert, the names of its matrices, which come to lie below one another.
        shape: of the weight.
    """

    sources: tuple[tuple[str, ...], ...]
    shape: tuple[int, ...]

    def read(self, tensor: Callable[[str], Tensor]) -> Tensor:
        """The weight; one matrix of one expert after the other is read by `tensor`."""
        merged = None
        for number, names in enumerate(self.sources):
            first = 0
            for name in names:
                rows = tensor(name)
                if merged is None:
                    merged = torch.empty(self.shape, dtype=rows.dtype)
                merged[number, first : first + len(rows)] = rows
                first += len(rows)
        assert merged is not None
        return merged


class Arrangement(NamedTuple):
    """Weights by the model's names. renamed: with the name that they have in the files."""

    renamed: dict[str, str]
    merged: dict[str, MergedWeight]


class _Rule(NamedTuple):
    """Names that match a pattern become parts of `target`; the pattern's groups: before, expert, behind."""

    pattern: re.Pattern[str]
    target: str
    matrix: int


def can_merge(model_type: str) -> bool:
    """Whether the files of this model type can be read one layer at a time."""
    return all(
        not isinstance(entry, WeightConverter) or _is_of_experts(entry)
        for entry in get_checkpoint_conversion_mapping(model_type) or ()
    )


def arrangement_of(model_type: str, shapes: Mapping[str, tuple[int, ...]]) -> Arrangement:
    """How the model has the weights that lie in its files with these names and shapes."""
    entries: Any = get_checkpoint_conversion_mapping(model_type) or ()
    rules = [rule for entry in entries if isinstance(entry, WeightConverter) for rule in _rules(entry)]
    renames = [entry for entry in entries if not isinstance(entry, WeightConverter)]
    renamed: dict[str, str] = {}
    pieces: defaultdict[str, dict[tuple[int, int], str]] = defaultdict(dict)
    for name in shapes:
        new = name
        for entry in renames:
            new = entry.rename_source_key(new)[0]
        for rule in rules:
            if match := rule.pattern.fullmatch(new):
                pieces[match[1] + rule.target][int(match[2]), rule.matrix] = name
                break
        else:
            if new != name:
                renamed[new] = name
    return Arrangement(renamed, {target: _put_together(held, shapes) for target, held in pieces.items()})


def _put_together(held: Mapping[tuple[int, int], str], shapes: Mapping[str, tuple[int, ...]]) -> MergedWeight:
    """What is missing or of another shape makes a shape that is not the model's."""
    experts, matrices = sorted({key[0] for key in held}), sorted({key[1] for key in held})
    sources = tuple(
        tuple(held[expert, matrix] for matrix in matrices if (expert, matrix) in held) for expert in experts
    )
    each = {tuple(shapes[name] for name in names) for names in sources}
    if len(each) > 1 or any(len(shape) != 2 for shape in next(iter(each))):
        return MergedWeight(sources, (0, 0, 0))
    ((rows, columns), *more) = next(iter(each))
    return MergedWeight(sources, (len(sources), rows + sum(shape[0] for shape in more), columns))


def _rules(entry: Any) -> Iterable[_Rule]:
    for matrix, pattern in enumerate(entry.source_patterns):
        before, behind = (re.escape(part) for part in pattern.split("*"))
        yield _Rule(re.compile(rf"(.*){before}(\d+){behind}"), entry.target_patterns[0], matrix)


def _is_of_experts(entry: Any) -> bool:
    kinds = [type(operation) for operation in entry.operations]
    axes = [operation.dim for operation in entry.operations if hasattr(operation, "dim")]
    several = len(entry.source_patterns) > 1
    return (
        kinds == [MergeModulelist, Concatenate][: 1 + several]
        and axes == [EXPERTS_AXIS, ROWS_AXIS][: 1 + several]
        and len(entry.target_patterns) == 1
        and all(pattern.count("*") == 1 for pattern in entry.source_patterns)
    )
