"""What all stages' runs share: the plan that a budget allows, the first weights, the best step."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from fulmen.errors import OutputError
from fulmen.training.checkpoints import COMPLETE_FILE
from fulmen.training.run import best_checkpoint, first_weights, open_run, run_plan, steps_within


@pytest.mark.parametrize(
    ("budget_s", "evaluation_s", "step_s", "made", "steps", "evaluations"),
    [
        # A fifth of 100 s holds 20 evaluations, of which 3 are wanted: 90 - 4 - 2 = 84 s, 42 steps.
        (100.0, 1.0, 2.0, 1, 42, 3),
        # A fifth holds 4, and 2 are made: 90 - 4 * 5 - 1 = 69 s.
        (100.0, 5.0, 1.0, 2, 69, 2),
        # None is left, but one there is: 90 - 2 * 50 - 1 is nothing, and each evaluation follows a step.
        (100.0, 50.0, 1.0, 1, 1, 1),
    ],
)
def test_steps_within_a_budget(budget_s, evaluation_s, step_s, made, steps, evaluations):
    assert steps_within(budget_s, evaluation_s, step_s, 3, made) == (steps, evaluations)


def test_a_plan_is_made_once(tmp_path):
    assert run_plan(tmp_path, lambda: {"steps": 3}) == {"steps": 3}
    assert run_plan(tmp_path, lambda: {"steps": 4}) == {"steps": 3}


def test_first_weights_are_written_once(tmp_path):
    file = first_weights(tmp_path, lambda: {"w": torch.ones(2)})
    assert first_weights(tmp_path, lambda: {"w": torch.zeros(2)}) == file
    assert load_file(file)["w"].tolist() == [1, 1]


def test_first_weights_without_room(tmp_path):
    with pytest.raises(OutputError, match="gone has no room for the first weights"):
        first_weights(tmp_path / "gone", lambda: {"w": torch.ones(2)})


def checkpoint(run_dir, step, best, metric, complete=True):
    folder = run_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    state = {"best_model_checkpoint": str(run_dir / f"checkpoint-{best}"), "best_metric": metric}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    if complete:
        (folder / COMPLETE_FILE).touch()
    return SimpleNamespace(state=SimpleNamespace(**state))


def test_the_best_step_is_the_best_complete_one(tmp_path):
    checkpoint(tmp_path, 2, 2, 1.5)
    checkpoint(tmp_path, 4, 2, 1.5)
    cut_short = checkpoint(tmp_path, 6, 6, 1.0, complete=False)
    assert best_checkpoint(cut_short, tmp_path, 2.0) == (str(tmp_path / "checkpoint-2"), 1.5)
    assert best_checkpoint(cut_short, tmp_path, 1.5) == (None, 1.5)
    assert open_run(tmp_path) == str(tmp_path / "checkpoint-4")
    assert not (tmp_path / "checkpoint-6").exists()


def test_a_run_without_checkpoints_keeps_the_first_weights(tmp_path):
    assert open_run(tmp_path / "new") is None
    state = SimpleNamespace(best_model_checkpoint=None, best_metric=None)
    assert best_checkpoint(SimpleNamespace(state=state), tmp_path / "new", 3.0) == (None, 3.0)
