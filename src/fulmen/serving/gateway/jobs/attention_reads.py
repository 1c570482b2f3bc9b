"""What attention read for one request: counted from its lengths and the model's config, not measured.

A query at position s (the s-th token, itself included) sees s tokens, or the window of a sliding layer. With
DSA a converted layer reads its k tokens where s > max(topk, k), all s before. Of an index in two levels it
reads, beyond 4 c k tokens, the coarse keys of all and the index keys of c k. The tokens of the prompt that
lay in the cache had their queries in an earlier request; the last generated token has none yet. Several
answers to one request (`n`) are counted as if one followed the other.
"""

from fulmen.config import COARSE_FROM
from fulmen.serving.billing.ledger import AttentionReads
from fulmen.serving.billing.prices import Tokens
from fulmen.serving.engine.served_model import ServedModel


def count_attention_reads(model: ServedModel, tokens: Tokens) -> AttentionReads:
    """Tokens that dense attention would have read, those read, and the bytes between them.

    `context_tokens` and `tokens_read` are means over the layers that keep keys (with linear attention they
    keep none), summed over the request's queries. `bytes_saved`
    counts each query's keys and values by themselves, less the index keys that were scored; bfloat16.
    """
    first, last = tokens.hit, tokens.hit + tokens.miss + max(0, tokens.output - 1)
    dense = sparse = index_bytes = 0
    for layer, window in model.windows.items():
        visible = _sum_up_to(last, window) - _sum_up_to(first, window)
        dense += visible
        if model.dsa is None or layer not in model.dsa.layers:
            sparse += visible
            continue
        kept = model.dsa.layer_topk(layer)
        all_up_to = max(model.dsa.topk, kept)
        sparse += _read_up_to(last, kept, all_up_to) - _read_up_to(first, kept, all_up_to)
        scored = (max(first, all_up_to), max(last, all_up_to))
        index_bytes += _index_bytes(model, scored, model.dsa.candidates(layer))
    saved = (dense - sparse) * model.layer_kv_bytes - index_bytes
    layers = len(model.windows)
    return AttentionReads(dense // layers, sparse // layers, saved)


def _index_bytes(model: ServedModel, scored: tuple[int, int], candidates: int) -> int:
    """Of one layer's index, read by the queries at positions first < s <= last."""
    first, last = scored
    near = COARSE_FROM * candidates if model.coarse_key_bytes else last
    first_far, last_far = max(first, near), max(last, near)
    fine = _read_up_to(last, candidates, near) - _read_up_to(first, candidates, near)
    return (
        fine * model.index_key_bytes + (_triangle(last_far) - _triangle(first_far)) * model.coarse_key_bytes
    )


def _read_up_to(n: int, kept: int, all_up_to: int) -> int:
    """Sum over positions 1..n: all of them up to a bound, `kept` beyond it."""
    return _triangle(min(n, all_up_to)) + max(0, n - all_up_to) * kept


def _sum_up_to(n: int, window: int | None) -> int:
    """Sum over positions 1..n of what a query sees."""
    return _triangle(n) if window is None else _read_up_to(n, window, window)


def _triangle(n: int) -> int:
    return n * (n + 1) // 2
