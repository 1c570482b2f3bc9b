"""`fulmen.rl` from a model directory to another one, with its report."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import fulmen
from fulmen.cli.main import main
from fulmen.pipeline.rl_plan import fitting_micro_batch, plan_rl
from fulmen.pipeline.rl_settings import AskedTask, tasks_argument
from fulmen.training.rl.settings import Domain, RlSettings
from tests.modeling.gqa.tiny_gqa import make_config, make_dense
from tests.pipeline.tiny_runs import convert, save_tiny, settings
from tests.training.rl.tiny_rl import QUICK, Graded

FILES = {"metrics.jsonl", "rl.html", "rl.json", "rl.md", "README.md", "config.json", "model.safetensors"}
FILES |= {"rl-settings.json"}
TINY = {**QUICK, "lora": 4, "learning_rate": 1e-2}


class Silent(fulmen.SilentReporter):
    """Keeps what it is told."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def test_a_converted_model_and_its_report(tmp_path, corpus_dir):
    source = save_tiny(make_dense("llama3-rope"), tmp_path / "dense")
    converted = convert(settings(source, tmp_path / "dsa", corpus_dir, stages=("inherit",), steps=None))
    told, out = Silent(), tmp_path / "rl"
    tasks = [Graded("low"), Graded("other")]
    done = fulmen.rl(converted, tasks=tasks, out=out, steps=2, kl=0.01, reporter=told, **TINY)
    assert {file.name for file in out.iterdir()} >= FILES
    assert not (tmp_path / ".rl.run").exists()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert set(rows[0]["by_task"]) == {"low", "other"}
    asked = json.loads((out / "rl-settings.json").read_text())
    assert asked["tasks"][0] == {"task": "low", "is_named": False, "kl": 0.01}
    assert (asked["options"]["lora"], asked["options"]["steps"]) == (4, 2)
    report = json.loads((out / "rl.json").read_text())
    assert report["rows"] == rows
    assert report["held_out"]["low"]["strict"]["n"] == 3
    page = (out / "rl.html").read_text()
    for figure in ("reward", "tasks", "length", "entropy", "kl", "masked", "kept", "gap", "constant"):
        assert f'id="{figure}"' in page
    assert "## Reinforcement learning" in (out / "README.md").read_text()
    assert done.record["stages"] == ["inherit", "rl"]
    model, tokenizer = fulmen.load(done)
    assert tokenizer("w5").input_ids == [5]
    assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    assert told.notes[0].startswith(
        "Plan: 2 steps of 2 prompts x 4 replies of up to 6 tokens; tasks: low (KL 0.01)"
    )
    with pytest.raises(fulmen.OutputError, match="exists and is not empty"):
        fulmen.rl(converted, tasks=tasks, out=out, steps=2, **TINY)


def test_a_dense_model_stays_dense(tmp_path):
    source = save_tiny(make_dense("qwen3"), tmp_path / "dense")
    done = fulmen.rl(source, tasks=Graded(), out=tmp_path / "rl", steps=1, full=True, **{**QUICK, "top_k": 8})
    assert done.record["stages"] == ["rl"]
    model = AutoModelForCausalLM.from_pretrained(done.path)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert {file.name for file in done.path.iterdir()} >= FILES


def test_other_settings_do_not_go_on_with_an_unfinished_run(tmp_path, monkeypatch):
    source = save_tiny(make_dense(), tmp_path / "dense")
    asked = {"tasks": Graded(), "out": tmp_path / "rl", "steps": 2, **TINY}

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fulmen.pipeline.rl.learning_report", stop)
        with pytest.raises(KeyboardInterrupt):
            fulmen.rl(source, **asked)
    with pytest.raises(fulmen.ResumeError, match=r"temperature was 1\.0, is 0\.5"):
        fulmen.rl(source, **asked, temperature=0.5)
    assert (fulmen.rl(source, **asked).path / "metrics.jsonl").read_text().count("\n") == 2


