"""A run, written for trainers on many machines: what they read is there, and scores as fulmen does."""

import asyncio
import importlib.util
import itertools
import json
import subprocess
import sys
import tomllib
from dataclasses import asdict
from types import ModuleType, SimpleNamespace

import pytest

import fulmen
from fulmen.pipeline.api_export_rl import ENGINE_NAMES
from fulmen.pipeline.rl_engines import ENGINES, LACKS
from fulmen.tasks.base import HELD_OUT, Score
from fulmen.tasks.own import given_task
from fulmen.training.rl.settings import RlSettings
from tests.modeling.gqa.tiny_gqa import make_dense
from tests.pipeline.tiny_runs import save_tiny, tiny_tokenizer

MINE = (
    "def doubled(index, factor=2):\n    return {'prompt': f'{factor} x {index}?', 'answer': factor * index}\n"
)
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
SETTINGS = {
    "prompts": 3,
    "group": 4,
    "micro_batch": 4,
    "held_out": 5,
    "updates": 2,
    "clip_high": 0.3,
    "seed": 7,
}


def save_model(folder, name="llama", template=TEMPLATE):
    save_tiny(make_dense(name), folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def save_run(folder, trained, **changes):
    (folder / "mine.py").write_text(MINE)
    tasks = [
        {"task": f"python:{folder / 'mine.py'}:doubled", "is_named": True, "kl": 0.0},
        {"task": "tools:max_calls=2", "is_named": True, "kl": 0.01},
    ]
    asked = {
        "model": str(trained),
        "tasks": tasks,
        "options": asdict(RlSettings(steps=3, **SETTINGS)),
        **changes,
    }
    run = folder / "run"
    run.mkdir()
    (run / "rl-settings.json").write_text(json.dumps(asked))
    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "dense")


@pytest.fixture
def run(tmp_path, model):
    return save_run(tmp_path, model)


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def load(file) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launched(out, tmp_path, program, **variables):
    """Arguments of a program that a launch script calls; here it prints them."""
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / program
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$PYTHONPATH" "$@"\n')
    fake.chmod(0o755)
    path = {"PATH": f"{fake.parent}:/usr/bin:/bin", **variables}
    command = ["bash", str(out / "launch.sh"), "--more"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=path).stdout.splitlines()
    assert said[0] == str(out)
    assert said[-1] == "--more"
    return said[1:]


def test_every_engine_has_its_files_and_says_what_it_lacks():
    assert set(ENGINE_NAMES) == ENGINES.keys() == LACKS.keys()


@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_problems_are_those_of_the_run(engine, run, tmp_path):
    out = fulmen.export_rl(run, to=engine, out=tmp_path / "out")
    training, held_out = rows_of(out / "train.jsonl"), rows_of(out / "held_out.jsonl")
    # Three steps of two updates a call are two calls, whose prompts the tasks have in turn.
    assert len(training) == 12
    assert [row["metadata"]["index"] for row in training[:4]] == [0, 0, 1, 1]
    assert {row["metadata"]["task"] for row in training} == {row["data_source"] for row in held_out}
    assert [row["metadata"]["index"] for row in held_out[:5]] == [HELD_OUT + n for n in range(5)]
    assert len({row["id"] for row in training + held_out}) == 22
    assert training[1]["prompt"][0]["role"] == "user"
    assert training[1]["label"] == training[1]["reward_spec"]["ground_truth"]
    said = (out / "README.md").read_text()
    assert all(lack in said for lack in LACKS[engine])
    with pytest.raises(fulmen.OutputError, match="not empty"):
        fulmen.export_rl(run, to=engine, out=out)


def test_slime_gets_a_reward_and_its_options(run, tmp_path, model):
    out = fulmen.export_rl(run, to="slime", out=tmp_path / "out")
    reward = load(out / "fulmen_reward.py").reward
    for row in rows_of(out / "train.jsonl")[:2]:
        for reply, worth in ((row["label"], 1.0), ("no", 0.0)):
            sample = SimpleNamespace(metadata=row["metadata"], response=reply)
            assert asyncio.run(reward(None, sample)) == worth
    (tmp_path / "model.sh").write_text("MODEL_ARGS=(--num-layers 3)\n")
    given = {"MODEL_SCRIPT": str(tmp_path / "model.sh"), "REFERENCE": "/reference", "GPUS": "2"}
    said = launched(out, tmp_path, "ray", **given)
    options = dict(itertools.pairwise(said))
    assert options["--num-layers"] == "3"
    assert options["--hf-checkpoint"] == str(model)
    assert (options["--num-rollout"], options["--rollout-batch-size"]) == ("2", "6")
    assert (options["--eps-clip"], options["--eps-clip-high"]) == ("0.2", "0.3")
    assert options["--kl-loss-coef"] == "0.01"
    # Adapters become all weights, whose rate is another.
    assert options["--lr"] == "1e-05"
    assert {"--use-opsm", "--use-unbiased-kl", "--use-rollout-logprobs"} <= set(said)
    assert not {"--use-rollout-routing-replay", "--freeze-indexer"} & set(said)


