"""A rollout engine in a process that trains: in a process of its own.

`run_files(PLAN, RESULT)`: PLAN is a JSON file, a list of runs with `model` (a directory), `new` (where the
trained model goes), `dtype` (of the engine), `prompts` and `sampling`. RESULT holds what each run found.
"""

import gc
import json
import os
import random
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fulmen.errors import FulmenError
from fulmen.modeling.rollouts import Sampling
from fulmen.pipeline.rollout_gap import logprob_gap, selection_gap
from fulmen.serving.engine.rollouts import VllmRollouts
from tests.serving.vllm_process import inspect_here

# Looking through all that vLLM imports takes half a second, and it does so nine times an engine.
COLLECT = gc.collect


def state():
    """What vLLM would change of this process."""
    draws = (random.getstate()[1][:4], torch.get_rng_state()[:64].tolist())
    functions = (torch.set_num_threads, torch.accelerator.synchronize, torch.accelerator.empty_cache)
    modes = (torch.get_num_threads(), str(torch.get_default_dtype()), torch.is_grad_enabled())
    return dict(os.environ), draws, functions, modes


def open_engine(place, run):
    return VllmRollouts(place, max_model_len=256, memory_gib=0.05, dtype=run["dtype"])


def refused(call):
    """What a FulmenError says."""
    try:
        call()
    except FulmenError as error:
        return f"{type(error).__name__}: {error}"
    return None


def train(model, text):
    """A step of SGD, and a random one for what has no gradient: indexers, and all that is no parameter."""
    model.train()
    ids = torch.tensor([text])
    model(ids, labels=ids, use_cache=False).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    model.eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if name.endswith("rope_pairs"):
                weight.copy_(torch.randint(0, 9, weight.shape, generator=generator))
            elif ".indexer." in name:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))


def fail_updates(engine, model, ask):
    """What is said to weights that cannot be, and to what is asked of an engine that has some of them."""
    weights = list(model.state_dict().items())
    said = [refused(lambda: engine.update(weights[:-4]))]
    said += [refused(ask)]
    said += [refused(lambda: engine.update([("base_model.x", torch.zeros(3)), *weights]))]
    said += [refused(lambda: engine.update([(name, weight[:3]) for name, weight in weights]))]
    return said


def run_engine(run):
    """An engine that follows a model through a step, beside one that starts with the model after it."""
    sampling, prompts = Sampling(**run["sampling"]), run["prompts"]
    model = AutoModelForCausalLM.from_pretrained(run["model"], dtype=torch.float32)
    before, engine = state(), open_engine(run["model"], run)

    def ask():
        return engine.generate(prompts, sampling)

    def gap(rollouts):
        return asdict(logprob_gap(model, prompts, rollouts, sampling.temperature))

    first = ask()
    result = {"repeats": ask() == first, "first_gap": gap(first), "unchanged": state() == before}
    train(model, prompts[-1])
    model.save_pretrained(run["new"])
    result["stale_gap"] = gap(ask())
    result["faults"] = fail_updates(engine, model, ask)
    engine.update(model.state_dict().items())
    second = ask()
    result["gap"], result["rollouts"] = gap(second), [asdict(rollout) for rollout in second]
    if hasattr(model.config, "dsa"):
        result["selections"] = asdict(selection_gap(model, engine, prompts))
    # As files have it: experts one by one, a tied head left out.
    engine.update(load_file(Path(run["new"]) / "model.safetensors").items())
    result["same_from_files"] = ask() == second
    engine.close()
    engine.close()
    result["closed"] = [torch.distributed.is_initialized(), refused(ask)]
    fresh = open_engine(run["new"], run)
    result["fresh_is_updated"] = fresh.generate(prompts, sampling) == second
    fresh.close()
    return result


def run_files(plan, result):
    gc.collect = lambda *generation: 0
    found = []
    for run in json.loads(Path(plan).read_text()):
        found.append(run_engine(run))
        COLLECT()
        inspect_here()  # the first engine imports vLLM, as it does in a program that trains
    Path(result).write_text(json.dumps(found))
