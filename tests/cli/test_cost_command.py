"""`fulmen cost`: its files, its words, and what it refuses."""

import csv
import json

import pytest
from typer.testing import CliRunner

from fulmen.cli import cost
from fulmen.cli.main import app
from fulmen.errors import ConfigError
from fulmen.evaluation.price import speed
from fulmen.modeling.cost import prefill_cost
from fulmen.modeling.families import dsa_of
from fulmen.pipeline.cost_settings import CostSettings
from tests.cli.said import lines_that_stay

H100 = ("--flops", "989e12", "--bandwidth", "3.35e12")
FILES = ["cost.csv", "cost.json", "cost.png"]


def call(*arguments):
    return CliRunner().invoke(app, ["cost", *map(str, arguments)], env={"COLUMNS": "200"})


def refused(*arguments):
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = lines_that_stay(result.stderr)
    return line


def test_a_converted_model(dsa_dir, tmp_path):
    out = tmp_path / "new" / "cost"
    result = call(dsa_dir, *H100, "--length", 8192, "--batch", 4, "--hit-rate", 0.5, "--out", out)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == FILES
    report = json.loads((out / "cost.json").read_text())
    assert report["terms"] == {"per_hour": 2.0, "hit_rate": 0.5, "batch": 4}
    assert report["machine"] == {"flops": 989e12, "bandwidth": 3.35e12}
    assert report["measured"] is None
    assert (report["dsa"]["topk"], report["dtype"]) == (16, "float32")
    last = report["rows"][-1]
    assert last["position"] == 8192
    with (out / "cost.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["position"]) for row in rows] == [row["position"] for row in report["rows"]]
    assert float(rows[-1]["decode_dsa"]) == last["decode"]["dsa"]
    assert (out / "cost.png").read_bytes().startswith(b"\x89PNG")
    assert "8,192" in result.stdout
    assert f"decode: DSA is cheaper from position {report['crossovers']['decode']} on" in result.stdout
    assert "50 % of the prompts' tokens cached; k = 16" in result.stdout


def test_prices_are_those_of_the_config(dsa_dir, tmp_path):
    """Computing bounds here: seconds are FLOPs, at $3600 an hour and half of them paid."""
    from transformers import AutoConfig

    speed_and_price = ("--flops", 1e9, "--bandwidth", 1e18, "--price", 3600, "--hit-rate", 0.5)
    assert call(dsa_dir, *speed_and_price, "--length", 4000, "--out", tmp_path).exit_code == 0
    last = json.loads((tmp_path / "cost.json").read_text())["rows"][-1]
    config = AutoConfig.from_pretrained(dsa_dir)
    cost = prefill_cost(config, dsa_of(config), 4000)
    assert last["prefill"]["dense"] == pytest.approx(0.5 * cost.dense_flops * 1e-3)
    assert last["prefill"]["dsa"] == pytest.approx(0.5 * cost.dsa_flops * 1e-3)


def test_a_dense_model_without_weights_in_the_working_directory(dense_dir, tmp_path, monkeypatch):
    model = tmp_path / "my model"
    model.mkdir()
    (model / "config.json").write_text((dense_dir / "config.json").read_text())
    monkeypatch.chdir(tmp_path)
    result = call(model, *H100, "--length", 100)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "cost-my-model").iterdir()) == FILES
    # Up to k = 256 DSA only adds index keys.
    for kind in ("prefill", "decode"):
        assert f"{kind}: DSA is never cheaper within 100 tokens" in result.stdout


def test_cheaper_at_every_position_is_said():
    assert cost._crossover_in_words(1, 100) == "DSA is cheaper at every position up to 100"


def test_measured(dsa_dir, tmp_path, monkeypatch):
    """Real times of real operations, at short positions."""
    monkeypatch.setattr(speed, "SHORTEST_POSITION", 160)
    monkeypatch.setattr(speed, "MOST_ROUNDS", speed.FEWEST_ROUNDS)
    monkeypatch.setattr(speed, "WEIGHT_BYTES", 2**16)
    result = call(dsa_dir, "--measure", "--length", 4096, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    measured = json.loads((tmp_path / "cost.json").read_text())["measured"]
    assert {sample["position"] for sample in measured["samples"]} >= {160, 320, 640, 1280}
    assert max(measured["errors"].values()) <= 1e-4
    assert set(measured["lines"]["decode"]) == {"dense", "select", "sparse"}
    assert "measured on this machine's CPU" in result.stdout
    assert "measured up to 1,280 tokens" in result.stdout


def test_measuring_begins_with_a_place_to_write_to(dsa_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "measure_speed", lambda *arguments, **options: pytest.fail("measured already"))
    (tmp_path / "file").write_text("")
    line = refused(dsa_dir, "--measure", "--out", tmp_path / "file" / "below")
    assert "file/below cannot be written" in line
    assert "length=512 has too few positions" in refused(dsa_dir, "--measure", "--length", 512)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--flops and --bandwidth go together"),
        (["--flops", "1e12"], "--flops and --bandwidth go together"),
        (["--measure", "--flops", "1e12"], "leave --flops and --bandwidth out"),
        (["--flops", "0", "--bandwidth", "1"], "flops=0.0 cannot be; use a number above 0"),
        (["--flops", "1", "--bandwidth", "nan"], "bandwidth=nan cannot be"),
        ([*H100, "--price", "-2"], "price=-2.0 cannot be; use a number above 0"),
        ([*H100, "--price", "inf"], "price=inf cannot be"),
        ([*H100, "--hit-rate", "1.5"], "--hit-rate=1.5 cannot be; use a share from 0 to 1"),
        ([*H100, "--hit-rate", "-0.1"], "--hit-rate=-0.1 cannot be"),
        ([*H100, "--hit-rate", "nan"], "--hit-rate=nan cannot be"),
        ([*H100, "--batch", "0"], "batch=0 cannot be"),
        ([*H100, "--length", "0"], "length=0 cannot be"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_looked_for(options, words, tmp_path):
    assert words in refused(tmp_path / "no-such-model", *options)


def test_a_file_for_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        CostSettings("m", flops=1.0, bandwidth=1.0, out=tmp_path / "file")


def test_a_model_that_is_none(tmp_path):
    assert "does not exist" in refused(tmp_path / "no-such-model", *H100)
