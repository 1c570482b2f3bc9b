"""`decode` against vLLM's own parser of the format."""

import json
from random import Random
from types import SimpleNamespace

import pytest

from fulmen.messages.encoding import decode
from fulmen.messages.encoding.markup import CALLS_CLOSE, CALLS_OPEN, EOS
from tests.messages.encoding.test_reply import RECOVERED, calls_in, reply, written

REQUEST = SimpleNamespace(tools=None, tool_choice="auto", skip_special_tokens=True)
# vLLM keeps the line end before a mark, drops a value without an end, knows no JSON in place of parameters,
# takes Python's NaN and infinite numbers for JSON, and reads on in results that the model made up.
OTHERWISE = {
    "no end of a parameter",
    "no end of the last parameter",
    "Python's NaN",
    "a number that is too large",
    "lists without end",
    "one object",
    "made up results",
}


class Vocabulary:
    """All that the parser asks of a tokenizer."""

    def get_vocab(self):
        return {CALLS_OPEN: 1, CALLS_CLOSE: 2}


@pytest.fixture(scope="module")
def vllm_reads():
    """A function of a text: its content and its calls."""
    module = pytest.importorskip("vllm.parser.deepseek_v32", reason="needs vLLM, whose parser is the oracle")

    def read(text):
        found = module.DeepSeekV32Parser(Vocabulary()).extract_tool_calls(text, REQUEST)
        calls = [(call.function.name, json.loads(call.function.arguments)) for call in found.tool_calls]
        content = found.content or ""
        return (content.removesuffix("\n\n") if calls else content), calls

    return read


def test_replies_are_read_as_vllm_reads_them(vllm_reads):
    for seed in range(400):
        draw = Random(seed)
        message = reply(draw)
        message["content"] += "."  # vLLM drops a content of blanks
        text = written(message, draw, thinking=False).removesuffix(EOS)
        read = decode(text, thinking=False)
        assert (read["content"], calls_in(read)) == vllm_reads(text)


@pytest.mark.parametrize("name", [name for name in RECOVERED if name not in OTHERWISE])
def test_broken_replies_are_read_as_vllm_reads_them(name, vllm_reads):
    text = f"Let me see.{RECOVERED[name][0]}".removesuffix(EOS)
    read = decode(text, thinking=False)
    assert (read["content"], calls_in(read)) == vllm_reads(text)
