"""A converted model end to end, beside its dense twin and the peers that a user would pick on a CPU.

    python -m benchmarks.end_to_end.run out/smollm2-135m-dsa --llama-python LLAMA/bin/python
    python -m benchmarks.end_to_end.run out/smollm2-135m-dsa --engines vllm --requests 8 \
        --decode 8192,32768 --prefill ""

Engines: vLLM with DSA and dense (one engine, fulmen's plugin), Transformers with DSA and dense (SDPA), and
llama.cpp (f16 cache, flash attention where it is faster) with the same weights in bfloat16 and Q4_1. Each is
a process of its own with the same number of threads; all stay alive and alternate, round by round.

An engine whose answers are not its model's is not timed (`correctness.py`): it is printed as refused, and
the exit code is 1. DSA in vLLM is checked in float32 too, at the model's k and at a k that covers the prompt.

Prompts that are read are Python's own sources. Before a decoding step the cache is filled with random numbers
in place of a prompt that is read. Where memory does not hold the caches of all engines, those left out are
extrapolated from their two longest lengths, marked "~". Beyond the model's context answers mean nothing,
times do.
"""

import json
import os
import random
import sys
import tempfile
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from transformers import AutoTokenizer

from benchmarks.end_to_end.correctness import LENGTHS, NEW_TOKENS, Reference, check, check_plugin
from benchmarks.end_to_end.engines import (
    ENGINES,
    EngineError,
    EngineSetup,
    Worker,
    all_engines,
    bytes_per_token,
    set_environment,
)
from benchmarks.end_to_end.figures import finished, table
from benchmarks.end_to_end.weights import make_dense_twin
from benchmarks.machine import describe_machine
from fulmen.files import atomic_write

SPARE_BYTES = 2**31
LONG_PROMPT = 8192


def main(
    model: Annotated[Path, typer.Argument(help="What fulmen convert wrote.", show_default=False)],
    out: Annotated[Path, typer.Option(help="JSON file; the engines' output goes beside it.")] = Path(
        "out/bench/end_to_end.json"
    ),
    decode: Annotated[str, typer.Option(help="Tokens before those decoded.")] = "512,2048,8192,32768,131072",
    prefill: Annotated[str, typer.Option(help="Tokens of the prompts.")] = "2048,8192",
    rounds: Annotated[int, typer.Option(help="Of every engine; prompts above 8192 tokens get one.")] = 3,
    steps: Annotated[int, typer.Option(help="Tokens decoded in a round.")] = 8,
    requests: Annotated[int, typer.Option(help="Decoded together; more than one in vLLM alone.")] = 1,
    threads: Annotated[int, typer.Option(help="Of every engine.")] = len(os.sched_getaffinity(0)),
    eager: Annotated[bool, typer.Option(help="vLLM without its compiler.")] = False,
    engines: Annotated[str, typer.Option(help="What to compare.")] = ",".join(ENGINES),
    llama_python: Annotated[str, typer.Option(help="An interpreter that has llama_cpp.")] = sys.executable,
) -> None:
    """Check, time, print a table and write everything to a JSON file."""
    prompts, contexts = (sorted(map(int, filter(None, x.split(",")))) for x in (prefill, decode))
    if unknown := set(chosen := engines.split(",")) - set(ENGINES):
        raise typer.BadParameter(f"--engines: {', '.join(unknown)}: choose of {', '.join(ENGINES)}")
    if requests > 1 and chosen != ["vllm"]:
        raise typer.BadParameter(f"--requests {requests}: in vLLM alone; add --engines vllm")
    tokens = max([*prompts, *contexts, LENGTHS[-1] + NEW_TOKENS]) + 2 * steps
    settings = {"threads": threads, "eager": eager, "tokens": tokens}
    report = {**describe_machine(), "settings": settings, "requests": requests}
    out.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        dense = make_dense_twin(model, folder / "dense")
        setups = list(all_engines(model, dense, folder, llama_python, chosen))
        needs = {setup.name: requests * bytes_per_token(model, setup) for setup in setups}
        set_environment(threads, 1.75 * tokens * needs[setups[0].name])
        workers, report["checks"] = start(setups, settings, Reference(model, dense), out.parent, stack)
        report["versions"] = {name: worker.versions for name, worker in workers.items()}
        report["cells"] = []
        text = program_text(model, 2 * max([*prompts, 1]))
        for length in prompts:
            of_prompt = rounds if length <= LONG_PROMPT else 1
            report["cells"].append(measure_prefill(workers, text, length, of_prompt))
            write(report, out)
        for length in contexts:
            report["cells"].append(measure_decode(workers, needs, length, requests, rounds, steps))
            write(report, out)
    print(table(finished(report["cells"]), [setup.name for setup in setups]))
    raise typer.Exit(any(found["refused"] for found in report["checks"].values()))


