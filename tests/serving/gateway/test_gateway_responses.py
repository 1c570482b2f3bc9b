"""OpenAI's Responses as chats: what becomes of a request, and how a chat's chunks are told as events.

Each event is read by the official client's own types.
"""

import json

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'fulmen[serve]'")
pytest.importorskip("openai", reason="needs the extra serve-cpu: pip install 'fulmen[serve-cpu]'")

from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter, ValidationError

from fulmen.serving.gateway.dialects.base import Event
from fulmen.serving.gateway.dialects.responses import ResponsesRequest, chat_of, in_our_words
from fulmen.serving.gateway.dialects.responses_stream import ResponsesDialect
from fulmen.serving.gateway.errors import ApiError, validation_error

EVENT = TypeAdapter(ResponseStreamEvent)
BILL = {"cost": "1"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}}
TOOL = {"type": "function", "name": "clock", "parameters": SCHEMA, "strict": True}
CALL = {"type": "function_call", "call_id": "c1", "name": "clock", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "noon"}


def request(**fields):
    return ResponsesRequest.model_validate({"model": "smol", "input": "Hi", **fields})


def chat(**fields):
    return chat_of(request(**fields)).model_dump(exclude_none=True, by_alias=True)


def test_text_and_settings_become_a_chat():
    said = {"max_output_tokens": 9, "temperature": 0.5, "top_p": 0.9, "stream": True, "store": True}
    assert chat(instructions="Be brief", reasoning={"effort": "low"}, **said) == {
        "model": "smol",
        "messages": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}],
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "stream": True,
        "reasoning_effort": "low",
    }


def test_items_become_messages_with_calls_thoughts_and_one_system_message():
    items = [
        {"role": "developer", "content": "And polite"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "What "},
                                                        {"type": "input_text", "text": "time?"}]},
        {"type": "reasoning", "id": "r", "summary": [],
         "content": [{"type": "reasoning_text", "text": "Hm"}]},
        {"id": "m", "type": "message", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "Let me see", "annotations": []}]},
        {**CALL, "id": "f", "status": "completed"},
        {**CALL, "call_id": "c2"},
        RESULT,
        {**RESULT, "call_id": "c2"},
        CALL,
    ]  # fmt: skip
    calls = [
        {"id": name, "type": "function", "function": {"name": "clock", "arguments": "{}"}}
        for name in ("c1", "c2", "c1")
    ]
    first = {"role": "assistant", "content": "Let me see", "tool_calls": calls[:2], "reasoning_content": "Hm"}
    assert chat(input=items, instructions="Be brief")["messages"] == [
        {"role": "system", "content": "Be brief\n\nAnd polite"},
        {"role": "user", "content": "What time?"},
        first,
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
        {"role": "tool", "tool_call_id": "c2", "content": "noon"},
        {"role": "assistant", "tool_calls": calls[2:]},
    ]


def test_tools_and_formats_become_those_of_a_chat():
    made = chat(tools=[TOOL], tool_choice={"type": "function", "name": "clock"}, parallel_tool_calls=False)
    function = {"name": "clock", "parameters": SCHEMA, "strict": True}
    assert made["tools"] == [{"type": "function", "function": function}]
    assert made["tool_choice"] == {"type": "function", "function": {"name": "clock"}}
    assert made["parallel_tool_calls"] is False
    text = {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}}
    expected = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
    assert chat(text=text)["response_format"] == expected


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": {"id": "c"}}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "computer_call"}]}, "input[0]"),
        ({"input": [CALL, 3]}, "input[1]"),
        ({"input": [{"type": ["message"]}]}, "input[0]"),
        ({"input": [{"role": "nobody", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.type"),
        ({"truncation": "auto"}, "truncation"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_what_is_not_done_here_is_refused_by_field(fields, field):
    try:
        chat_of(request(**fields))
    except ApiError as error:
        refused = error
    except ValidationError as error:
        found = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
        refused = validation_error(found)
    assert (refused.status in (400, 422), refused.param) == (True, field)
    assert refused.message.startswith(field)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("messages", "input"),
        ("messages[3].content", "input"),
        ("max_tokens", "max_output_tokens"),
        ("response_format.json_schema.schema", "text.format.schema"),
        ("tools[2].function.parameters.properties.a", "tools[2].parameters.properties.a"),
        ("temperature", "temperature"),
    ],
)
def test_errors_name_the_field_that_the_client_sent(theirs, ours):
    error = in_our_words(ApiError(422, f"{theirs} is wrong", theirs))
    assert (error.status, error.param, error.message) == (422, ours, f"{ours} is wrong")


def chunk(delta=None, finish=None, usage=None):
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    return Event(None, json.dumps({"id": "1", "choices": choices, "usage": usage}))


def usage(output, cached=None):
    details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
    return {"prompt_tokens": 9, "completion_tokens": output, **details}


PIECES = [
    {"role": "assistant", "content": ""},
    {"reasoning": "Hm"},
    {"reasoning": "m"},
    {"content": "It is "},
    {"content": "½ past"},
    {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "clock"}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": "true}"}}]},
    {"tool_calls": [{"index": 1, "id": "c2", "function": {"name": "clock", "arguments": "{}"}}]},
]
WHOLE = {
    "role": "assistant",
    "reasoning": "Hmm",
    "content": "It is ½ past",
    "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": '{"a":true}'}},
        {"id": "c2", "type": "function", "function": {"name": "clock", "arguments": "{}"}},
    ],
}


