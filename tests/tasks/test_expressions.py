"""What scorers that evaluate may be given."""

import pytest

from fulmen.tasks import named
from fulmen.tasks.expressions import is_harmless

HARMLESS = (
    *("1 2 3\n4 5 6", "3*x**2 + 2*x", "(x**2 + 1)**3", "sin(x)*exp(-x) + C", "[[0, 1], [-1, 2]]"),
    *('["A", "B"]', "x**(1/2)", "Q _ _\n_ Q _", "DACEB", ""),
)
HARMFUL = (
    *("__import__('os').system('id')", "open('x','w')", "exec(chr(105))", "9**9**9", "9**999999999"),
    *(
        "((9**99)**99)**99",
        "[0]*10**10",
        "'a'*9999999999",
        "(lambda: 0)()",
        "[x for x in [1]]",
        "1 << 99999999",
    ),
    *("x.y", "().__class__", "print(1)!", "breakpoint()", "(" * 500),
)


@pytest.mark.parametrize("text", HARMLESS)
def test_arithmetic_lists_and_plain_text_are_harmless(text):
    assert is_harmless(text)


@pytest.mark.parametrize("text", HARMFUL)
def test_calls_towers_and_repeats_are_not(text):
    assert not is_harmless(text)


@pytest.mark.parametrize(
    "name", ["binary_matrix", "countdown", "simple_integration", "n_queens", "string_insertion"]
)
def test_replies_are_not_run(name, tmp_path):
    task = named(name)
    problem, trace = task.problem(0), tmp_path / "trace"
    reply = f"open({str(trace)!r}, 'w')"
    assert task.score(problem, f"<answer>{reply}</answer>").strict < 1
    assert not trace.exists()
    assert task.score(problem, problem.answer).strict == 1