def test_skyrl_gets_an_environment_and_its_options(run, tmp_path, model):
    out = fulmen.export_rl(run, to="skyrl", out=tmp_path / "out", steps=9)
    for name in ("fulmen_env.py", "main_fulmen.py"):
        compile((out / name).read_text(), name, "exec")
    said = launched(out, tmp_path, "python", GPUS="2")
    options = dict(word.split("=", 1) for word in said if "=" in word)
    assert options["trainer.policy.model.path"] == str(model)
    assert options["data.train_data"] == f"['{out}/train.jsonl']"
    assert options["trainer.max_training_steps"] == "5"
    assert options["trainer.algorithm.grpo_norm_by_std"] == "false"
    assert options["trainer.algorithm.off_policy_correction.geo_mask_low"] == "0.951229"
    assert options["trainer.policy.model.lora.rank"] == "16"
    assert "trainer.strategy" not in options


def test_prime_rl_gets_an_environment_and_its_settings(run, tmp_path, model, monkeypatch):
    out = fulmen.export_rl(run, to="prime-rl", out=tmp_path / "out")
    settings = tomllib.loads((out / "rl.toml").read_text())
    assert settings["model"] == {"name": str(model)}
    assert settings["orchestrator"]["batch_size"] == 12
    assert settings["orchestrator"]["train"]["env"] == [{"id": "fulmen_rl", "name": "fulmen"}]
    assert settings["trainer"]["loss"]["kl_tau"] == 0.01
    assert settings["trainer"]["model"]["lora"] == {"rank": 16, "alpha": 32}
    assert launched(out, tmp_path, "uv")[:3] == ["run", "rl", "@"]
    # Its environment is one that `fulmen rl` takes, too.
    verifiers = SimpleNamespace(Rubric=SimpleNamespace, SingleTurnEnv=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "verifiers", verifiers)
    task = given_task(load(out / "fulmen_rl.py").load_environment())
    problem = task.problem(HELD_OUT)
    assert problem.data["row"]["info"]["index"] == HELD_OUT
    assert task.score(problem, problem.data["row"]["answer"]) == Score(1.0, 1.0)
    assert task.score(problem, "no") == Score(0.0, 0.0)


def test_experts_are_replayed_where_the_engine_can(tmp_path):
    run = save_run(tmp_path, save_model(tmp_path / "moe", "qwen3-moe"))
    out = {name: fulmen.export_rl(run, to=name, out=tmp_path / name) for name in ENGINE_NAMES}
    assert "--use-rollout-routing-replay" in (out["slime"] / "launch.sh").read_text()
    assert "moe_enable_routing_replay=true" in (out["skyrl"] / "launch.sh").read_text()
    assert tomllib.loads((out["prime-rl"] / "rl.toml").read_text())["trainer"]["enable_router_replay"] is True


OBJECT = [{"task": "low", "is_named": False, "kl": 0.0}]
TURNS = [{"task": "world_steps:level=2", "is_named": True, "kl": 0.0}]


@pytest.mark.parametrize(
    ("changes", "asked", "error", "words"),
    [
        ({}, {"to": "verl"}, fulmen.ConfigError, "to='verl' cannot be; choose from slime, skyrl, prime-rl"),
        ({}, {"steps": 0}, fulmen.ConfigError, "steps=0"),
        ({"tasks": OBJECT}, {}, fulmen.ConfigError, "task 'low' was an object of a program"),
        ({"tasks": TURNS}, {}, fulmen.ConfigError, "task 'world_steps:level=2' has several turns"),
        ({"options": {"speed": 1}}, {}, fulmen.CheckpointError, "no readable rl-settings.json"),
        ({"model": "./nowhere"}, {}, fulmen.CheckpointError, "nowhere"),
    ],
)
def test_what_cannot_be_exported(changes, asked, error, words, tmp_path, model):
    run = save_run(tmp_path, model, **changes)
    with pytest.raises(error, match=words):
        fulmen.export_rl(run, **{"to": "slime", "out": tmp_path / "out", **asked})
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_kept(tmp_path, run):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(fulmen.OutputError, match=r"is not empty; name another directory$"):
        fulmen.export_rl(run, to="slime", out=tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_models_that_no_engine_can_take(tmp_path, run):
    bare = save_model(tmp_path / "bare", template=None)
    with pytest.raises(fulmen.ConfigError, match="has no chat template"):
        fulmen.export_rl(run, to="skyrl", out=tmp_path / "out", model=bare)
