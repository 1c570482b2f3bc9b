"""What Python and the C++ kernels agree on: the libraries' names, their version, the structures of a call.

The structures mirror those of `cpp/src/*.h`. A library tells how it has them (`fulmen_layouts`), and one that
has them otherwise is not used: a field at another offset would be read from the wrong place in memory.
"""

import ctypes

# Of each level of instructions, from those that every CPU of a kind has to those that few have (setup.py).
CPP_LEVELS = {
    "plain": "_kernels",
    "avx2": "_kernels_avx2",
    "avx512": "_kernels_avx512",
    "amx": "_kernels_amx",
}
# Raised with every change of a function's arguments, and with new functions (`cpp/src/library.cpp`).
ABI_VERSION = 14
# Numbers, as in `cpp/src/attention.h`: gradients have rows of full vectors.
ROW_MULTIPLE = 16


class IndexShape(ctypes.Structure):
    """As in `cpp/src/index_inputs.h`."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("batch", "queries", "keys", "heads", "key_heads", "width", "topk", "columns"),
            *("key_kind", "k_stride_b", "k_stride_s", "k_stride_i", "threads", "use_tiles"),
        )
    ]


class CoarseLevelStruct(ctypes.Structure):
    """`CoarseLevel` there."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("heads", "width", "candidates", "all_up_to", "k_stride_b", "k_stride_s")
        ),
        *((name, ctypes.c_void_p) for name in ("q", "b", "k", "rows")),
    ]


class AttentionShape(ctypes.Structure):
    """As in `cpp/src/attention.h`."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("batch", "queries", "keys", "heads", "key_heads", "width", "value_width", "topk"),
            *("is_bf16", "k_stride_b", "k_stride_s", "k_stride_g", "v_stride_b", "v_stride_s", "v_stride_g"),
            *("threads", "use_tiles"),
        )
    ]


class PagedLayerStruct(ctypes.Structure):
    """`PagedLayer` of `cpp/src/paged.h`."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                *("heads", "key_heads", "width", "index_heads", "index_key_heads", "index_width", "topk"),
                *("dense_up_to", "is_bf16", "kv_stride_r", "kv_stride_g", "packed_stride_r", "use_tiles"),
                *("coarse_heads", "coarse_width", "candidates", "all_up_to", "coarse_stride_r"),
            )
        ),
        *(
            (name, ctypes.c_void_p)
            for name in ("kv", "packed", "rope_pairs", "coarse", "coarse_pairs", "sinks")
        ),
        *((name, ctypes.c_double) for name in ("scale", "softcap")),
    ]


class NewTokensStruct(ctypes.Structure):
    """`NewTokens` there."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("count", "pairs", "threads")),
        *((name, ctypes.c_void_p) for name in ("rows", "index_rows", "coarse_rows", "cos", "sin")),
    ]


class KeyRowsStruct(ctypes.Structure):
    """`KeyRows` there."""

    _fields_ = [
        ("keys", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("rows", "index_rows", "coarse_rows", "stop")),
    ]


class PagedQueriesStruct(ctypes.Structure):
    """`PagedQueries` there."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "count", "threads")),
        *((name, ctypes.c_void_p) for name in ("q", "index_q", "w", "b", "coarse_q", "coarse_b")),
    ]


class ProjectionsStruct(ctypes.Structure):
    """`Projections` there."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("q_width", "k_width", "x_width")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "w_and_b", "coarse_q", "coarse_k", "bias")),
    ]


class HeadsStruct(ctypes.Structure):
    """`Heads` there."""

    _fields_ = [("numbers", ctypes.c_void_p), ("stride", ctypes.c_int64)]


STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    *(IndexShape, CoarseLevelStruct, AttentionShape, PagedLayerStruct, NewTokensStruct),
    *(KeyRowsStruct, PagedQueriesStruct, ProjectionsStruct, HeadsStruct),
)
FIELD_KINDS = {ctypes.c_int64: "i", ctypes.c_void_p: "p", ctypes.c_double: "f"}


def structure_layout(structure: type[ctypes.Structure]) -> str:
    """As `fulmen_layouts` writes it: "name bytes", then "name:offset:kind" of each field."""
    name = structure.__name__.removesuffix("Struct")
    fields = (
        f"{field[0]}:{getattr(structure, field[0]).offset}:{FIELD_KINDS[field[1]]}"
        for field in structure._fields_
    )
    return " ".join((name, str(ctypes.sizeof(structure)), *fields))


def mismatched_structures(layouts: str) -> list[str]:
    """Names of the structures that a library, by its `fulmen_layouts`, does not have as they are here."""
    theirs = set(layouts.splitlines())
    return [mine.split()[0] for mine in map(structure_layout, STRUCTURES) if mine not in theirs]
