"""What a run says of itself: on a terminal, in a pipe, of every stage, and when it is stopped."""

import os
import pty
import re
import threading
from contextlib import contextmanager
from io import StringIO

import pytest

from fulmen.cli import progress
from fulmen.errors import ConfigError
from fulmen.pipeline.reporter import LineReporter, Pace, TrainingView, in_minutes, reporter_of, roughly
from fulmen.pipeline.settings import EvalSettings
from tests.modeling.gqa.tiny_gqa import make_dense
from tests.modeling.mla.tiny_mla import make_mla
from tests.pipeline.tiny_runs import SIGNALLED_AT, VOCAB, convert, evaluate, run_convert, save_tiny, settings

STAGES = ["Read data", "Load", "Share k", "Inherit", "Warm-up", "Sparse", "Save"]


class Recorder:
    """A reporter that keeps what it is told: per stage the calls of `advance`."""

    def __init__(self):
        self.stages, self.notes, self.at = {}, [], None

    @contextmanager
    def stage(self, name, counted=True):
        self.at = self.stages[name] = []
        yield

    def advance(self, done, total, detail=""):
        self.at.append((done, total, detail))

    def note(self, text):
        self.notes.append(text)


def lines(capsys) -> list[str]:
    """What was said, without the time."""
    return re.sub(r"\d+:\d\d", "M:SS", capsys.readouterr().err).splitlines()


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class TestPace:
    def test_time_left_is_that_of_the_steps_done_here(self):
        """A resumed run begins at step 10; what it waited before that tells nothing of a step."""
        clock = Clock()
        pace = Pace(clock)
        clock.now = 100
        pace.advance(10, 30)
        assert pace.left is None
        clock.now = 104
        pace.advance(12, 30)
        assert pace.left == pytest.approx(36)
        clock.now = 105
        pace.advance(12, 30, "validation 1/4")
        assert pace.left == pytest.approx(35)
        assert pace.words(True) == "12/30, 1:45 elapsed, 0:35 left, validation 1/4"

    def test_another_part_has_its_own_pace(self):
        clock = Clock()
        pace = Pace(clock)
        for second in range(5):
            clock.now = second
            pace.advance(second, 8)
        clock.now = 50
        pace.advance(0, 100, "steps")
        assert pace.left is None
        clock.now = 60
        pace.advance(1, 100)
        assert pace.left == pytest.approx(990)

    def test_no_time_is_better_than_a_wrong_one(self):
        """The third step takes longer than two did."""
        clock = Clock()
        pace = Pace(clock)
        pace.advance(0, 3)
        clock.now = 2
        pace.advance(2, 3)
        assert pace.left == pytest.approx(1)
        clock.now = 9
        assert pace.left is None
        assert pace.words(False) == "67 %, 0:09 elapsed"

    def test_estimates(self):
        assert [roughly(seconds) for seconds in (0.2, 89, 90, 3560, 266_831)] == [
            "1 s",
            "89 s",
            "2 min",
            "59 min",
            "74 h 7 min",
        ]

    def test_clock(self):
        assert [in_minutes(seconds) for seconds in (0, 59.6, 3599, 3961)] == [
            "0:00",
            "1:00",
            "59:59",
            "1:06:01",
        ]


class TestLines:
    def test_a_stage_that_says_nothing_is_not_silent(self, capsys):
        """One long step: lines come from a thread of their own."""
        said = ""
        with LineReporter(every_s=0.01).stage("Load"):
            while said.count("Load: 0:0") < 2:
                said += capsys.readouterr().err
        assert "\x1b" not in said

    def test_the_last_line_is_whole(self, capsys):
        reporter = LineReporter()
        with reporter.stage("Inherit"):
            reporter.advance(0, 3)
            reporter.advance(3, 3, "KL 0.10")
        assert lines(capsys) == ["Inherit: 3/3, M:SS elapsed, KL 0.10"]

    def test_a_run_that_ends_early_by_its_own_choice_is_full_too(self, capsys):
        reporter = LineReporter()
        with reporter.stage("Warm-up"):
            reporter.advance(11, 31)
        assert lines(capsys) == ["Warm-up: 11/11, M:SS elapsed"]

    def test_a_stop_is_said_with_its_place(self, capsys):
        def stopped():
            reporter = LineReporter()
            with reporter.stage("Warm-up"):
                reporter.advance(11, 31)
                raise KeyboardInterrupt

        threads = threading.active_count()
        with pytest.raises(KeyboardInterrupt):
            stopped()
        assert lines(capsys) == ["Warm-up: stopped at 11/31, M:SS elapsed"]
        assert threading.active_count() == threads

    def test_short_work_of_unknown_size_needs_no_line(self, capsys):
        with LineReporter().stage("Save"):
            pass
        assert capsys.readouterr().err == ""

    def test_nothing_goes_to_stdout(self, capsys):
        reporter = progress.reporter()
        reporter.note("a note")
        with reporter.stage("Read"):
            reporter.advance(1, 1)
        said = capsys.readouterr()
        assert (said.out, said.err.splitlines()[0]) == ("", "a note")

    def test_a_file_of_its_own(self, capsys):
        file = StringIO()
        reporter = LineReporter(file)
        reporter.note("a note")
        with reporter.stage("Read"):
            reporter.advance(1, 2, "x")
        assert re.sub(r"\d+:\d\d", "M:SS", file.getvalue()) == "a note\nRead: 1/1, M:SS elapsed, x\n"
        assert capsys.readouterr() == ("", "")

    def test_what_is_said_outside_of_a_stage_is_lost(self, capsys):
        LineReporter().advance(1, 2)
        assert capsys.readouterr().err == ""

    def test_other_processes_are_quiet(self, capsys, monkeypatch):
        monkeypatch.setattr(progress.console, "quiet", True)
        monkeypatch.setenv("RANK", "1")
        for reporter in (progress.reporter(), reporter_of(LineReporter())):
            reporter.note("a note")
            with reporter.stage("Read"):
                reporter.advance(1, 1)
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("given", ["lines", print, object(), LineReporter, 3])
def test_what_is_no_reporter(given):
    with pytest.raises(ConfigError, match=r"^reporter=.* cannot be; give an object with the methods stage"):
        reporter_of(given)


