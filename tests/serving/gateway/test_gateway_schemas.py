"""Which schemas a request may have, and what its forced calls become before the engine reads them."""

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'fulmen[serve]'")

from pathlib import Path

from transformers import LlamaConfig

from fulmen.serving.engine.served_model import ServedModel
from fulmen.serving.gateway.dialects.anthropic import messages_body
from fulmen.serving.gateway.dialects.deepseek import chat_body
from fulmen.serving.gateway.dialects.requests import ChatRequest, MessagesRequest
from fulmen.serving.gateway.errors import ApiError
from fulmen.serving.gateway.schemas import json_schema
from fulmen.serving.gateway.schemas.forced_calls import NO_PARAMETERS, enforced_schemas

MODEL = ServedModel(Path("m"), "smol", LlamaConfig(num_hidden_layers=2), None, 2048, "", frozenset())
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
PARAMETERS, INPUT = "tools[0].function.parameters", "tools[0].input_schema"
ANSWER = "response_format.json_schema.schema"


def chat(**fields):
    said = {"model": "smol", "messages": [{"role": "user", "content": "Hi"}]}
    return chat_body(ChatRequest.model_validate(said | fields), MODEL, "salt")


def messages(**fields):
    said = {"model": "smol", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
    return messages_body(MessagesRequest.model_validate(said | fields), MODEL, "salt")


def tool(name="weather", **function):
    return {"type": "function", "function": {"name": name, **function}}


def answer(schema):
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


def named(name):
    return {"type": "function", "function": {"name": name}}


def refusal(ask, **fields):
    with pytest.raises(ApiError) as caught:
        ask(**fields)
    assert caught.value.status == 422
    return caught.value.param, caught.value.message


def nested(levels):
    schema = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "limit"),
    [
        (nested(json_schema.MAX_DEPTH), "50 levels"),
        (nested(100_000), "50 levels"),
        ({"enum": [[0] * json_schema.MAX_VALUES]}, "100,000 values"),
        ({"description": "x" * json_schema.MAX_CHARACTERS}, "2,000,000 characters"),
        ({"properties": {f"p{i}": {} for i in range(json_schema.MAX_PROPERTIES + 1)}}, "1,000 properties"),
        ({"properties": {f"p{i}": {} for i in range(40_000)}}, "1,000 properties"),
        ({"enum": list(range(json_schema.MAX_ENUM + 1))}, "1,000 enum values"),
        ({"enum": ["x" * (json_schema.MAX_ENUM_CHARACTERS + 1)]}, "120,000 characters"),
        ({"type": "string", "pattern": "a" * (json_schema.MAX_PATTERN + 1)}, "2,000 characters in a pattern"),
    ],
)
def test_a_schema_beyond_a_limit_is_refused_and_the_limit_named(schema, limit):
    field, why = refusal(chat, response_format=answer(schema))
    assert field == ANSWER
    assert limit in why


def test_schemas_up_to_the_limits_are_taken():
    assert chat(response_format=answer(nested(json_schema.MAX_DEPTH - 1)))
    properties = {f"p{i}": {"type": "integer"} for i in range(json_schema.MAX_PROPERTIES)}
    assert chat(response_format=answer({"type": "object", "properties": properties}))


def test_the_limits_on_size_are_those_of_all_tools_together():
    some = {"enum": [list(range(json_schema.MAX_VALUES // 2))]}
    assert chat(tools=[tool(parameters=some)])
    tools = [tool(parameters=some), tool("b", parameters=some)]
    assert refusal(chat, tools=tools)[0] == "tools[1].function.parameters"
    tools = [{"name": name, "input_schema": some} for name in "ab"]
    assert refusal(messages, tools=tools)[0] == "tools[1].input_schema"


A = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"not": {"type": "string"}}, ".not"),
        ({"if": A, "then": A}, ".if"),
        ({"type": "array", "uniqueItems": True}, ".uniqueItems"),
        ({"type": "array", "contains": A}, ".contains"),
        ({"type": "number", "multipleOf": 0.5}, ".multipleOf"),
        ({**A, "dependentRequired": {"a": ["b"]}}, ".dependentRequired"),
        ({**A, "unevaluatedProperties": A}, ".unevaluatedProperties"),
        ({"allOf": [A, A]}, ".allOf"),
        ({"$ref": "https://example.com/schema"}, ".$ref"),
        ({"$ref": "#anchor"}, ".$ref"),
        ({**A, "anyOf": [A, A]}, ".properties"),
        ({"type": "string", "anyOf": [{"minLength": 3}]}, ".type"),
        ({"$ref": "#/$defs/A", "$defs": {"A": A}, "required": ["a"]}, ".required"),
        ({"type": "string", "pattern": "^a+$", "maxLength": 2}, ".maxLength"),
        ({"type": "string", "pattern": "^(?!x).*$"}, ".pattern"),
        ({**A, "patternProperties": {"^b": {}}}, ".patternProperties"),
        ({**A, "propertyNames": {"pattern": "^a"}}, ".propertyNames"),
        ({"type": "object", "required": ["b"]}, ".required"),
        ({"type": "object", "properties": {"x": {"items": {"not": {}}}}}, ".properties.x.items.not"),
        ({"$defs": {"x": {"anyOf": [A, {"uniqueItems": True}]}}}, ".$defs.x.anyOf[1].uniqueItems"),
    ],
)
def test_what_would_be_passed_over_is_refused_where_it_stands(schema, place):
    field, why = refusal(chat, response_format=answer(schema))
    assert field == ANSWER
    assert why.startswith(f"{ANSWER}{place}")
    assert "enforced" in why or "$defs" in why or "properties lack" in why


