"""Tiny models, texts and runs for the tests of the sparse stage."""

import json
from pathlib import Path

import torch

from fulmen.data import TokenSequence
from fulmen.modeling.gqa.inherit import inherit_gqa
from fulmen.training.sparse.run import train_sparse
from fulmen.training.sparse.settings import SparseSettings
from tests.modeling.gqa.tiny_gqa import make_dense, make_dsa, random_ids

LENGTH, TOPK = 64, 8


def written_texts(name: str = "llama") -> list[torch.Tensor]:
    """Texts that the dense model wrote, of which it is the best model."""
    torch.manual_seed(0)
    more = {"do_sample": True, "top_k": 0, "max_new_tokens": LENGTH - 1, "min_new_tokens": LENGTH - 1}
    return list(make_dense(name).generate(random_ids(9, 1), **more))


TEXTS = written_texts()
TRAIN, HELD_OUT = TEXTS[:6], TEXTS[6:]
QUICK = {"steps": 6, "budget_s": None, "learning_rate": 1e-3, "indexer_learning_rate": 1e-3, "n_rows": 16}


def settings(**changes) -> SparseSettings:
    return SparseSettings(**{**QUICK, "evaluations": 2, "top_n": 16, **changes})


def fresh_model(name: str = "llama"):
    """Inherited indexers on the random dense model."""
    model = make_dsa(make_dense(name), topk=TOPK)
    inherit_gqa(model, torch.stack(TRAIN), TOPK)
    return model


def run(run_dir: Path, model=None, train=TRAIN, held_out=HELD_OUT, on_step=lambda *_: None, **changes):
    model = fresh_model() if model is None else model
    return model, train_sparse(model, train, held_out, run_dir, settings(**changes), on_step=on_step)


def log_rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "sparse.jsonl").read_text().splitlines()]


def packed_window(*lengths: int) -> TokenSequence:
    """Random documents of these lengths in one window."""
    ids = random_ids(1, sum(lengths), seed=sum(lengths))[0]
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    return TokenSequence(tuple(map(str, starts)), "prose", ids, tuple(starts))
