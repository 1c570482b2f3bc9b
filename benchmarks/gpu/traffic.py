"""Bytes that the paged kernels load and store to decode one token, counted as Triton interprets them.

    TRITON_INTERPRET=1 python -m benchmarks.gpu.traffic --models smollm2 --lengths 8192,131072

Every number that a kernel asks for counts, each time, also what a GPU would have in a cache: so a count is
above what its memory has to give. The floor is what cannot be left unread, once: `decode_floor`.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton.runtime.interpreter import interpreter_builder

from benchmarks.gpu.shapes import MODELS, ModelShape, decode_floor, decoding_step
from fulmen.files import atomic_write
from fulmen.ops.common.interpreter import is_interpreted
from fulmen.ops.paged import triton_attend, triton_candidates, triton_dense, triton_scores, triton_select
from fulmen.ops.paged.triton_requests import attend_requests_triton
from fulmen.ops.triton_kit import launch


class Traffic(NamedTuple):
    """Of a token: bytes of each kernel, and at least how many must be read."""

    bytes_of: dict[str, int]
    floor: int

    @property
    def over_floor(self) -> float:
        """All bytes over those that must be read."""
        return sum(self.bytes_of.values()) / self.floor


def main() -> None:
    """Count, print a line each, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="smollm2,qwen3-8b", help=f"some of {','.join(MODELS)}")
    parser.add_argument("--lengths", default="8192,131072", help="tokens of the context")
    parser.add_argument("--out", type=Path, default=Path("out/traffic.json"), help="JSON file")
    given = parser.parse_args()
    found = []
    for model in given.models.split(","):
        for length in map(int, given.lengths.split(",")):
            traffic = decode_traffic(MODELS[model], length)
            found.append({"model": model, "length": length, **traffic._asdict(), "over": traffic.over_floor})
            print(
                model,
                length,
                traffic.bytes_of,
                f"floor {traffic.floor}, {traffic.over_floor:.3f}",
                flush=True,
            )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(given.out, lambda temporary: temporary.write_text(json.dumps(found, indent=1)))


def decode_traffic(shape: ModelShape, length: int) -> Traffic:
    """Of one token after `length` - 1 others, in one layer."""
    assert is_interpreted(), "set TRITON_INTERPRET=1 before Python starts"
    layer, requests, q_THD, index = decoding_step(shape, 1, length, "cpu")
    with counted() as bytes_of:
        attend_requests_triton(layer, requests, q_THD, index, torch.empty_like(q_THD))
    return Traffic(dict(bytes_of), decode_floor(shape, length))


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Bytes that kernels load and store in the block, by the kernels' names."""
    found: Counter[str] = Counter()
    names = [""]

    def noted(kernel: Any, *arguments: Any, **options: Any) -> None:
        names[0] = kernel.__name__.removeprefix("_").removesuffix("_kernel")
        launch(kernel, *arguments, **options)

    load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store

    def counted_load(ptrs: Any, mask: Any, *more: Any) -> Any:
        found[names[0]] += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
        return load(ptrs, mask, *more)

    def counted_store(ptrs: Any, value: Any, mask: Any, *more: Any) -> Any:
        found[names[0]] += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
        return store(ptrs, value, mask, *more)

    modules = (triton_attend, triton_candidates, triton_dense, triton_scores, triton_select)
    interpreter_builder.create_masked_load = counted_load
    interpreter_builder.create_masked_store = counted_store
    for module in modules:
        module.launch = noted  # type: ignore[attr-defined]
    try:
        yield found
    finally:
        del interpreter_builder.create_masked_load, interpreter_builder.create_masked_store
        for module in modules:
            module.launch = launch  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
