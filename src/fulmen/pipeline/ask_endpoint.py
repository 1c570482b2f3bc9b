"""Chat completions at an OpenAI-compatible address, one whole answer at a time."""

import json
from dataclasses import dataclass
from typing import Any

from fulmen.endpoints import Endpoint, EndpointBusy
from fulmen.errors import EndpointError
from fulmen.pipeline.ask_bill import Bill
from fulmen.pipeline.reporter import Reporter

# Where servers tell how many tokens they take: vLLM, OpenRouter and others, llama.cpp.
CONTEXT_FIELDS = ("max_model_len", "context_length", "context_window", "n_ctx")


@dataclass(frozen=True)
class Call:
    """A tool call as a model wrote it. arguments: JSON, or what should have been."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Reply:
    """A model's message. is_cut: it reached max_tokens. reasoning: its thoughts, if the server tells them."""

    text: str
    calls: tuple[Call, ...]
    is_cut: bool
    reasoning: str


class ChatEndpoint:
    """One model at an address; what its answers used is added to `bill`.

    Args:
        url: as `http://127.0.0.1:8000/v1`; without a path, /v1 is meant.
        api_key: None: FULMEN_API_KEY, if it is set.
        model: None: the first that the server names.

    Raises:
        EndpointError: the address is none, cannot be reached, refuses, or names no model.
    """

    def __init__(self, url: str, api_key: str | None, model: str | None, reporter: Reporter) -> None:
        self._server = Endpoint(url, api_key)
        self._url = self._server.url
        self._reporter = reporter
        self.bill = Bill()
        known = self._server.models() if model is None else []
        if not known and model is None:
            raise EndpointError(f"{self._url}/models names none; pass model", arguments=["model"])
        self.model: str = model or known[0]["id"]
        self.context = self._context(known)

    def complete(
        self, messages: list[dict[str, Any]], max_tokens: int, tools: dict[str, Any] | None = None
    ) -> Reply:
        """The model's next message. tools: the fields `tools` and `tool_choice`, or None.

        Raises RequestRefused for a request that the server does not take; EndpointError for all else, also
        for a server that breaks off again and again.
        """
        body = {"model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        with self._reporter.stage("Wait"):
            answer = self._server.call_again("/chat/completions", body | (tools or {}), self._waits)
        self.bill.add(answer.get("usage"))
        try:
            choice = answer["choices"][0]
            return _reply(choice["message"], choice.get("finish_reason"))
        except (KeyError, IndexError, TypeError, AttributeError):
            raise EndpointError(
                f"{self._url} answered without choices[0].message; is it a chat API?"
            ) from None

    def _context(self, known: list[dict[str, Any]]) -> int | None:
        """Tokens that the model takes, if the server tells: in its list of models, or as fulmen's gateway."""
        try:
            rows = known or self._server.models()
            rows = [row for row in rows if row.get("id") == self.model] or rows[:1]
            told = [size for row in rows for name in CONTEXT_FIELDS if (size := _positive(row.get(name)))]
            root = self._url.removesuffix("/v1")
            return told[0] if told else _positive(self._server.call("/fulmen/info", root=root).get("context"))
        except EndpointError:
            return None

    def _waits(self, error: EndpointBusy, wait_s: float) -> None:
        self.bill.broken_off += error.broke_off
        self._reporter.note(f"{error}; asked again in {wait_s:g} s")


def _reply(message: dict[str, Any], finish: Any) -> Reply:
    calls = [
        Call(
            str(call.get("id") or f"call_{number}"),
            _text(call["function"].get("name")),
            _arguments(call["function"].get("arguments")),
        )
        for number, call in enumerate(message.get("tool_calls") or [])
    ]
    content, reasoning = _text(message.get("content")), _text(message.get("reasoning_content"))
    return Reply(content, tuple(calls), finish == "length", reasoning)


def _text(given: Any) -> str:
    """A text, or what parts have of it; empty for anything else."""
    if isinstance(given, list):
        return "".join(_text(part.get("text")) for part in given if isinstance(part, dict))
    return given if isinstance(given, str) else ""


def _arguments(given: Any) -> str:
    """A call's arguments as JSON: some servers send the object itself."""
    return given if isinstance(given, str) and given else json.dumps(given or {})


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