def start(
    setups: list[EngineSetup], settings: dict[str, Any], reference: Reference, logs: Path, stack: ExitStack
) -> tuple[dict[str, Worker], dict[str, dict[str, Any]]]:
    """The engines whose answers are right, alive until the stack ends, and what the checks of all found."""
    workers, checks = {}, {}
    for setup in setups:
        log = logs / f"{setup.name.replace(' ', '-')}.log"
        try:
            plugin = setup.engine == "vllm" and setup.sparse
            gaps = check_plugin(setup, settings, reference, log) if plugin else {}
            with ExitStack() as trial:
                worker = trial.enter_context(closing(Worker(setup, settings, log)))
                gaps[setup.dtype] = check(setup, worker, reference, setup.sparse)
                stack.push(trial.pop_all())
            workers[setup.name] = worker
            checks[setup.name] = {"worst gap in nats": gaps, "refused": None}
        except EngineError as error:
            checks[setup.name] = {"refused": str(error)}
        print(f"{setup.name}: {checks[setup.name]}", flush=True)
    return workers, checks


def random_prompt(length: int, seed: int) -> list[int]:
    """Tokens that every vocabulary has."""
    return random.Random(seed).choices(range(100, 10_000), k=length)


def program_text(model: Path, length: int) -> list[int]:
    """At least `length` tokens of Python's own sources."""
    tokenizer, tokens = AutoTokenizer.from_pretrained(model), []
    for file in sorted(Path(os.__file__).parent.glob("*.py")):
        if len(tokens) >= length:
            break
        tokens += tokenizer(file.read_text(errors="replace"), verbose=False)["input_ids"]
    return tokens


def measure_prefill(workers: dict[str, Worker], text: list[int], length: int, rounds: int) -> dict[str, Any]:
    """Seconds until the first token of an answer to another piece of the text in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for done in range(rounds):
        start = done * (len(text) - length) // rounds
        prompt = text[start : start + length]
        for name, worker in workers.items():
            seconds[name].append(worker.ask("prefill", prompt))
    return {"work": "prefill", "length": length, "seconds": seconds}


def measure_decode(
    workers: dict[str, Worker], needs: dict[str, int], length: int, requests: int, rounds: int, steps: int
) -> dict[str, Any]:
    """Seconds of a step after a filled cache, of engines whose cache has room; a first round is dropped."""
    prompts, seconds = [random_prompt(length, length + i) for i in range(requests)], dict[str, list[float]]()
    for name, worker in workers.items():
        if needs[name] * length < psutil.virtual_memory().available - SPARE_BYTES:
            worker.ask("fill", *prompts)
            worker.ask("decode", steps)
            seconds[name] = []
    for _ in range(rounds):
        for name, times in seconds.items():
            times.append(workers[name].ask("decode", steps))
    for name in seconds:
        workers[name].ask("release")
    return {"work": "decode", "length": length, "seconds": seconds}


def write(report: dict[str, Any], out: Path) -> None:
    """Everything measured so far."""
    text = json.dumps({**report, "cells": finished(report["cells"])}, indent=1)
    atomic_write(out, lambda temporary: temporary.write_text(text))


if __name__ == "__main__":
    typer.run(main)
