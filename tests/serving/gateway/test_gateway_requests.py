"""What a request becomes before the engine reads it, and which requests are refused with which field."""

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'fulmen[serve]'")

from pathlib import Path

from pydantic import ValidationError
from transformers import LlamaConfig

from fulmen.config import DsaConfig
from fulmen.serving.engine.served_model import FillInTheMiddle, ServedModel
from fulmen.serving.gateway.dialects.deepseek import chat_body, completion_body
from fulmen.serving.gateway.dialects.requests import ChatRequest, CompletionRequest
from fulmen.serving.gateway.errors import ApiError, engine_error, validation_error

FIM = frozenset({"<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"})
USER = {"role": "user", "content": "Hello"}
CALL = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}


def model(tokens=frozenset(), kind="llama", template="{{ messages }}"):
    config = LlamaConfig(num_hidden_layers=2)
    config.model_type = kind
    dsa = DsaConfig(16, 4, 2, 4, (0, 1))
    return ServedModel(Path("m"), "smol", config, dsa, 2048, template, frozenset(tokens))


def chat(served=None, **fields):
    request = ChatRequest.model_validate({"model": "smol", "messages": [USER], **fields})
    return chat_body(request, served or model(), "salt")


def refused(**fields):
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    return caught.value.status, caught.value.param


def invalid(kind, **fields):
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(fields)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()]
    return validation_error(errors)


def test_the_engine_gets_salt_own_name_and_continuous_usage_and_no_unknown_field():
    body = chat(
        stream=True, stream_options={"include_usage": False}, cache_salt="mine", priority=-9, user="u"
    )
    assert body == {
        "model": "smol",
        "messages": [USER],
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "cache_salt": "salt",
    }


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, None),
        ({"thinking": {"type": "enabled"}}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"model": "deepseek-chat"}, False),
        ({"model": "deepseek-reasoner"}, True),
        ({"model": "deepseek-chat", "thinking": {"type": "enabled"}}, True),
    ],
)
def test_thinking_reaches_the_template_under_both_of_its_names(fields, wanted):
    asked = chat(**fields).get("chat_template_kwargs")
    assert asked == (None if wanted is None else {"thinking": wanted, "enable_thinking": wanted})


def test_a_prefix_is_continued_and_its_mark_is_not_passed_on():
    body = chat(messages=[USER, {"role": "assistant", "content": "Well", "prefix": True}])
    assert body["messages"][-1] == {"role": "assistant", "content": "Well"}
    assert body["continue_final_message"] is True
    assert body["add_generation_prompt"] is False
    assert "continue_final_message" not in chat(messages=[USER, {"role": "assistant", "content": "Well"}])


@pytest.mark.parametrize("place", [0, 1])
def test_a_prefix_elsewhere_is_refused(place):
    messages = [USER, {"role": "assistant", "content": "a"}, USER]
    messages[place] = {**messages[place], "prefix": True}
    assert refused(messages=messages) == (400, f"messages[{place}].prefix")


def test_thoughts_behind_a_tool_call_must_come_back_within_the_turn():
    turn = [
        USER,
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "9", "tool_call_id": "1"},
    ]
    thinking = {"thinking": {"type": "enabled"}}
    assert refused(messages=turn, **thinking) == (400, "messages[1].reasoning_content")
    turn[1] = {**turn[1], "reasoning_content": "hm"}
    assert chat(messages=turn, **thinking)["messages"][1]["reasoning_content"] == "hm"
    del turn[1]["reasoning_content"]
    assert chat(messages=[*turn, USER], **thinking), "an earlier turn's thoughts may be left out"
    assert chat(messages=turn), "and those of a model that is not asked to think"


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"type": "nothing"}, "tools[0].function.parameters"),
        ({"type": "object", "properties": {"a": {}}}, "tools[0].function.parameters"),
        (
            {
                "type": "object",
                "properties": {"a": {"type": "object", "properties": {"b": {}}}},
                "required": ["a"],
                "additionalProperties": False,
            },
            "tools[0].function.parameters.properties.a",
        ),
    ],
)
def test_a_strict_tool_must_have_a_strict_schema(parameters, field):
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": parameters}}
    assert refused(tools=[tool]) == (422, field)


def test_a_sound_strict_tool_is_passed_on():
    schema = {"type": "object", "properties": {"a": {}}, "required": ["a"], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": schema}}
    assert chat(tools=[tool])["tools"] == [tool]


def test_a_bad_schema_of_an_answer_is_refused():
    answer = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"required": 3}}}
    assert refused(response_format=answer) == (422, "response_format.json_schema.schema")
    assert refused(response_format={"type": "json_schema"}) == (422, "response_format.json_schema")


def test_unknown_models_are_refused_by_name():
    assert refused(model="gpt") == (400, "model")


def test_a_suffix_is_written_with_the_tokenizers_tokens():
    request = CompletionRequest(model="smol", prompt="def f(", suffix="return 1")
    text = completion_body(request, model(FIM), "salt")["prompt"]
    assert text == "<|fim_prefix|>def f(<|fim_suffix|>return 1<|fim_middle|>"
    assert model(FIM).fim == FillInTheMiddle("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    with pytest.raises(ApiError, match="no tokens to fill in the middle") as caught:
        completion_body(request, model(), "salt")
    assert (caught.value.status, caught.value.param) == (400, "suffix")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"-1": 5}}, "logit_bias.-1"),
        ({"logit_bias": {"1e3": 5}}, "logit_bias.1e3"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"stream_options": {"include_usage": 3}}, "stream_options.include_usage"),
    ],
)
def test_wrong_types_and_values_are_named(fields, field):
    error = invalid(ChatRequest, **{"model": "smol", "messages": [USER], **fields})
    assert (error.status, error.param) == (422, field)
    assert error.message.startswith(field)


def test_a_missing_field_is_named():
    error = invalid(ChatRequest, model="smol")
    assert (error.status, error.param, error.message) == (422, "messages", "messages is missing")


STOP = "{'type': 'too_long', 'loc': 'body.stop', 'msg': 'List should be short', 'input': '<list>'}"
ROLE = """{'type': 'x', 'loc': 'body.messages.0.role', 'msg': "Input should be 'user'", 'input': 'x'}"""


@pytest.mark.parametrize(
    ("status", "said", "fields", "expected"),
    [
        (404, {"message": "no model", "param": "model"}, (), (400, "model")),
        (400, {"message": "too long", "param": "input_tokens"}, ("messages",), (400, "messages")),
        (400, {"message": "too long", "param": "input_tokens"}, ("prompt",), (400, "prompt")),
        (400, {"message": "bad", "param": "body.top_p"}, (), (400, "top_p")),
        (400, {"message": ROLE}, (), (400, "messages[0].role")),
        (400, {"message": f"2 validation errors: {STOP} {ROLE}"}, (), (400, "messages[0].role")),
        (400, {"message": "Invalid grammar"}, ("tools",), (400, "tools")),
        (400, {"message": "Invalid grammar"}, ("response_format",), (400, "response_format")),
        (503, {"message": "full"}, (), (503, None)),
        (500, {"message": "/home/x.py"}, (), (500, None)),
    ],
)
def test_the_engines_refusals_get_our_codes_and_fields(status, said, fields, expected):
    error = engine_error(status, {"error": said}, fields)
    assert (error.status, error.param) == expected
    assert "/home" not in error.message
