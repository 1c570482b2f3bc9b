"""Runs engines of vLLM one after the other and writes what they answered: in a process of its own.

`run_files(PLAN, RESULT)`: PLAN is a JSON file, a list of runs. A run has `model` (a directory), `engine`
(further arguments of `vllm.LLM`), `max_tokens`, and `batches`: lists of prompts (token ids) that are given to
the engine together. A batch "forget" sets all index keys to zero instead, and one like {"update": DIR,
"way": "reload", "names": ["indexer"]} gives the running model weights of another directory: those whose names
have one of the parts. RESULT holds, for each run, a list of batches with `tokens`, their `logprobs`, and
`cached` (prompt tokens found in the prefix cache) of every prompt, and `preemptions`.
"""

import json
from pathlib import Path


def run_engine(run):
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {"skip_tokenizer_init": True, "enforce_eager": True, "dtype": "float32", "block_size": 32}
    engine = LLM(run["model"], disable_log_stats=False, **{**settings, **run["engine"]})
    result = {"batches": [run_batch(engine, run, batch) for batch in run["batches"]]}
    counts = {metric.name: getattr(metric, "value", None) for metric in engine.get_metrics()}
    result["preemptions"] = counts["vllm:num_preemptions"]
    del engine
    cleanup_dist_env_and_memory()
    return result


def run_batch(engine, run, batch):
    from vllm import SamplingParams

    if batch == "forget":
        return engine.apply_model(forget_index_keys)
    if isinstance(batch, dict):
        return update_weights(engine, **batch)
    greedy = {"temperature": 0, "max_tokens": run["max_tokens"], "ignore_eos": True, "logprobs": 0}
    sampling = SamplingParams(**greedy, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in batch]
    answers = engine.generate(prompts, sampling, use_tqdm=False)
    outputs = [answer.outputs[0] for answer in answers]
    return {
        "tokens": [list(output.token_ids) for output in outputs],
        "logprobs": [[next(iter(at.values())).logprob for at in output.logprobs] for output in outputs],
        "cached": [answer.num_cached_tokens for answer in answers],
    }


def forget_index_keys(model):
    for module in model.modules():
        if hasattr(module, "index_cache"):
            module.index_cache.rows_RHC().zero_()


def update_weights(engine, update, way, names=("",)):
    """As those do who train a model while it answers: by a reload, by the model, or into its parameters."""
    from safetensors.torch import load_file

    found = {
        name: weight
        for name, weight in load_file(Path(update) / "model.safetensors").items()
        if any(part in name for part in names)
    }
    if way == "reload" and names == ("",):
        engine.collective_rpc("reload_weights", kwargs={"weights_path": update})
    elif way == "reload":
        engine.collective_rpc("reload_weights", kwargs={"weights_iterator": found.items()})
    elif way == "load":
        engine.apply_model(lambda model: model.load_weights(found.items()))
    else:
        assert way == "copy"
        settings = {"weights_iterator": found.items(), "is_checkpoint_format": False}
        engine.collective_rpc("reload_weights", kwargs=settings)


def run_files(plan, result):
    Path(result).write_text(json.dumps([run_engine(run) for run in json.loads(Path(plan).read_text())]))
