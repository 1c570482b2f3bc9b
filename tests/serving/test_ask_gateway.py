"""Questions about documents at the whole server: what its cache saves, what it forces, what it charges."""

from importlib.util import find_spec

import pytest

if not find_spec("vllm"):
    pytest.skip("vLLM is not installed: pip install 'fulmen[serve-cpu]'", allow_module_level=True)

from fulmen.endpoints import RequestRefused
from fulmen.pipeline.ask_endpoint import ChatEndpoint
from fulmen.pipeline.ask_prompt import (
    answer_tools,
    documents_text,
    search_tools,
    tool_messages,
    whole_messages,
)
from fulmen.pipeline.reporter import SilentReporter
from tests.serving.served import ALICE, CONTEXT

LINES = "".join(f"Sail {number} is red and belongs to the harbour.\n" for number in range(400))
TOOLS = {"list", "search", "open", "grep", "answer"}


@pytest.fixture
def endpoint(server):
    return ChatEndpoint(server.url, ALICE, None, SilentReporter())


def test_the_second_question_finds_the_documents_in_the_cache(server, endpoint):
    assert (endpoint.model, endpoint.context) == ("tiny", CONTEXT)
    documents, balance = documents_text([("sails.md", LINES)]), server.ledger.balance("alice")
    for question in ("Which sails are red?", "Whose is sail 7?"):
        hit_before = endpoint.bill.hit
        endpoint.complete(whole_messages(documents, question), 4, answer_tools())
    assert endpoint.bill.prompts[-1] > 4000
    assert endpoint.bill.hit - hit_before > 0.95 * endpoint.bill.prompts[-1]
    assert endpoint.bill.cost == balance - server.ledger.balance("alice") > 0
    assert endpoint.bill.dense_cost > endpoint.bill.cost


def test_each_message_of_a_search_is_a_call_of_a_tool(endpoint):
    for choice in ("required", "answer"):
        reply = endpoint.complete(tool_messages("Who?", "1 document."), 48, search_tools(choice))
        assert {call.name for call in reply.calls} <= (TOOLS if choice == "required" else {"answer"})
        assert reply.calls or reply.is_cut


def test_documents_beyond_the_context_are_refused_as_too_long(endpoint):
    with pytest.raises(RequestRefused) as caught:
        endpoint.complete(whole_messages(documents_text([("sails.md", LINES * 5)]), "Who?"), 4)
    assert caught.value.is_too_long
