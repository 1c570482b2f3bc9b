"""`fulmen suite`, once `fulmen eval --suite`: what is refused, what is written, what a second run does."""

import json
from pydoc_data.topics import topics

import pytest
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from fulmen.cli.main import app
from fulmen.errors import ConfigError
from fulmen.evaluation.suites import catalog
from fulmen.pipeline.suite_settings import lengths_up_to, parse_lengths


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments):
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    *before, line = result.stderr.splitlines()
    assert all(said.startswith("Loading ") for said in before)
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, text in topics.items():
        if len(text) > 12_000:
            (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def test_lengths():
    assert parse_lengths("1k,2K, 4096") == (1024, 2048, 4096)
    assert parse_lengths("2k,512,2048") == (512, 2048)
    assert parse_lengths("max") == ()
    for text in ("", "1m", "k", "0", "-1k", "1k,,2k", "1.5k"):
        with pytest.raises(ConfigError, match="cannot be read; write tokens as in 1k,2k,4096 or max"):
            parse_lengths(text)
    assert lengths_up_to(8192) == (1024, 2048, 4096, 8192)
    assert lengths_up_to(3000) == (1024, 2048)
    assert lengths_up_to(512) == (512,)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--suite", "rulers"], "suite='rulers' is not known; choose from parity, generate, keyloss"),
        (["--suite", "ruler", "--tasks", "qa,needle"], "task='needle' is not known; choose from niah_single"),
        (["--suite", "ruler", "--samples", "0"], "samples=0 cannot be"),
        (["--suite", "ruler", "--lengths", "long"], "length='long' cannot be read"),
        (["--suite", "ruler", "--url", "http://localhost:1/v1"], "--url and --model go together"),
        (["--url", "http://localhost:1/v1", "--model", "m"], "suite='parity' needs the model's weights"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(options, words, dsa_dir):
    assert words in refused("eval", dsa_dir, *options)


def test_an_endpoint_that_is_not_there(dsa_dir, data):
    line = refused(
        *("eval", dsa_dir, "--suite", "ruler", "--data", data),
        *("--url", "http://127.0.0.1:9/v1", "--model", "m"),
    )
    assert "http://127.0.0.1:9/v1/models cannot be reached (" in line


def test_lengths_beyond_the_context(dsa_dir, data):
    line = refused("eval", dsa_dir, "--suite", "ruler", "--data", data, "--lengths", "1k")
    assert "length=1024 is beyond the model's context of 512 tokens" in line


def test_parity_of_a_dense_model_is_refused(dense_dir):
    assert "has no DSA; convert it first" in refused("eval", dense_dir, "--suite", "parity,ruler")


def test_files_are_written_and_a_second_run_reads_the_samples(dsa_dir, data, tmp_path):
    command = [
        *("eval", dsa_dir, "--suite", "ruler,keyloss,short,generate", "--tasks", "niah_single,qa"),
        *("--lengths", "192,256", "--samples", "1", "--data", data, "--out", tmp_path / "out"),
    ]
    first = call(*command)
    assert first.exit_code == 0, first.output
    names = {"samples.jsonl", "suites.json", "suites.md", "suites.html"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    report = json.loads((tmp_path / "out" / "suites.json").read_text())
    assert list(report["suites"]) == ["ruler", "keyloss", "short", "generate"]
    assert "1 samples of each task and length, seed 0, k = 16" in report["about"]["sizes"]
    samples = (tmp_path / "out" / "samples.jsonl").read_text()
    assert call(*command).exit_code == 0
    assert (tmp_path / "out" / "samples.jsonl").read_text() == samples
    assert json.loads((tmp_path / "out" / "suites.json").read_text())["suites"] == report["suites"]
    assert "topk was 16, is 8" in refused(*command, "--topk", "8")
    renamed = ["suite", dsa_dir, "--suites", *command[3:]]
    assert call(*renamed).exit_code == 0
    assert (tmp_path / "out" / "samples.jsonl").read_text() == samples


def test_suites_beside_the_model_and_all_that_it_can_run(dense_dir, tokenizer, data, tmp_path, monkeypatch):
    """A dense model has no DSA to compare: short is left out."""
    monkeypatch.setattr(catalog, "suite_names", lambda: ["keyloss", "short"])
    model_dir = tmp_path / "model"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=49152, **sizes)).save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    result = call("suite", model_dir, "--lengths", "192", "--samples", "1", "--data", data)
    assert result.exit_code == 0, result.output
    report = json.loads((model_dir / "suites" / "suites.json").read_text())
    assert list(report["suites"]) == ["keyloss"]
    assert "Wrote " in result.stderr


def test_parity_is_no_suite_of_the_command(dsa_dir):
    assert "parity is what evaluate (fulmen eval) measures" in refused("suite", dsa_dir, "--suites", "parity")


def test_a_dense_source_is_named_in_the_report_and_belongs_to_the_results(dsa_dir, tokenizer, data, tmp_path):
    source = tmp_path / "source"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=49152, **sizes)).save_pretrained(source)
    tokenizer.save_pretrained(source)
    command = [
        *("eval", dsa_dir, "--suite", "keyloss", "--lengths", "192", "--samples", "1"),
        *("--data", data, "--out", tmp_path / "out"),
    ]
    asked = call(*command, "--dense", source)
    assert asked.exit_code == 0, asked.output
    report = json.loads((tmp_path / "out" / "suites.json").read_text())
    assert f"dense: {source}" in report["about"]["sizes"]
    assert f"dense was '{source}', is None" in refused(*command)


def test_a_dense_source_of_a_dense_model_is_refused(dense_dir, data):
    line = refused("eval", dense_dir, "--suite", "ruler", "--data", data, "--dense", dense_dir)
    assert "--dense is what a converted model is compared with" in line
