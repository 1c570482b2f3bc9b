"""Whether an engine computes its model: its greedy answers, judged by the same model in float32.

Every token of an answer must be, for the reference that reads the prompt and the answer before it, the best
one or as good as the best: at most `LIMITS[dtype]` nats less likely. So rounding may turn near ties, and an
engine with a wrong rotation, mask, cache or selection, whose tokens are nats away, is found out.
"""

import argparse
import inspect
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import fulmen  # noqa: F401  registers the model types
from benchmarks.end_to_end.engines import EngineError, EngineSetup, Worker

LENGTHS, NEW_TOKENS = (5, 700, 1500), 24
# Logits of 16 and more lie 0.125 apart in bfloat16.
LIMITS = {"float32": 0.001, "bfloat16": 0.5, "bf16": 0.5, "Q4_1": 1.0}


class Reference:
    """The converted model and its dense twin in float32, and the prompts: the beginning of a program."""

    def __init__(self, model: Path, dense: Path) -> None:
        self.models = {
            sparse: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            for sparse, path in ((True, model), (False, dense))
        }
        text = AutoTokenizer.from_pretrained(model)(inspect.getsource(argparse))["input_ids"]
        self.prompts = [text[:length] for length in LENGTHS]

    @torch.inference_mode()
    def gap(self, prompt: list[int], answer: list[int], sparse: bool) -> float:
        """Nats by which the worst token of the answer is less likely than the best one in its place."""
        ids_BT = torch.tensor([prompt + answer])
        logits_BTV = self.models[sparse](ids_BT, logits_to_keep=len(answer) + 1).logits
        return worst_gap(logits_BTV[0, :-1], torch.tensor(answer))


def worst_gap(logits_TV: Tensor, tokens_T: Tensor) -> float:
    """Nats between the likeliest token and the one taken, where they lie furthest apart."""
    taken_T = logits_TV.gather(-1, tokens_T[:, None])[:, 0]
    return float((logits_TV.amax(-1) - taken_T).max())


def check(setup: EngineSetup, worker: Worker, reference: Reference, sparse: bool) -> float:
    """The worst gap of the engine's answers.

    Raises:
        EngineError: it is above the limit, or the process ended.
    """
    answers = [worker.ask("answer", prompt, NEW_TOKENS) for prompt in reference.prompts]
    pairs = zip(reference.prompts, answers, strict=True)
    gap, limit = max(reference.gap(*pair, sparse) for pair in pairs), LIMITS[setup.dtype]
    if gap > limit:
        raise EngineError(
            f"{setup.name} in {setup.dtype} answers {gap:.3f} nats off its reference, limit {limit}"
        )
    return gap


def check_plugin(
    setup: EngineSetup, settings: dict[str, Any], reference: Reference, log: Path
) -> dict[str, float]:
    """Worst gaps of fulmen's plugin in float32: where k covers the prompts to dense, at the model's k to DSA.

    An index in two levels is checked with k candidates, too: of more these prompts have no use.

    Raises:
        EngineError: as `check`.
    """
    dsa = json.loads((setup.model / "config.json").read_text())["dsa"]
    whole = {"dsa": {**dsa, "topk": 2 * LENGTHS[-1], "topk_shares": []}}
    cases = {"float32, k >= length": whole, "float32": {}}
    if dsa.get("coarse_head_dim"):
        cases["float32, k candidates"] = {"dsa": {**dsa, "candidate_factor": 1}}
    gaps = {}
    for name, overrides in cases.items():
        exact = setup._replace(dtype="float32", overrides=overrides)
        # A cache of float32 is twice as large: no longer than the prompts need.
        short = {**settings, "eager": True, "tokens": LENGTHS[-1] + 2 * NEW_TOKENS}
        reference.models[True].config.dsa = overrides.get("dsa", dsa)
        with closing(Worker(exact, short, log)) as worker:
            gaps[name] = check(exact, worker, reference, sparse=overrides is not whole)
    reference.models[True].config.dsa = dsa
    return gaps
