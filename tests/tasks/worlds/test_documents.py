"""Questions about several documents: the answer is in them, and replies are scored by it."""

import pytest

from fulmen.errors import ConfigError
from fulmen.tasks.base import HELD_OUT, Score
from fulmen.tasks.worlds.documents import READ_LEVELS, RealDocuments, RegisterDocuments

LONG = "This is the line that only the document number {} has, and no other one has it."
TEXTS = [
    (f"d{n}.md", f"# Title\n\nshared words of all the documents here, a long line\n{LONG.format(n)}\n")
    for n in range(6)
]


@pytest.mark.parametrize("level", READ_LEVELS)
def test_a_register_in_words_has_what_is_asked_for(level):
    task = RegisterDocuments(level)
    problem = task.problem(HELD_OUT)
    assert problem == task.problem(HELD_OUT) != task.problem(HELD_OUT + 1)
    assert problem.task == task.name
    text = problem.messages[1]["content"]
    if level != 4:  # a count stands nowhere
        assert problem.answer in text
    assert dict(task.documents(HELD_OUT)).keys() == {
        line[1:-1] for line in text.split("\n") if line[:1] == "["
    }
    assert task.score(problem, f" {problem.answer}. ") == Score(1.0, 1.0)
    assert task.score(problem, f"I say {problem.answer}!") == Score(0.0, 1.0)
    assert task.score(problem, "") == task.score(problem, problem.answer * 2) == Score(0.0, 0.0)


def test_real_documents_are_told_apart_by_lines_of_their_own():
    task = RealDocuments(TEXTS, at_once=3)
    for index in range(20):
        problem = task.problem(index)
        text = problem.messages[1]["content"]
        line = text.rsplit("\n", 1)[1]
        assert line == LONG.format(problem.answer[1])
        assert text.count("# Title") == 3
        assert text.index(f"[{problem.answer}]") < text.index("Question:")
        assert task.score(problem, f"[{problem.answer}]").strict == 1
    assert len({task.problem(index).answer for index in range(20)}) > 1


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(ConfigError, match="at_once=9"):
        RealDocuments(TEXTS, at_once=9)
    with pytest.raises(ConfigError, match="level=7"):
        RegisterDocuments(7)
