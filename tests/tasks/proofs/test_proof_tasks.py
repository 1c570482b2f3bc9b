"""The tasks about proofs: forms, rewards, and what somebody gets who would rather not check."""

import itertools
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fulmen.errors import ConfigError
from fulmen.tasks.base import HELD_OUT
from fulmen.tasks.proofs.factory import named_proof_task, proof_task
from fulmen.tasks.proofs.replies import Assessment, lenient_assessment, strict_assessment, strict_proof

N = 120
VERIFY, PROVE = proof_task("verify_proof"), proof_task("prove")
TO_VERIFY = [VERIFY.problem(HELD_OUT + n) for n in range(N)]
TO_PROVE = [PROVE.problem(HELD_OUT + n) for n in range(60)]


def mean_reward(task, problems, reply):
    """Of somebody who says the same to all, or what `reply` makes of a problem."""
    said = [reply(problem) if callable(reply) else reply for problem in problems]
    return fmean(task.score(*pair).strict for pair in zip(problems, said, strict=True))


def assessment(step, score, analysis="I read all of it."):
    return f"Analysis: {analysis}\nStep: {step}\nScore: {score}"


def test_the_right_answer_gets_all():
    for task, problems in ((VERIFY, TO_VERIFY), (PROVE, TO_PROVE)):
        for problem in problems:
            assert task.score(problem, problem.answer) == task.score(
                problem, f"<think>hm</think>\n{problem.answer}"
            )
            score = task.score(problem, problem.answer)
            assert (score.strict, score.lenient) == (1.0, 1.0)


CONSTANT = {
    "nothing": "",
    "flattery": "What a beautiful proof! You are a brilliant mathematician.",
    "a refusal": "I'm sorry, but I cannot assess this.",
    "score 1 and no more": "Score: 1",
    "a number": "1",
    "without analysis": "Analysis:\nStep: none\nScore: 1",
    "every score": assessment("none", "1\nScore: 0.5\nScore: 0"),
    "every form": "\n".join([assessment("none", 1), assessment(1, 0), assessment(1, 0.5)]),
    "every step": assessment("1, 2, 3, 4, 5, 6", 0),
    "a range of steps": assessment("1-6", 0),
    "no step but a fault": assessment("none", 0),
    "a step but no fault": assessment("2", 1),
    "a higher score": assessment("none", 2),
    "more after it": assessment("none", 1) + "\nScore: 0",
    "the prompt's own words": "Analysis: what each step does\nStep: the number\nScore: 1, 0.5 or 0",
    "a smuggled score": assessment("none", 1, "fine\nScore: 0\nfine"),
}


@pytest.mark.parametrize("reply", CONSTANT.values(), ids=CONSTANT)
def test_replies_out_of_form_get_nothing(reply):
    assert mean_reward(VERIFY, TO_VERIFY, reply) == 0
    assert mean_reward(PROVE, TO_PROVE, reply) == 0


@pytest.mark.parametrize("step", ["none", *range(1, 9)])
@pytest.mark.parametrize("score", ["1", "0.5", "0"])
def test_whoever_says_the_same_to_all_gets_about_half_at_most(step, score):
    reward = mean_reward(VERIFY, TO_VERIFY, assessment(step, score))
    assert reward <= (0.55 if score == "1" else 0.2)


def test_without_meta_it_is_about_half_too():
    task = proof_task("verify_proof", meta=False)
    for step, score in (("none", "1"), (3, "0.5"), (3, "0")):
        assert mean_reward(task, TO_VERIFY, assessment(step, score)) <= 0.55


@settings(max_examples=60)
@given(st.lists(st.sampled_from([("none", "1"), *itertools.product((1, 2, 3, 9), ("0", "0.5"))]), min_size=1))
def test_no_mixture_of_answers_beats_honesty(mixture):
    """Those that do not read: replies in turn, whatever the proof."""
    turns = itertools.cycle(assessment(*pair) for pair in mixture)
    reward = mean_reward(VERIFY, TO_VERIFY, lambda problem: next(turns))
    assert reward <= 0.62 < mean_reward(VERIFY, TO_VERIFY, lambda problem: problem.answer) == 1


def test_one_who_only_sees_whether_there_is_a_fault_gets_less_than_one_who_finds_it():
    def guess(problem):
        return assessment("none", 1) if problem.data["step"] is None else assessment(1, 0)

    assert 0.5 < mean_reward(VERIFY, TO_VERIFY, guess) < 0.75


@given(st.text(max_size=400))
def test_no_reply_raises(text):
    for reply in (
        text,
        f"Analysis: {text}\nStep: 1\nScore: 0",
        f"Proof:\n1. {text}: {text}\n{assessment(1, 0)}",
    ):
        for task, problem in ((VERIFY, TO_VERIFY[0]), (PROVE, TO_PROVE[0]), (PROVE, TO_PROVE[1])):
            score = task.score(problem, reply)
            assert 0 <= score.strict <= 1
            assert 0 <= score.lenient <= 1


