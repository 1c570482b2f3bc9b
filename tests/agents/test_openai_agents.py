"""The filter for openai-agents, in runs of the real package with a scripted model."""

import asyncio
import json
from functools import partial

import agents
import pytest
from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage, ResponseOutputText

from fulmen.agents.openai_agents import input_filter, items_of, messages_of
from fulmen.agents.strategies import OMITTED, SUMMARY_HEAD, discard_all, keep_newest, none, summary
from fulmen.errors import ContextBudgetError, MessageError

CALL = {"type": "function_call", "call_id": "a", "name": "look", "arguments": '{"at": 1}'}
OUTPUT = {"type": "function_call_output", "call_id": "a", "output": "x"}
SAYING = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]}
THINKING = {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "hm"}]}
USER = {"role": "user", "content": "What is it?"}


def count(messages):
    return sum(len(str(message.get("content"))) for message in messages)


def test_items_are_chat_messages():
    items = [USER, THINKING, SAYING, CALL, {**CALL, "call_id": "b"}, OUTPUT, {**OUTPUT, "call_id": "b"}]
    messages = messages_of(items)
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
    assert messages[1] == {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "hm",
        "tool_calls": [call, {**call, "id": "b"}],
        "items": items[1:5],
    }
    assert messages[2] == {"role": "tool", "tool_call_id": "a", "content": "x", "items": [OUTPUT]}
    assert [item for message in messages for item in items_of(message)] == items


def test_an_item_of_a_hosted_tool_is_refused():
    with pytest.raises(MessageError, match="'web_search_call'"):
        messages_of([USER, {"type": "web_search_call", "id": "w"}])


def run_agent(strategy, budget, steps=6):
    """What the model got at each call of a run that looks so many times, 100 letters each."""
    got = []

    class Scripted(agents.Model):
        async def get_response(self, system_instructions, input, *args, **kwargs):
            got.append((system_instructions, input))
            if len(got) <= steps:
                output = ResponseFunctionToolCall(
                    type="function_call",
                    call_id=f"c{len(got)}",
                    name="look",
                    arguments=json.dumps({"at": len(got)}),
                )
            else:
                text = ResponseOutputText(type="output_text", text="42", annotations=[])
                output = ResponseOutputMessage(
                    id="m", type="message", role="assistant", status="completed", content=[text]
                )
            return agents.ModelResponse(output=[output], usage=agents.Usage(), response_id=None)

        def stream_response(self, *args, **kwargs):
            raise NotImplementedError

    @agents.function_tool
    def look(at: int) -> str:
        """Look somewhere."""
        return f"{at} " + "x" * 98

    settings = agents.RunConfig(
        call_model_input_filter=input_filter(strategy, budget, count), tracing_disabled=True
    )
    agent = agents.Agent(name="looker", instructions="Look.", tools=[look], model=Scripted())
    found = asyncio.run(agents.Runner.run(agent, "What is it?", run_config=settings, max_turns=20))
    assert found.final_output == "42"
    assert {instructions for instructions, _ in got} == {"Look."}
    return [items for _, items in got]


def outputs(items):
    return [item["output"] for item in items if item.get("type") == "function_call_output"]


def test_a_run_discards_and_goes_on():
    seen = [len(outputs(items)) for items in run_agent(discard_all, budget=400)]
    # The fourth call would have had 316 letters with 320 allowed; the fifth begins anew.
    assert seen == [0, 1, 2, 3, 0, 1, 2]


def test_a_run_keeps_the_newest():
    last = outputs(run_agent(partial(keep_newest, n=2), budget=700)[-1])
    assert last[:4] == [OMITTED] * 4
    assert [output[:2] for output in last[4:]] == ["5 ", "6 "]


def test_a_run_sums_up():
    items = run_agent(partial(summary, summarise=lambda past: f"{len(past)} messages"), budget=400)[4]
    assert [item["content"] for item in items] == ["What is it?", f"{SUMMARY_HEAD}8 messages"]


def test_a_run_without_a_strategy_ends_at_the_budget():
    with pytest.raises(ContextBudgetError):
        run_agent(none, budget=400)
