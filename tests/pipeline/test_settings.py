"""Options: what is read from them, and what is refused in which words."""

from pathlib import Path

import pytest

from fulmen.errors import ConfigError
from fulmen.pipeline.arguments import parse_duration
from fulmen.pipeline.report_files import ParityFiles
from fulmen.pipeline.settings import ConvertSettings, EvalSettings, parse_stages

OUT = Path("out")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("8m", 480),
        ("1h30m", 5400),
        ("1.5h", 5400),
        (" 2H ", 7200),
        ("1h2m3s", 3723),
        ("0.5s", 0.5),
    ],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "8", "m", "8 minutes", "-3m", "0s", "30m1h", "1d", "1e3s", "nan", "inf"]
)
def test_what_is_no_duration(text):
    with pytest.raises(
        ConfigError, match="cannot be read; write hours, minutes, seconds as in 90s, 8m, 1h30m"
    ):
        parse_duration(text)


def test_stages():
    assert parse_stages("inherit,warmup") == ("inherit", "warmup")
    assert parse_stages(" inherit ") == ("inherit",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("inherit,train", "stage='train' is not known; choose from inherit, warmup"),
        ("", "stage='' is not known"),
        ("inherit,", "stage='' is not known"),
        ("warmup,inherit", "order"),
        ("inherit,inherit", "repeated"),
        ("warmup", "each needs the ones before it"),
    ],
)
def test_stages_that_cannot_be(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_stages(text)


def test_training_has_a_budget_unless_it_has_steps():
    assert ConvertSettings("m", OUT).budget_s == 480
    assert ConvertSettings("m", OUT, steps=5).budget_s is None
    assert ConvertSettings("m", OUT, stages=("inherit",)).budget_s is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget_s": 60, "steps": 5}, "budget and steps exclude each other"),
        ({"stages": ("inherit",), "steps": 5}, "trains nothing"),
        ({"topk": 0}, "topk=0 cannot be"),
        ({"steps": -1}, "steps=-1 cannot be"),
        ({"index_heads": 0}, "index_heads=0"),
        ({"length": 0}, "length=0"),
        ({"dtype": "int8"}, "dtype='int8' is not known; choose from auto, float32"),
        ({"data": (Path("no/such/text"),)}, "data='no/such/text' does not exist"),
    ],
)
def test_conversions_that_cannot_be(settings, words):
    with pytest.raises(ConfigError, match=words):
        ConvertSettings("m", OUT, **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sequences": 0}, "sequences=0 cannot be"),
        ({"length": -5}, "length=-5 cannot be"),
        ({"topk": 0}, "topk=0 cannot be"),
        ({"data": (Path("no/such/text"),)}, "does not exist"),
    ],
)
def test_evaluations_that_cannot_be(settings, words):
    with pytest.raises(ConfigError, match=words):
        EvalSettings(OUT, **settings)


def test_a_report_that_has_no_place():
    with pytest.raises(ConfigError, match=r"no/such/report\.html cannot be written: no/such is no directory"):
        ParityFiles(OUT, html=Path("no/such/report.html"))


def test_a_hub_data_set_needs_no_file():
    assert ConvertSettings("model", Path("out"), data=("hf:some/corpus",)).data == ("hf:some/corpus",)
    with pytest.raises(ConfigError, match="no-such-file"):
        ConvertSettings("model", Path("out"), data=("no-such-file",))
