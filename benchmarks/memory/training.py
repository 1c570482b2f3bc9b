"""Peak memory of the training losses against their length, ours beside the straightforward ones.

    python -m benchmarks.memory.training --lengths 2048,4096,8192

Random tensors in the shape of SmolLM2-135M, forward and backward pass, each measurement in a process of its
own. A case that would need more than --limit GiB is not run: its estimate is given, in parentheses.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from fulmen.ops.attention.dense import dense_attention
from fulmen.ops.attention.sparse import sparse_attention
from fulmen.ops.attention.sparse.reference import sparse_attention_reference
from fulmen.ops.losses.indexer import indexer_loss, indexer_loss_selected
from fulmen.ops.losses.indexer.reference import indexer_loss_reference, indexer_loss_selected_reference
from fulmen.ops.topk import index_topk
from fulmen.training.sparse.distill import next_token_losses, teacher_targets

HEADS, GROUPS, WIDTH, INDEX_WIDTH, HIDDEN, VOCAB, TOP_N = 9, 3, 64, 24, 576, 49152, 64
ROWS = 192
GIB = 2**30


def _attention(length: int) -> tuple[Tensor, Tensor, Tensor]:
    q_BTHD = torch.randn(1, length, HEADS, WIDTH, requires_grad=True)
    k_BSGD, v_BSGV = (torch.randn(1, length, GROUPS, WIDTH, requires_grad=True) for _ in range(2))
    return q_BTHD, k_BSGD, v_BSGV


def _index(length: int) -> tuple[Tensor, ...]:
    q_BTJE = torch.randn(1, length, HEADS, INDEX_WIDTH, requires_grad=True)
    k_BSIE = torch.randn(1, length, GROUPS, INDEX_WIDTH, requires_grad=True)
    w_BTJ, b_BTJ = (torch.randn(1, length, HEADS, requires_grad=True) for _ in range(2))
    return q_BTJE, k_BSIE, w_BTJ, b_BTJ


def _ends(length: int) -> tuple[Tensor, Tensor]:
    stop_BT = torch.arange(1, length + 1)[None]
    return torch.zeros_like(stop_BT), stop_BT


def _at(rows_T: Tensor, index: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    q_BTJE, k_BSIE, w_BTJ, b_BTJ = index
    return q_BTJE[:, rows_T], k_BSIE, w_BTJ[:, rows_T], b_BTJ[:, rows_T]


def warmup_loss(length: int, ours: bool) -> Tensor:
    """The KL over all keys: ours in blocks and on 192 rows, the other over all rows at once."""
    q_BTHD, k_BSGD, _ = _attention(length)
    start_BT, stop_BT = _ends(length)
    if not ours:
        whole = (*_index(length), q_BTHD, k_BSGD, start_BT, stop_BT, WIDTH**-0.5)
        return indexer_loss_reference(*whole).loss.kl_BT.mean()
    rows_T = torch.randperm(length)[:ROWS].sort().values
    ends = (start_BT[:, rows_T], stop_BT[:, rows_T])
    some = (*_at(rows_T, _index(length)), q_BTHD[:, rows_T], k_BSGD, *ends, WIDTH**-0.5)
    return indexer_loss(*some).kl_BT.mean()


def warmup_loss_all_rows(length: int, ours: bool) -> Tensor:
    """The same loss on the same rows as the straightforward one."""
    q_BTHD, k_BSGD, _ = _attention(length)
    inputs = (*_index(length), q_BTHD, k_BSGD, *_ends(length), WIDTH**-0.5)
    return (indexer_loss(*inputs) if ours else indexer_loss_reference(*inputs).loss).kl_BT.mean()


def selected_loss(length: int, ours: bool) -> Tensor:
    """The sparse stage's KL over the selected set, all rows."""
    q_BTHD, k_BSGD, _ = _attention(length)
    index = _index(length)
    topk_BTK = index_topk(*index, *_ends(length), length // 8)
    inputs = (*index, q_BTHD, k_BSGD, topk_BTK, WIDTH**-0.5)
    return (
        indexer_loss_selected(*inputs) if ours else indexer_loss_selected_reference(*inputs).loss
    ).kl_BT.mean()


def attention(length: int, ours: bool) -> Tensor:
    """Sparse attention of one layer, k an eighth of the length."""
    inputs = _attention(length)
    topk_BTK = index_topk(*_index(length), *_ends(length), length // 8)
    if ours:
        return sparse_attention(*inputs, topk_BTK, WIDTH**-0.5)[0].sum()
    return sparse_attention_reference(*inputs, topk_BTK, WIDTH**-0.5).out_BTHV.sum()


def distillation(length: int, ours: bool) -> Tensor:
    """LM loss and KL to a teacher from hidden states: ours from 64 tokens, the other from whole logits."""
    hidden_TC = torch.randn(length, HIDDEN, requires_grad=True)
    weight_VC = (torch.randn(VOCAB, HIDDEN) / HIDDEN**0.5).requires_grad_()
    labels_T = torch.randint(VOCAB, (length,))
    taught_TC = torch.randn(length, HIDDEN)
    if ours:
        share_T = torch.full((length,), 1 / length)
        targets = teacher_targets(taught_TC, weight_VC, TOP_N)
        return next_token_losses(hidden_TC, weight_VC, labels_T, share_T, targets, 0.9).loss
    logits_TV = hidden_TC @ weight_VC.T
    with torch.no_grad():
        p_TV = (taught_TC @ weight_VC.T).softmax(-1)
    kl = F.kl_div(logits_TV.log_softmax(-1), p_TV, reduction="batchmean")
    return 0.9 * kl + 0.1 * F.cross_entropy(logits_TV, labels_T)


def dense(length: int, ours: bool) -> Tensor:
    """Dense attention of one layer: blocks, or all scores at once."""
    q_BTHD, k_BSGD, v_BSGV = _attention(length)
    if ours:
        return dense_attention(q_BTHD, k_BSGD, v_BSGV, *_ends(length), WIDTH**-0.5)[0].sum()
    k_BSHD, v_BSHV = (x.repeat_interleave(HEADS // GROUPS, 2) for x in (k_BSGD, v_BSGV))
    scores_BHTS = torch.einsum("bthd,bshd->bhts", q_BTHD, k_BSHD) * WIDTH**-0.5
    scores_BHTS = scores_BHTS + torch.full((length, length), -torch.inf).triu(1)
    return torch.einsum("bhts,bshv->bthv", scores_BHTS.softmax(-1), v_BSHV).sum()


# Numbers that are alive at once in the straightforward form, per length and per length squared; the KLs' from
# their peaks at 2,048 and 4,096 tokens, the others' counted.
CASES: dict[str, tuple[Callable[[int, bool], Tensor], int, int]] = {
    "warmup_loss": (warmup_loss, 0, 30 * HEADS),
    "warmup_loss_all_rows": (warmup_loss_all_rows, 0, 30 * HEADS),
    "selected_loss": (selected_loss, 0, 10 * HEADS),
    "sparse_attention": (attention, 0, 10 * HEADS),
    "distillation": (distillation, 6 * VOCAB, 0),
    "dense_attention": (dense, 0, 6 * HEADS),
}


def estimate_gib(case: str, length: int) -> float:
    """Of the straightforward form, float32."""
    _, linear, square = CASES[case]
    return 4 * (linear * length + square * length**2) / GIB


def measure(case: str, length: int, ours: bool) -> dict[str, float]:
    """Peak memory above the process without the case, and seconds, in a process of its own."""
    arguments = ["--one", f"{case}:{length}:{int(ours)}"]
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.returncode}
    return json.loads(done.stdout)


def run_one(what: str) -> None:
    """One measurement; prints JSON."""
    case, length, ours = what.split(":")
    torch.manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clock = time.perf_counter()
    CASES[case][0](int(length), bool(int(ours))).backward()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    print(json.dumps({"gib": round(peak, 3), "seconds": round(time.perf_counter() - clock, 2)}))


def main(
    lengths: str = "2048,4096,8192,16384,32768",
    limit: Annotated[float, typer.Option(help="GiB that a straightforward case may need.")] = 8.0,
    cases: str = ",".join(CASES),
    out: Path | None = None,
    one: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print a Markdown table; write all numbers to `--out` as JSON."""
    if one is not None:
        run_one(one)
        return
    results = []
    print("| loss | S | ours, GiB | straightforward, GiB | ours, s | straightforward, s |")
    print("|---|---|---|---|---|---|")
    for case in cases.split(","):
        for length in map(int, lengths.split(",")):
            guess = estimate_gib(case, length)
            ours = measure(case, length, True)
            plain = measure(case, length, False) if guess <= limit else {"estimated_gib": round(guess, 1)}
            results.append({"case": case, "length": length, "ours": ours, "straightforward": plain})
            theirs = plain.get("gib", f"({plain.get('estimated_gib', 'failed')})")
            seconds = [side.get("seconds", "") for side in (ours, plain)]
            cells = (case, length, ours.get("gib", "failed"), theirs, *seconds)
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    if out is not None:
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
