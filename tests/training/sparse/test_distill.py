"""The chunked losses against plain autograd on whole logits; what the truncated teacher promises."""

import pytest
import torch
import torch.nn.functional as F

from fulmen.training.sparse import distill
from fulmen.training.sparse.distill import (
    TeacherTargets,
    next_token_losses,
    no_targets,
    teacher_targets,
    with_right_answers,
)

VOCAB, WIDTH, ROWS = 50, 16, 37


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden, taught = (torch.randn(ROWS, WIDTH, generator=generator, dtype=dtype) for _ in range(2))
    weight = torch.randn(VOCAB, WIDTH, generator=generator, dtype=dtype)
    labels = torch.randint(VOCAB, (ROWS,), generator=generator)
    share = torch.rand(ROWS, generator=generator, dtype=dtype)
    return hidden.requires_grad_(), taught, weight.requires_grad_(), labels, share


def plain_losses(hidden, taught, weight, labels, top_n):
    """Whole logits; the rest is merged into one more class."""
    logq, logp = (x.log_softmax(-1) for x in (hidden @ weight.T, taught @ weight.detach().T))
    ids = logp.topk(top_n, -1).indices
    in_top = torch.zeros_like(logp, dtype=torch.bool).scatter_(-1, ids, True)

    def merged(log):
        rest = log.masked_fill(in_top, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat((log.gather(-1, ids), rest), -1)

    p = merged(logp).exp()
    kl = (torch.xlogy(p, p) - p * merged(logq).clamp_min(-1e30)).sum(-1)
    return F.cross_entropy(hidden @ weight.T, labels, reduction="none"), kl


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("top_n", [1, 7, VOCAB])
def test_losses_and_gradients_are_those_of_whole_logits(alpha, top_n, monkeypatch):
    monkeypatch.setattr(distill, "LOGITS_ROWS", 8)
    hidden, taught, weight, labels, share = inputs()
    targets = teacher_targets(taught, weight, top_n)
    got = next_token_losses(hidden, weight, labels, share, targets, alpha)
    grads = torch.autograd.grad(3 * got.loss, (hidden, weight))
    lm, kl = plain_losses(hidden, taught, weight, labels, top_n)
    expected = (share * (alpha * kl + (1 - alpha) * lm)).sum()
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(got.lm.double(), (share * lm).sum(), **close)
    torch.testing.assert_close(got.kl.double(), (share * kl).sum(), **close)
    torch.testing.assert_close(got.loss.double(), expected, **close)
    for ours, theirs in zip(grads, torch.autograd.grad(3 * expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, theirs, **close)


def test_truncation_never_exceeds_the_whole_kl_and_is_zero_at_the_teacher():
    hidden, taught, weight, labels, share = inputs(torch.float32)
    whole = float(
        next_token_losses(hidden, weight, labels, share, teacher_targets(taught, weight, VOCAB), 1).kl
    )
    cut = [
        float(next_token_losses(hidden, weight, labels, share, teacher_targets(taught, weight, n), 1).kl)
        for n in (1, 4, 16)
    ]
    assert cut == sorted(cut)
    assert cut[-1] <= whole + 1e-5
    own = teacher_targets(hidden.detach(), weight.detach(), 4)
    got = next_token_losses(hidden, weight, labels, share, own, 1.0)
    assert abs(float(got.kl)) < 1e-5
    assert float(torch.autograd.grad(got.loss, hidden)[0].abs().max()) < 1e-5


def test_no_teacher_is_cross_entropy():
    hidden, _, weight, labels, share = inputs(torch.float32)
    got = next_token_losses(hidden, weight, labels, share, no_targets(ROWS, hidden.device), 0.0)
    expected = (share * F.cross_entropy(hidden @ weight.T, labels, reduction="none")).sum()
    torch.testing.assert_close(got.loss, expected)
    torch.testing.assert_close(got.kl, torch.zeros(()), atol=1e-5, rtol=0)


def test_a_confident_student_gives_no_nan():
    """Float32 has no mass left outside the student's one token; the teacher has."""
    weight = torch.eye(8)
    hidden = (200 * torch.eye(8))[:1].requires_grad_()
    targets = teacher_targets(torch.zeros(1, 8), weight, 2)
    got = next_token_losses(hidden, weight, torch.tensor([1]), torch.ones(1), targets, 0.9)
    assert torch.isfinite(got.loss)
    assert torch.isfinite(torch.autograd.grad(got.loss, hidden)[0]).all()


def test_frozen_weights_and_autocast():
    hidden, taught, weight, labels, share = inputs(torch.float32)
    targets = teacher_targets(taught, weight, 8)
    weight.requires_grad_(False)
    exact = next_token_losses(hidden, weight, labels, share, targets, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        rough = next_token_losses(hidden, weight, labels, share, targets, 0.5)
    torch.testing.assert_close(rough.loss, exact.loss, rtol=2e-2, atol=1e-2)
    grads = [torch.autograd.grad(one.loss, hidden)[0] for one in (exact, rough)]
    torch.testing.assert_close(*grads, rtol=0.1, atol=0.02)


def test_right_answers_change_places_with_a_teachers_wrong_ones():
    """Only at answers, only the two of them; whatever the teacher's n likeliest do not hold comes in last."""
    ids = torch.tensor([[3, 5, 7], [3, 5, 7], [3, 5, 7], [3, 5, 7], [3, 5, 7]], dtype=torch.int32)
    logp = torch.tensor([0.5, 0.3, 0.1]).log().expand(5, 3)
    said = TeacherTargets(ids, logp, torch.full((5,), 0.1).log())
    labels = torch.tensor([3, 7, 9, 7, -100])
    answers = torch.tensor([True, True, True, False, False])
    right = with_right_answers(said, labels, answers)
    assert right.ids_TN.tolist() == [[3, 5, 7], [7, 5, 3], [9, 5, 3], [3, 5, 7], [3, 5, 7]]
    assert right.ids_TN.dtype == torch.int32
    torch.testing.assert_close(right.logp_TN, logp)
    torch.testing.assert_close(right.rest_T, said.rest_T)
    assert ids[1].tolist() == [3, 5, 7]


def test_one_likeliest_token_that_is_wrong_is_replaced():
    said = TeacherTargets(torch.tensor([[3]]), torch.zeros(1, 1), torch.full((1,), -torch.inf))
    assert with_right_answers(said, torch.tensor([8]), torch.tensor([True])).ids_TN.tolist() == [[8]]