def test_tasks_with_a_kl_of_their_own():
    mine = Graded()
    assert tasks_argument(["spell:max=5,kl=0.02,min=3", "gcd", mine], 0.1) == (
        AskedTask("spell:max=5,min=3", 0.02),
        AskedTask("gcd", 0.1),
        AskedTask(mine, 0.1),
    )
    assert tasks_argument("spell:kl=0", 0.1) == (AskedTask("spell", 0.0),)
    own = "python:mine.py:riddles"
    assert tasks_argument([f"{own}:kl=0.3,n=[1,2]", f"{own}:n=2,kl=0.3", own], 0.1) == (
        AskedTask(f"{own}:n=[1,2]", 0.3),
        AskedTask(f"{own}:n=2", 0.3),
        AskedTask(own, 0.1),
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": []}, "name at least one task"),
        ({"tasks": [3]}, "3 is no task; give a function of index, an object with problem() and score()"),
        ({"tasks": "spell:kl=much"}, "use a strength of 0 or more"),
        ({"tasks": "gcd:kl=1,kl=2"}, "has kl twice"),
        ({"tasks": ["gcd", "gcd:kl=1"]}, "task 'gcd' is named twice"),
        ({"out": "x" * 300}, "cannot be written (File name too long)"),
        ({"out": "/"}, "exists and is not empty"),
        ({"steps": 10**9}, "steps=1000000000 of prompts=8 cannot be listed"),
        ({"kl": -1.0}, "use a strength of 0 or more"),
        ({"rollouts": "sglang"}, "rollouts='sglang' cannot be; choose from generate, vllm"),
        ({"full": True, "lora": 4}, "full trains all weights, lora a few"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 cannot be"),
        ({"steps": 0}, "steps=0"),
        ({"prompts": "8"}, "prompts='8' cannot be"),
        ({"micro_batch": 5}, "micro_batch=5 does not divide a step's 64 replies"),
        ({"held_out": None}, "held_out=None cannot be; use an integer of 0 or more"),
        ({"top_k": 1.5}, "top_k=1.5 cannot be; use an integer of 0 or more"),
        ({"report_to": "paper"}, "report_to='paper' cannot be"),
        ({"max_new_tokens": 10_000, "micro_batch": 1}, "is beyond the model's context of 512"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(changes, words, tmp_path):
    source = save_tiny(make_dense(), tmp_path / "dense")
    with pytest.raises((fulmen.ConfigError, fulmen.OutputError)) as caught:
        fulmen.rl(source, **{"tasks": Graded(), "out": tmp_path / "rl", "steps": 1, **changes})
    assert words in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["dense"]


def test_the_plan_counts_what_is_trained_and_refuses_what_has_no_room():
    config, model = make_config("llama"), make_dense()
    own = {"steps": 1, "max_new_tokens": 32}
    lora, full = RlSettings(lora=8, **own), RlSettings(lora=None, **own)

    def plan(options, free, **more):
        return plan_rl(config, options, 30, free, **{"is_engine_apart": False, **more})

    maps = 3 * 8 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    assert plan(lora, 1).trained == maps
    assert plan(full, 1).trained == plan(full, 1).parameters == sum(p.numel() for p in model.parameters())
    assert plan(lora, 1).reference == 0
    assert plan(full, 1).reference == plan(full, 1).weights == 4 * plan(full, 1).parameters
    apart = plan(full, 1, is_engine_apart=True).total - plan(full, 1).total
    assert apart == plan(full, 1).weights
    plan(full, plan(full, 1).total).require_room()
    with pytest.raises(fulmen.ConfigError, match=r"micro_batch and the model need about .* are free"):
        plan(full, plan(full, 1).total - 1).require_room()
    assert "LoRA of rank 8" in " ".join(plan(lora, 10**9).lines(lora, [Domain(Graded())]))


@pytest.mark.parametrize(
    ("name", "more", "prompt", "n_processes", "fitting"),
    [
        # 64 x 16 tokens behind 8 prompts of 50.
        ("llama", {"max_new_tokens": 16}, 50, 1, 64),
        ("llama", {"max_new_tokens": 16}, 50, 2, 32),
        # 16 x 32 behind two of 600; 32 have four.
        ("llama", {"max_new_tokens": 32}, 600, 1, 16),
        ("llama", {"max_new_tokens": 512}, 2000, 1, 8),
        ("llama", {"prompts": 3, "group": 3, "max_new_tokens": 500}, 50, 1, 3),
        # A prompt in each reply.
        ("granite-moe", {"max_new_tokens": 16}, 50, 1, 16),
        ("llama", {"max_new_tokens": 16, "checkpointing": True}, 50, 1, 16),
        ("llama", {"max_new_tokens": 16, "indexer": "trained"}, 50, 1, 16),
    ],
)
def test_short_replies_are_read_together(name, more, prompt, n_processes, fitting):
    settings = RlSettings(steps=1, **more)
    assert fitting_micro_batch(make_config(name), settings, prompt, n_processes) == fitting


def test_the_command_names_its_options(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["fulmen", "rl", str(tmp_path), "--steps", "1", "--out", "x"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "--task" in capsys.readouterr().err
