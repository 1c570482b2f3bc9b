"""Chat completions at an OpenAI-compatible address, one whole answer at a time. Standard library only."""

import json
import os
import time
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from fulmen.errors import EndpointError
from fulmen.pipeline.ask_bill import Bill
from fulmen.pipeline.chat_remote import KEY_VARIABLE
from fulmen.pipeline.reporter import Reporter

TIMEOUT_S = 600.0
# A server that is busy, starting or gone for a moment is asked again.
ATTEMPTS, LONGEST_WAIT_S = 4, 30.0
BUSY = (429, 502, 503, 504)
REFUSED = (400, 404, 405, 413, 415, 422, 501)
# Where servers tell how many tokens they take: vLLM, OpenRouter and others, llama.cpp.
CONTEXT_FIELDS = ("max_model_len", "context_length", "context_window", "n_ctx")


class RequestRefused(EndpointError):
    """An answer of 4xx that another form of the request may not get."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.is_too_long = status == 413 or "context" in message.lower()


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
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EndpointError(f"url={url!r} is no address; write it as http://127.0.0.1:8000/v1")
        self._url = url.rstrip("/") if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/v1"
        self._key = api_key or os.environ.get(KEY_VARIABLE)
        self._reporter = reporter
        self.bill = Bill()
        known = self._known_models() if model is None else []
        if not known and model is None:
            raise EndpointError(f"{self._url}/models is an empty list; pass model", arguments=["model"])
        self.model = model or str(known[0].get("id"))
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
            answer = self._asked_again("/chat/completions", body | (tools or {}))
        self.bill.add(answer.get("usage"))
        try:
            choice = answer["choices"][0]
            return _reply(choice["message"], choice.get("finish_reason"))
        except (KeyError, IndexError, TypeError, AttributeError):
            raise EndpointError(
                f"{self._url} answered without choices[0].message; is it a chat API?"
            ) from None

    def _known_models(self) -> list[dict[str, Any]]:
        rows = self._call("/models", None).get("data")
        return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []

    def _context(self, known: list[dict[str, Any]]) -> int | None:
        """Tokens that the model takes, if the server tells: in its list of models, or as fulmen's gateway."""
        try:
            rows = known or self._known_models()
            rows = [row for row in rows if row.get("id") == self.model] or rows[:1]
            told = [row[name] for row in rows for name in CONTEXT_FIELDS if isinstance(row.get(name), int)]
            root = self._url.removesuffix("/v1")
            return told[0] if told else _positive(self._call("/fulmen/info", None, root).get("context"))
        except EndpointError:
            return None

    def _asked_again(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer, after other attempts where the server was busy or broke off."""
        for attempt in range(1, ATTEMPTS):
            try:
                return self._call(path, body)
            except _TryAgain as error:
                self.bill.broken_off += error.broke_off
                wait = min(LONGEST_WAIT_S, 0.5 * 2**attempt if error.wait_s is None else error.wait_s)
                self._reporter.note(f"{error}; asked again in {wait:g} s")
                time.sleep(wait)
        return self._call(path, body)

    def _call(self, path: str, body: dict[str, Any] | None, root: str | None = None) -> dict[str, Any]:
        url = (root if root is not None else self._url) + path
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            with urlopen(Request(url, data, headers), timeout=TIMEOUT_S) as response:
                found = json.loads(response.read())
        except HTTPError as error:
            raise _refusal(url, error) from error
        except ValueError as error:
            raise EndpointError(f"{url} answered no JSON; give the address that ends in /v1") from error
        except URLError as error:
            reason = str(error.reason)
            raise EndpointError(f"{url} cannot be reached ({reason}); is the server running?") from error
        except TimeoutError as error:
            raise EndpointError(f"{url} did not answer within {TIMEOUT_S:g} s; ask for less") from error
        except (HTTPException, OSError) as error:
            raise _TryAgain(f"{url} broke off ({error or type(error).__name__})", broke_off=True) from error
        if not isinstance(found, dict):
            raise EndpointError(f"{url} answered no JSON object; give the address that ends in /v1")
        if "error" in found and "choices" not in found:
            raise _TryAgain(f"{url} broke off: {_message(found)}", broke_off=True)
        return found


class _TryAgain(EndpointError):
    """A failure that may be over in a moment."""

    def __init__(self, message: str, wait_s: float | None = None, broke_off: bool = False) -> None:
        super().__init__(message)
        self.wait_s, self.broke_off = wait_s, broke_off


def _refusal(url: str, error: HTTPError) -> EndpointError:
    text = error.read().decode("utf-8", "replace")
    try:
        said = _message(json.loads(text))
    except ValueError:
        said = " ".join(text.split())[:160] or error.reason
    words = f"{url} answered {error.code}: {said}"
    if error.code in BUSY:
        wait = error.headers.get("Retry-After", "")
        return _TryAgain(words, float(wait) if wait.isdigit() else None)
    if error.code in REFUSED:
        return RequestRefused(words, error.code)
    return EndpointError(f"{words}; set {KEY_VARIABLE}" if error.code == 401 else words)


def _message(answer: Any) -> str:
    """What an error's body says: OpenAI's shape, or whatever it is."""
    error = answer.get("error") if isinstance(answer, dict) else None
    said = error.get("message") if isinstance(error, dict) else error or answer
    return " ".join(str(said).split())[:300]


def _reply(message: dict[str, Any], finish: Any) -> Reply:
    calls = [
        Call(
            str(call.get("id") or f"call_{number}"),
            str(call["function"].get("name")),
            str(call["function"].get("arguments") or "{}"),
        )
        for number, call in enumerate(message.get("tool_calls") or [])
    ]
    reasoning = message.get("reasoning_content")
    return Reply(str(message.get("content") or ""), tuple(calls), finish == "length", str(reasoning or ""))


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