def test_what_comes_before_the_steps_has_a_bar_and_between_them_a_note():
    recorder = Recorder()
    calls = recorder.at = []
    view = TrainingView(recorder)
    view.part(1, 8, "validation")
    view.step(0, 4, {})
    view.step(1, 4, {"kl": 0.25})
    view.part(2, 8, "validation")
    assert calls == [(1, 8, "validation"), (0, 4, ""), (1, 4, "kl 0.2500"), (1, 4, "validation 2/8")]


@pytest.mark.parametrize("name", ["qwen2-mixed", "mla"])
def test_every_stage_is_reported_to_its_end(name, tmp_path, corpus_dir):
    """Two of three layers of the first model are converted: its bars end at 2/2."""
    dense = make_mla("v3", vocab_size=VOCAB) if name == "mla" else make_dense(name)
    source = save_tiny(dense, tmp_path / "dense")
    recorder = Recorder()
    stages = ("inherit", "warmup", "sparse")
    budgets = {"steps": None, "budget_s": 1.0, "sparse_budget_s": 1.0}
    out = convert(settings(source, tmp_path / "out", corpus_dir, stages=stages, **budgets), recorder)
    titles = [title for title in STAGES if title != "Share k" or name != "mla"]
    tried = recorder.stages.pop("Try splits of k", [])
    assert list(recorder.stages) == titles
    assert bool(tried) == (name != "mla")
    assert [call[0] for call in tried] == list(range(len(tried)))
    converted = 3 if name == "mla" else 2
    for title in titles[2:-3]:
        assert [call[:2] for call in recorder.stages[title]] == [(n, converted) for n in range(converted + 1)]
    for title in ("Warm-up", "Sparse"):
        calls = recorder.stages[title]
        parts = [note for _, _, note in calls]
        assert parts[0] == "validation"
        assert "timing a step" in parts
        steps = [(done, total) for done, total, note in calls if note.startswith(("kl", "lm"))]
        assert [done for done, _ in steps] == list(range(1, len(steps) + 1))
        assert any(note.startswith("validation 1/") for note in parts)
    recorder.stages.clear()
    evaluate(EvalSettings(out, data=(str(corpus_dir),), length=64, quick=True), recorder)
    assert list(recorder.stages) == ["Read data", "Load", "Evaluate"]
    first, *_, last = recorder.stages["Evaluate"]
    assert first[0] == 0 < last[0] == last[1] == first[1]


@pytest.mark.skipif(os.name != "posix", reason="opens a terminal as POSIX can")
def test_on_a_terminal_bars_end_full_and_ctrl_c_leaves_it_clean(tmp_path, corpus_dir):
    source = save_tiny(make_dense("qwen2-mixed"), tmp_path / "dense")
    moment = ("SIGINT", "transformers.trainer", "Trainer.training_step", "3")
    ours, theirs = pty.openpty()
    process = run_convert(
        *(source, tmp_path / "out", corpus_dir, "--steps", "6"),
        **{"before": moment, "code": SIGNALLED_AT, "environment": {"TERM": "xterm"}, "stderr": theirs},
    )
    os.close(theirs)
    said = read_all(ours)
    assert process.communicate() == ("", "")
    assert process.returncode == 130
    ends = {title: re.findall(rf"{title} .*? (\d+/\d+), ", said)[-1] for title in STAGES[2:5]}
    assert ends == {"Share k": "2/2", "Inherit": "2/2", "Warm-up": "2/6"}
    assert said.rfind("\x1b[?25h") > said.rfind("\x1b[?25l"), "the cursor is shown again"
    assert re.search(r"interrupted; to go on, run the same command again: .*\s*$", said)


def read_all(terminal: int) -> str:
    said = b""
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:
            piece = b""
        if not piece:
            os.close(terminal)
            return re.sub(r"\x1b\[[\d;]*m", "", said.decode())
        said += piece
