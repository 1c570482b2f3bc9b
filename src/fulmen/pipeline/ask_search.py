"""A model that looks for an answer with tools: its calls are run, their results go back, until it answers.

Messages are only ever added at the end, so that each step finds the ones before it in the prefix cache.
"""

import json
from collections.abc import Callable
from typing import Any

from fulmen.agents.documents.tools import DocumentTools
from fulmen.endpoints import RequestRefused, read_json
from fulmen.errors import DocumentError, EndpointError
from fulmen.pipeline.ask_answer import AskStep, printable
from fulmen.pipeline.ask_endpoint import Call, ChatEndpoint, Reply
from fulmen.pipeline.ask_prompt import (
    ANSWER,
    NO_CALL,
    Written,
    is_answer,
    search_tools,
    tool_messages,
    written_as_call,
    written_as_text,
)

FIRST = "search"
SHOWN = 100
# Enough for any call but an answer: a small model may not end the text of an argument by itself.
STEP_TOKENS = 192
# Beyond this share of the room the next result might not fit.
FULL_SHARE = 0.75


class Search:
    """The steps of one question.

    Args:
        endpoint: whom to ask.
        tools: what the model may call besides `answer`.
        max_new_tokens: of each message.
        on_step: gets each step; on_note: what else there is to know.
    """

    def __init__(
        self,
        endpoint: ChatEndpoint,
        tools: DocumentTools,
        max_new_tokens: int,
        on_step: Callable[[AskStep], None],
        on_note: Callable[[str], None],
    ) -> None:
        self._endpoint, self._tools, self._max_new_tokens = endpoint, tools, max_new_tokens
        self._on_step, self._on_note = on_step, on_note
        # Until the server refuses to.
        self._forces = True

    def run(self, question: str, overview: str, max_steps: int, room: int) -> tuple[Written, bool]:
        """The answer as the model wrote it, and whether it was cut.

        In the last step, or when most of the `room` for the conversation (in bytes) is taken, nothing but an
        answer is asked for. Raises EndpointError if there is none then.
        """
        messages = tool_messages(question, overview)
        for step in range(1, max_steps + 1):
            is_full = len(json.dumps(messages, ensure_ascii=False).encode()) > FULL_SHARE * room
            if is_full:
                self._on_note(f"the context is full after {step - 1} steps; the model has to answer")
            must_answer = is_full or step == max_steps
            # A small model would answer without a look.
            reply = self._reply(messages, ANSWER if must_answer else FIRST if step == 1 else "required")
            if not must_answer and _is_cut_answer(reply):
                reply = self._reply(messages, ANSWER)
            if written := _written(reply):
                self._on_step(AskStep("answer"))
                return written, reply.is_cut
            if is_full:
                break
            messages += self._results(reply)
        raise EndpointError(
            f"{self._endpoint.model} gave no answer in {step} steps; allow more with max_steps, "
            "or ask a larger model",
            arguments=["max_steps"],
        )

    def _reply(self, messages: list[dict[str, Any]], choice: str) -> Reply:
        """The model's next message: a call of any tool or of the named one, if the server forces it."""
        is_short = choice != ANSWER and self._forces
        limit = min(STEP_TOKENS, self._max_new_tokens) if is_short else self._max_new_tokens
        try:
            return self._endpoint.complete(messages, limit, search_tools(choice if self._forces else "auto"))
        except RequestRefused as refused:
            if refused.is_too_long or not self._forces:
                raise
            self._on_note(f"{refused}; calls are left to the model")
            self._forces = False
            return self._endpoint.complete(messages, self._max_new_tokens, search_tools("auto"))

    def _results(self, reply: Reply) -> list[dict[str, Any]]:
        """The model's message and what its calls brought."""
        if not reply.calls:
            self._on_step(AskStep("neither call nor answer"))
            return [{"role": "assistant", "content": reply.text}, {"role": "user", "content": NO_CALL}]
        calls, results = [], []
        for call in reply.calls:
            arguments, result = self._result(call)
            self._on_step(_step(call.name, arguments, result))
            # Servers read the arguments that come back to them, and refuse what is no JSON.
            function = {"name": call.name, "arguments": arguments}
            calls.append({"id": call.id, "type": "function", "function": function})
            results.append({"role": "tool", "tool_call_id": call.id, "content": result})
        thought = {"reasoning_content": reply.reasoning} if reply.reasoning else {}
        return [{"role": "assistant", "content": reply.text, **thought, "tool_calls": calls}, *results]

    def _result(self, call: Call) -> tuple[str, str]:
        """A call's arguments as JSON, and its result; a mistake in a call is told to the model."""
        try:
            arguments = read_json(call.arguments)
            written = json.dumps(arguments, allow_nan=False)
        except ValueError as error:
            return "{}", f"error: the arguments are no JSON ({error}); call again"
        try:
            return written, self._tools.call(call.name, arguments)
        except DocumentError as error:
            return written, f"error: {error}"


def _is_cut_answer(reply: Reply) -> bool:
    """Whether an answer was begun that had no room for its end."""
    return reply.is_cut and any(is_answer(call.name) for call in reply.calls)


def _written(reply: Reply) -> Written | None:
    """The answer in a message: a call of `answer`, or text where there is no call."""
    for call in reply.calls:
        if is_answer(call.name):
            return written_as_call(call.arguments, reply.is_cut)
    return written_as_text(reply.text) if reply.text.strip() and not reply.calls else None


def _step(name: str, arguments: str, result: str) -> AskStep:
    tool, given, brought = printable(name[:40]), _shown(arguments), _shown(result)
    return AskStep(f"{tool} {given}: {brought}", tool, given, brought, len(result))


def _shown(text: str) -> str:
    line = printable(text.strip().split("\n")[0])
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}…"
