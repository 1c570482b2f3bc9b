"""A model in words: what it is, how it would be converted and what that saves."""

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from fulmen.config import COARSE_FROM, DsaConfig
from fulmen.evaluation.wording import percent
from fulmen.pipeline.reporter import roughly

if TYPE_CHECKING:
    from fulmen.modeling.cache import CacheBytes
    from fulmen.modeling.cost import CostRow
    from fulmen.pipeline.conversion_plan import ConversionPlan

SAVINGS_TITLE = "One decoded token, by the number of tokens it sees; cache in GiB"
SAVINGS_HEADER = (
    "tokens",
    *(f"{kind} {side}" for kind in ("read", "FLOPs") for side in ("dense", "DSA", "ratio")),
    "cache dense",
    "cache DSA",
)


@dataclass(frozen=True)
class ModelDescription:
    """Facts about a model and what DSA does, or would do, to it.

    Attributes:
        converted: whether the model has DSA already; then `dsa` is its own, else the one we would use.
        heads: "9 query, 3 key/value, width 64" or MLA's ranks.
        dtype: of the weights after loading, which is that of the cache.
        quantized: types of a GGUF file's weights, or the format of quantized safetensors; dequantized when
            loaded.
        model_type, parameters: of the language model, an indexer that it has included; architecture: the
            class of the whole model, where that reads images too.
        active_parameters: of a mixture of experts, those that a token is multiplied with; None of another.
        step_weights: bytes of weights that a decoding step reads, shared by its batch.
        indexer_parameters: of all indexers, those that it has or would get.
        dense_layers: layers that keep dense attention, with the reason.
        index_key_share: index keys over keys and values in a converted layer.
        token_bytes: cache per token.
        plan: what `fulmen convert` with defaults would do on this machine now; None: it has DSA already.
    """

    source: str
    converted: bool
    model_type: str
    architecture: str
    parameters: int
    active_parameters: int | None
    indexer_parameters: int
    step_weights: int
    layers: int
    hidden_size: int
    vocab_size: int
    heads: str
    rope: str
    context: int | None
    dtype: str
    quantized: list[str]
    dsa: DsaConfig
    dense_layers: dict[str, str]
    index_key_share: float
    token_bytes: "CacheBytes"
    rows: "list[CostRow]"
    plan: "ConversionPlan | None"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        rows = [
            {
                "position": row.position,
                "decode": row.decode._asdict(),
                "prefill": row.prefill._asdict(),
                "cache": row.cache._asdict(),
            }
            for row in self.rows
        ]
        changed: dict[str, Any] = {
            "dsa": self.dsa.to_dict(),
            "token_bytes": self.token_bytes._asdict(),
            "rows": rows,
            "plan": self.plan.to_dict() if self.plan else None,
        }
        return {**vars(self), **changed}

    def facts(self) -> list[tuple[str, str]]:
        """What there is to know, in words, each with its name."""
        return _facts(self)

    def savings(self) -> list[tuple[str, ...]]:
        """Rows of a table of one decoded token by the number of tokens it sees, the header first."""
        rows = [_saving(row, bool(self.context and row.position > self.context)) for row in self.rows]
        return [SAVINGS_HEADER, *map(tuple, rows)]

    def remarks(self) -> list[str]:
        """What must be known to read the table."""
        remarks = [
            f"read: keys, values and index keys, in {self.dtype}. FLOPs: all, the other weights' included, "
            f"whose {_bytes(self.step_weights)} a step reads once for its whole batch."
        ]
        if self.context and self.rows[-1].position > self.context:
            remarks.append(f"* beyond this model's context of {self.context:,} tokens")
        return remarks

    def to_markdown(self) -> str:
        """Facts, table and remarks."""
        header, *rows = [" | ".join(row) for row in self.savings()]
        table = [header, " | ".join(["---:"] * len(SAVINGS_HEADER)), *rows]
        facts = [f"- **{name}**: {value}" for name, value in self.facts()]
        parts = ["\n".join(facts), SAVINGS_TITLE, "\n".join(f"| {row} |" for row in table)]
        return "\n\n".join([*parts, *self.remarks()]) + "\n"