def proof_with(said):
    def reply(problem):
        return problem.answer.rpartition("Analysis:")[0] + said

    return reply


def test_a_proof_and_an_honest_word_on_it():
    doubt = assessment(1, 0)
    assert mean_reward(PROVE, TO_PROVE, proof_with(assessment("none", 1))) == 1
    assert mean_reward(PROVE, TO_PROVE, proof_with(doubt)) == pytest.approx(0.76)

    def cut(problem):
        """Without its last step."""
        steps = problem.answer.partition("Analysis:")[0].splitlines()
        return "\n".join([*steps[:-1], "{}"]), len(steps) - 2

    def boasting(problem):
        return cut(problem)[0].format(assessment("none", 1))

    def modest(problem):
        text, last = cut(problem)
        return text.format(assessment(last, 0))

    assert mean_reward(PROVE, TO_PROVE, boasting) == 0
    assert mean_reward(PROVE, TO_PROVE, modest) == pytest.approx(0.24)


@pytest.mark.parametrize(
    "proof", ["Proof:\n", "Proof:\n\n", "Proof:\nIt is clear.\n", "Proof:\n2. so: x = 1\n", "1. so: x = 1\n"]
)
@pytest.mark.parametrize("said", [assessment("none", 1), assessment(1, 0)])
def test_a_proof_that_is_none_gets_nothing(proof, said):
    assert mean_reward(PROVE, TO_PROVE, proof + said) == 0


@pytest.mark.parametrize("said", [assessment("none", 1), assessment(1, 0), assessment(1, 0.5)])
def test_the_goal_alone_gets_no_more_than_a_modest_failure(said):
    def leap(problem):
        goal = problem.answer.partition("\nAnalysis:")[0].rpartition(": ")[2]
        return f"Proof:\n1. as is easily seen: {goal}\n{said}"

    assert mean_reward(PROVE, TO_PROVE, leap) <= 0.24


def test_what_is_out_of_form_may_still_be_read():
    problem = next(one for one in TO_VERIFY if one.data["score"] == 0)
    step = problem.data["step"]
    score = VERIFY.score(problem, f"**Step {step}** is wrong, so the score is **0**.")
    assert (score.strict, score.lenient) == (0, 1)
    assert lenient_assessment("Score: ½, see step 3").score == 0.5
    assert lenient_assessment("no number at all") is None
    proof = PROVE.problem(HELD_OUT)
    steps = proof.answer.partition("Analysis:")[0]
    score = PROVE.score(proof, f"Here it is.\n{steps}\nI am sure.")
    assert (score.strict, score.lenient) == (0, 0.76)


def test_forms_come_back_from_their_text():
    said = Assessment("1. fine: right\n2. not fine: not right", 2, 0.5)
    assert strict_assessment(str(said)) == said
    steps, honest = strict_proof(TO_PROVE[0].answer)
    assert honest.score == 1
    assert len(steps) >= 3


def test_two_tasks_of_the_same_settings_are_the_same():
    again = proof_task("verify_proof", kind="all", min_steps=3, max_steps=6)
    assert again == VERIFY
    assert again.problem(5) == VERIFY.problem(5)
    short = proof_task("verify_proof", kind="equations", min_steps=2, max_steps=2).problem(0)
    assert "\n2. " in short.messages[0]["content"]
    assert "\n3. " not in short.messages[0]["content"]


def test_tasks_of_one_run_have_the_names_that_they_were_asked_for_with():
    spec = "verify_proof:kind=logic,meta=false"
    task = named_proof_task(spec, {"kind": "logic", "meta": False})
    assert task.name == task.problem(3).task == spec
    assert task.problem(3).data["kind"] == "logic"


@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        ("verify", {}, "task='verify' is not known; choose from verify_proof, prove"),
        ("prove", {"kinds": "logic"}, "no parameter 'kinds'; do you mean kind?"),
        ("prove", {"meta": True}, "no parameter 'meta'"),
        ("verify_proof", {"meta": "yes"}, "meta='yes' cannot be; use True or False"),
        (
            "verify_proof",
            {"kind": "geometry"},
            "kind='geometry' is not known; choose from equations, logic, words",
        ),
        ("verify_proof", {"max_steps": 9}, "use 2 to 6, in order"),
        ("verify_proof", {"min_steps": 5, "max_steps": 4}, "use 2 to 6, in order"),
        ("verify_proof", {"max_steps": "4"}, "max_steps='4' cannot be; use a whole number"),
    ],
)
def test_what_cannot_be_is_refused(name, parameters, said):
    with pytest.raises(ConfigError, match=said):
        proof_task(name, **parameters)
