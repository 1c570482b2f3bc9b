"""A tiny model, its words and a task that it can learn, for the tests of reinforcement learning."""

import json
from dataclasses import replace
from pathlib import Path

from fulmen.modeling.rollouts import Sampling
from fulmen.tasks.base import Problem, Score
from fulmen.training.prompts import ends_of, pad_of
from fulmen.training.rl.generate_engine import GenerateRollouts
from fulmen.training.rl.run import train_rl
from fulmen.training.rl.settings import Domain, RlSettings
from tests.modeling.gqa.tiny_gqa import make_dense, make_dsa
from tests.pipeline.tiny_runs import tiny_tokenizer
from tests.training.forks import die

TOKENIZER = tiny_tokenizer()
QUICK = {"prompts": 2, "group": 4, "micro_batch": 4, "max_new_tokens": 6, "top_k": 32, "held_out": 3}
# Most replies of a random model are cut.
QUICK["cut_weight"] = 1.0
KILLED = {"steps": 5, "save_every": 2}


class LowWords:
    """The share of a reply's words below w48; prompts of different lengths, more words than the tiny k."""

    def __init__(self, name: str = "low") -> None:
        self.name = name

    def problem(self, index: int) -> Problem:
        words = [f"w{2 + (7 * index + n) % 90}" for n in range(12 + index % 3)]
        return Problem(self.name, index, ({"role": "user", "content": " ".join(words)},))

    def score(self, problem: Problem, reply: str) -> Score:
        words = reply.split()
        right = sum(int(word[1:]) < 48 for word in words) / max(len(words), 1)
        return Score(float(right == 1), right)


class Graded(LowWords):
    """Rewards the share itself."""

    def score(self, problem: Problem, reply: str) -> Score:
        lenient = super().score(problem, reply).lenient
        return Score(lenient, lenient)


def fresh_model(name: str = "llama"):
    return make_dsa(make_dense(name), topk=8)


def generate_engine(model, kind=GenerateRollouts, **more) -> GenerateRollouts:
    return kind(model, ends_of(model, TOKENIZER), pad_of(model, TOKENIZER), **more)


def quick(**changes) -> RlSettings:
    return RlSettings(**{"steps": 2, "lora": 4, "learning_rate": 1e-2, **QUICK, **changes})


def run(run_dir: Path, model=None, domains=None, engine=generate_engine, note=lambda _: None, **changes):
    model = fresh_model() if model is None else model
    domains = [Domain(Graded())] if domains is None else domains
    return model, train_rl(model, TOKENIZER, domains, engine, run_dir, quick(**changes), note=note)


def run_until_killed(run_dir: str) -> None:
    """A run that dies, as by kill -9, when its engine is asked for the fourth step's replies."""

    class Deadly(GenerateRollouts):
        calls = 0

        def generate(self, prompts, sampling: Sampling):
            self.calls += sampling.per_prompt > 1
            if self.calls == 4:
                die()
            return super().generate(prompts, sampling)

    run(Path(run_dir), engine=lambda model: generate_engine(model, Deadly), **KILLED)


class StaleEngine(GenerateRollouts):
    """Says other log-probabilities than the policy's, as one that kept old weights does."""

    def generate(self, prompts, sampling):
        found = super().generate(prompts, sampling)
        return [replace(one, logprobs=tuple(x - 0.01 for x in one.logprobs)) for one in found]


def stale_engine(model) -> StaleEngine:
    return generate_engine(model, StaleEngine)


def metric_rows(run_dir: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"]
    return rows


def run_in_processes(run_dir: str) -> None:
    """A run of which each process has half of the prompts."""
    run(Path(run_dir), steps=3, prompts=4)