def layer_ranges(layers: list[int] | tuple[int, ...]) -> str:
    """ "0-2, 5" for [0, 1, 2, 5]."""
    runs = [
        [layer for _, layer in run]
        for _, run in groupby(enumerate(layers), key=lambda place: place[1] - place[0])
    ]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _facts(model: ModelDescription) -> list[tuple[str, str]]:
    dsa, verb = model.dsa, "has" if model.converted else "would get"
    state = "converted: it has DSA already" if model.converted else "dense: fulmen convert can give it DSA"
    context = f"{model.context:,} tokens" if model.context else "not stated"
    facts = [
        ("model", model.source),
        ("state", state),
        ("family", f"{model.model_type} ({model.architecture})"),
        ("parameters", f"{_count(model.parameters)}{_active(model)}, {model.dtype}{_dequantized(model)}"),
        ("layers", f"{model.layers}, hidden size {model.hidden_size:,}, vocabulary {model.vocab_size:,}"),
        ("heads", model.heads),
        ("RoPE", model.rope),
        ("context", context),
        ("DSA layers", f"{layer_ranges(dsa.layers)} ({len(dsa.layers)} of {model.layers})"),
    ]
    facts += [("dense layers", f"{layers}: {reason}") for layers, reason in model.dense_layers.items()]
    shape = (
        f"{verb} {dsa.index_n_heads} query, {dsa.index_n_kv_heads} key, width {dsa.index_head_dim}, "
        f"top-k {_topk_in_words(dsa)}; {_count(model.indexer_parameters)} parameters"
    )
    levels = "one: the indexer looks at every key"
    if dsa.coarse_head_dim:
        asked_from = COARSE_FROM * dsa.candidate_factor * dsa.topk
        levels = (
            f"two: of more than {asked_from:,} keys {dsa.coarse_n_heads} coarse heads of "
            f"{dsa.coarse_head_dim} dims look at every one, the indexer at {dsa.candidate_factor} k of them"
        )
    share = (
        f"{_bytes(model.token_bytes.kv)} a token, index keys {_bytes(model.token_bytes.index_keys)} more "
        f"({percent(model.index_key_share, 1)} of a converted layer)"
    )
    facts += [("indexer", shape), ("index levels", levels), ("cache", share)]
    return [*facts, *_planned(model.plan)] if model.plan else facts


def _planned(plan: "ConversionPlan") -> list[tuple[str, str]]:
    count, tokens = plan.calibration
    peak = plan.layers_bytes if plan.by_layers else plan.whole_bytes
    where = "layer by layer" if plan.by_layers else "the whole model in memory"
    steps = (
        f"{' and '.join(plan.stages)}; k {plan.topk:,}, texts of {plan.length:,} tokens, "
        f"calibration {count} x {tokens:,}"
    )
    cost = (
        f"inherit takes about {roughly(plan.inherit_seconds)} and {_bytes(peak)} of the "
        f"{_bytes(plan.free_bytes)} that are free, {where}"
    )
    return [("conversion", steps), ("here", cost)]


def _active(model: ModelDescription) -> str:
    return f" ({_count(model.active_parameters)} active per token)" if model.active_parameters else ""


def _dequantized(model: ModelDescription) -> str:
    if not model.quantized:
        return ""
    stays = model.plan is not None and model.plan.stays_quantized
    words = "the files stay so" if stays else "dtype decides"
    return f", dequantized from {', '.join(model.quantized)} ({words})"


def _saving(row: "CostRow", beyond_context: bool) -> list[str]:
    cost = row.decode
    return [
        f"{_tokens(row.position)}{'*' if beyond_context else ''}",
        _bytes(cost.dense_bytes),
        _bytes(cost.dsa_bytes),
        f"{cost.dense_bytes / cost.dsa_bytes:.1f}x",
        _count(cost.dense_flops),
        _count(cost.dsa_flops),
        f"{cost.dense_flops / cost.dsa_flops:.1f}x",
        f"{row.cache.kv / 2**30:.2f}",
        f"{sum(row.cache) / 2**30:.2f}",
    ]


def _tokens(count: int) -> str:
    return f"{count // 2**20}M" if count >= 2**20 else f"{count // 1024}K"


def _count(value: float) -> str:
    return _scaled(value, (" T", 1e12), (" G", 1e9), (" M", 1e6), (" k", 1e3))


def _bytes(value: float) -> str:
    return _scaled(value, (" GB", 1e9), (" MB", 1e6), (" kB", 1e3)) + ("" if value >= 1e3 else " B")


def _scaled(value: float, *units: tuple[str, float]) -> str:
    for name, size in units:
        if value >= size:
            return f"{value / size:.3g}{name}" if value < 1000 * size else f"{value / size:,.0f}{name}"
    return f"{value:.3g}"


def _topk_in_words(dsa: DsaConfig) -> str:
    """ "256", or "256 (128 to 1,024 by layer)"."""
    by_layer = [dsa.layer_topk(layer) for layer in dsa.layers]
    if min(by_layer) == max(by_layer):
        return f"{dsa.topk}"
    return f"{dsa.topk} ({min(by_layer):,} to {max(by_layer):,} by layer)"
