"""Where the sparse stage takes its losses, and how much answers to questions count."""

from itertools import pairwise

import pytest
import torch

from fulmen.data import TokenSequence
from fulmen.training.rows import before_answers, target_row
from fulmen.training.sparse.run import prepare_stage
from fulmen.training.sparse.stage import label_shares
from fulmen.training.sparse.teacher import TARGET_KEYS, Teacher
from fulmen.training.sparse.trainer import held_out_loss
from tests.modeling.gqa.tiny_gqa import random_ids
from tests.training.sparse.sparse_setup import LENGTH, fresh_model, log_rows, run, settings

ANSWERS = ((20, 23), (40, 41))
# Tokens 19, 20 and 21 predict the first answer.
BEFORE = [19, 20, 21, 39]


def asking(seed: int = 3) -> TokenSequence:
    """Two documents, of which the first has questions and answers."""
    ids = random_ids(1, LENGTH, seed=seed)[0]
    return TokenSequence(("a", "b"), "prose", ids, (0, 50), ANSWERS)


def test_answers_are_predicted_by_the_tokens_before_them():
    assert before_answers(ANSWERS).tolist() == BEFORE
    row = target_row(asking())
    assert row["answers"].nonzero()[:, 0].tolist() == BEFORE


def test_all_answers_are_targets_and_some_of_the_rest():
    row = target_row(asking(), 10)
    assert int(row["targets"].sum()) == len(BEFORE) + 10
    assert row["targets"][BEFORE].all()
    # A document's last token has no next one, nor has the sequence's.
    assert not row["targets"][[49, LENGTH - 1]].any()
    rest = [place for place in row["targets"].nonzero()[:, 0].tolist() if place not in BEFORE]
    assert all(2 <= after - before <= 9 for before, after in pairwise(rest))


@pytest.mark.parametrize("n_targets", [None, 1000, LENGTH - 2 - len(BEFORE)])
def test_no_limit_takes_every_token_that_has_a_next_one(n_targets):
    assert int(target_row(asking(), n_targets)["targets"].sum()) == LENGTH - 2


def test_answers_count_half_and_rows_alike():
    counts = torch.ones(2, 8, dtype=torch.bool)
    counts[:, -1] = False
    answers = torch.zeros_like(counts)
    answers[0, [2, 3, 7]] = True
    share = label_shares(counts, answers)
    assert share[0, [2, 3]].tolist() == [0.125, 0.125]
    assert share[0, 7] == 0
    torch.testing.assert_close(share.sum(-1), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(share[1, :-1], torch.full((7,), 0.5 / 7))


def test_a_row_of_answers_alone_weighs_as_much_as_others():
    only = torch.tensor([[False, True, True, False]])
    assert label_shares(only, only).tolist() == [[0.0, 0.5, 0.5, 0.0]]
    assert label_shares(torch.zeros_like(only), None).sum() == 0


def test_the_teacher_is_asked_at_targets_alone_and_loss_and_gradient_are_those_of_all_answers():
    """The same numbers as from answers about every token, of which the others are left out."""
    model, sequence = fresh_model(), asking()
    stage = prepare_stage(model, settings()).train()
    row, every = target_row(sequence, 10), target_row(sequence)
    asked = Teacher(model, 16)
    few, all_of_them = asked.targets(row), asked.targets(every)
    assert len(few.ids_TN) == len(BEFORE) + 10
    kept = row["targets"][every["targets"]]
    for part, whole in zip(few, all_of_them, strict=True):
        torch.testing.assert_close(part, whole[kept])
    batch = {name: part[None] for name, part in row.items()}
    torch.manual_seed(0)
    losses = stage(**batch, **dict(zip(TARGET_KEYS, (part[None] for part in few), strict=True)))
    assert float(losses["kl"]) > 0
    losses["loss"].backward()
    assert float(model.lm_head.weight.grad.abs().sum()) > 0


def test_held_out_answers_are_judged_by_themselves():
    """Without a teacher by their loss, with one by the KL to it."""
    model = fresh_model()
    stage = prepare_stage(model, settings())
    text, looks_up = target_row(random_ids(1, LENGTH, seed=1)[0]), target_row(asking())
    both = held_out_loss(stage, [text, looks_up], "cpu")
    assert (both.text, 0.0) == held_out_loss(stage, [text], "cpu")
    assert (0.0, both.answers) == held_out_loss(stage, [looks_up], "cpu")
    with torch.no_grad():
        logits = model(asking().input_ids[None], position_ids=asking().position_ids[None]).logits[0]
    own = torch.nn.functional.cross_entropy(
        logits[BEFORE], asking().input_ids[[place + 1 for place in BEFORE]], reduction="none"
    )
    assert both.answers == pytest.approx(float(own.mean()), abs=1e-4)
    assert both.total == both.text + both.answers
    targets = Teacher(model, 16).targets({**looks_up, "targets": looks_up["answers"]})
    taught = {**looks_up, **dict(zip(TARGET_KEYS, targets, strict=True))}
    assert 0 < held_out_loss(stage, [taught], "cpu").answers < both.answers


def test_a_run_says_what_became_of_answers(tmp_path):
    texts = [asking(seed) for seed in range(4)]
    said = []
    _, result = run(
        tmp_path,
        train=texts,
        held_out=texts[:2],
        n_targets=8,
        on_step=lambda step, steps, logs: said.append(logs),
    )
    assert result.loss_before == 0
    assert 0 < result.answers_after <= result.answers_before
    assert any("at answers" in logs for logs in said)
    assert log_rows(tmp_path)[-1]["kl"] >= 0