def test_a_note_on_the_format_is_taken_out_and_a_known_format_stays():
    link = {"type": "string", "format": "uri", "maxLength": 99}
    properties = {"a": {"format": "password"}, "b": link, "c": {"type": "string", "format": "date"}}
    asked = chat(response_format=answer({"type": "object", "properties": properties}))
    kept = asked["response_format"]["json_schema"]["schema"]["properties"]
    assert kept == {"a": {}, "b": {"type": "string", "maxLength": 99}, "c": properties["c"]}


def test_properties_may_be_called_like_keywords():
    words = {
        name: {"type": "integer"} for name in ("not", "if", "format", "pattern", "$ref", "enum", "allOf")
    }
    assert chat(response_format=answer({"type": "object", "properties": words}))


@pytest.mark.parametrize("choice", ["required", named("weather")])
@pytest.mark.parametrize("strict", [None, False])
def test_a_forced_call_is_held_to_its_schema(choice, strict):
    asked = tool(parameters=CITY) if strict is None else tool(parameters=CITY, strict=strict)
    body = chat(tools=[asked, tool("clock")], tool_choice=choice)
    weather, clock = (tool["function"] for tool in body["tools"])
    assert weather == {"name": "weather", "parameters": CITY, "strict": True}
    forced = [(PARAMETERS, CITY)]
    if choice == "required":
        assert clock == {"name": "clock", "parameters": NO_PARAMETERS, "strict": True}
        forced.append(("tools[1].function.parameters", NO_PARAMETERS))
    else:
        assert clock == {"name": "clock"}
    assert enforced_schemas(body) == forced


@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_a_free_call_is_left_as_it_was_sent(choice):
    wild = {"type": "object", "properties": {"a": {"uniqueItems": True}}}
    body = chat(tools=[tool(parameters=wild)], **({"tool_choice": choice} if choice else {}))
    assert body["tools"] == [tool(parameters=wild)]
    assert enforced_schemas(body) == []


def test_a_strict_tool_is_held_to_its_schema_unless_no_call_is_wanted():
    sound = {**CITY, "additionalProperties": False}
    assert enforced_schemas(chat(tools=[tool(parameters=sound, strict=True)])) == [(PARAMETERS, sound)]
    assert enforced_schemas(chat(tools=[tool(parameters=sound, strict=True)], tool_choice="none")) == []


@pytest.mark.parametrize(
    ("schema", "sent"),
    [
        (None, NO_PARAMETERS),
        ({}, {"type": "object"}),
        ({"properties": {}}, {"type": "object", "properties": {}}),
        ({"type": ["object", "null"]}, {"type": "object"}),
        ({"$ref": "#/$defs/A", "$defs": {"A": A}}, {"$ref": "#/$defs/A", "$defs": {"A": A}}),
        ({"anyOf": [A, A]}, {"anyOf": [A, A]}),
    ],
)
def test_arguments_are_an_object(schema, sent):
    asked = tool() if schema is None else tool(parameters=schema)
    assert chat(tools=[asked], tool_choice="required")["tools"][0]["function"]["parameters"] == sent


def test_a_forced_call_that_cannot_be_is_refused_by_its_field():
    array = {"type": "array"}
    assert refusal(chat, tools=[tool(parameters=array)], tool_choice="required")[0] == PARAMETERS
    unique = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    assert refusal(chat, tools=[tool(parameters=unique)], tool_choice="required")[0] == PARAMETERS
    assert refusal(chat, tools=[tool()], tool_choice=named("clock"))[0] == "tool_choice"
    assert refusal(chat, tool_choice="required")[0] == "tool_choice"
    assert refusal(chat, tools=[tool(parameters={"type": "nothing"})])[0] == PARAMETERS


def test_anthropics_forced_calls_are_held_too():
    tools = [{"name": "weather", "input_schema": CITY}, {"name": "clock", "input_schema": {}}]
    body = messages(tools=tools, tool_choice={"type": "any"})
    assert [tool["strict"] for tool in body["tools"]] == [True, True]
    assert enforced_schemas(body) == [(INPUT, CITY), ("tools[1].input_schema", {"type": "object"})]
    assert enforced_schemas(messages(tools=tools, tool_choice={"type": "tool", "name": "weather"})) == [
        (INPUT, CITY)
    ]
    for free in ({}, {"tool_choice": {"type": "auto"}}, {"tool_choice": {"type": "none"}}):
        assert enforced_schemas(messages(tools=tools, **free)) == []
    unique = [{"name": "weather", "input_schema": {"type": "object", "properties": {"a": {"not": {}}}}}]
    assert refusal(messages, tools=unique, tool_choice={"type": "any"})[0] == INPUT
    assert refusal(messages, tools=tools, tool_choice={"type": "tool", "name": "x"})[0] == "tool_choice"
    assert refusal(messages, tool_choice={"type": "any"})[0] == "tool_choice"


@pytest.mark.parametrize("name", [3, [], {"a": 1}, "x" * 10**6])
def test_an_anthropic_choice_of_any_kind_is_refused_in_a_line(name):
    field, why = refusal(messages, tools=[{"name": "w"}], tool_choice={"type": "tool", "name": name})
    assert field == "tool_choice"
    assert len(why) < 200


def test_anthropics_messages_bring_no_tools_past_the_check():
    wild = {"name": "w", "input_schema": {"not": {}}, "strict": True}
    block = {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": wild}}
    said = [{"role": "system", "content": [block]}, {"role": "user", "content": "Hi"}]
    assert refusal(messages, messages=said)[0] == "messages[0].content"
    assert refusal(messages, tools=[{**wild, "strict": "true"}])[0] == INPUT