def streamed(finish):
    """The dialect, and the events of an answer with all kinds of pieces."""
    dialect = ResponsesDialect(request(tools=[TOOL], metadata={"a": "b"}), "smol", "id")
    sent = b"".join(dialect.feed(chunk(piece, usage=usage(i))) for i, piece in enumerate(PIECES))
    sent += dialect.feed(chunk({}, finish, usage(9))) + dialect.feed(chunk(usage=usage(9, cached=4)))
    sent += dialect.feed(Event(None, "[DONE]")) + dialect.tail(BILL)
    blocks = [block.split("\n") for block in sent.decode().strip().split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [f"event: {event['type']}" for event in events] == [name for name, _ in blocks]
    return dialect, events


@pytest.mark.parametrize(("finish", "status"), [("tool_calls", "completed"), ("length", "incomplete")])
def test_a_stream_tells_each_item_from_its_beginning_to_its_end(finish, status):
    dialect, events = streamed(finish)
    for number, event in enumerate(events):
        assert EVENT.validate_python(event).type == event["type"]
        assert event["sequence_number"] == number
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = [kind for kind in kinds if kind.endswith(".delta")]
    assert kinds[:2] == ["created", "in_progress"]
    assert kinds.count("output_item.added") == kinds.count("output_item.done") == 4
    texts, calls = (
        ["reasoning_text.delta"] * 2 + ["output_text.delta"] * 2,
        ["function_call_arguments.delta"] * 3,
    )
    assert deltas == texts + calls
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == "It is ½ past"
    assert (kinds[-1], events[-1]["response"]["status"]) == (status, status)
    assert [event["output_index"] for event in events if event["type"].endswith("item.done")] == [0, 1, 2, 3]
    assert dialect.usage.tokens == (4, 5, 9)


def test_the_whole_answer_is_what_the_stream_ends_with():
    _, events = streamed("tool_calls")
    dialect = ResponsesDialect(request(tools=[TOOL], metadata={"a": "b"}), "smol", "id")
    answer = {"choices": [{"message": WHOLE, "finish_reason": "tool_calls"}], "usage": usage(9, cached=4)}
    dialect.read_plain(answer)
    made, ended = dialect.plain(answer, BILL), events[-1]["response"]
    for response in (made, ended):
        assert Response.model_validate(response).output_text == "It is ½ past"
        assert response["usage"]["input_tokens_details"]["cached_tokens"] == 4
        assert (response["usage"]["input_tokens"], response["usage"]["output_tokens"]) == (9, 9)
        assert response["usage"]["fulmen"] == BILL
        assert response["store"] is False
    assert {**made, "created_at": 0} == {**ended, "created_at": 0}


def test_an_answer_that_breaks_off_says_so():
    dialect = ResponsesDialect(request(), "smol", "id")
    dialect.feed(chunk({"content": "It"}))
    said = dialect.broken(ApiError(503, "the engine was lost")).decode()
    events = [json.loads(line.removeprefix("data: ")) for line in said.split("\n") if line.startswith("data")]
    assert [EVENT.validate_python(event).type for event in events] == ["error", "response.failed"]
    assert events[1]["response"]["error"]["message"] == "the engine was lost"
    with pytest.raises(ApiError):
        dialect.feed(Event(None, '{"error": {"message": "EngineCore died", "code": 500}}'))
