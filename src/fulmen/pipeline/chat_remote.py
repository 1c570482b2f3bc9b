"""A conversation with a model behind an OpenAI-compatible address. Standard library only."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from fulmen.errors import EndpointError
from fulmen.evaluation.wording import percent
from fulmen.pipeline.reporter import Reporter, reporter_of

KEY_VARIABLE = "FULMEN_API_KEY"
TIMEOUT_S = 600.0


class RemoteChat:
    """Asks a server one question after the other and streams the answers.

    Args:
        url: as `http://127.0.0.1:8000` or with `/v1` behind it; the key is taken from FULMEN_API_KEY.
        document: text before the first question.
        reporter: whom to tell of waiting; None: nobody.

    Raises:
        EndpointError: the address is none, cannot be reached, refuses, or serves no model.
    """

    def __init__(self, url: str, document: str = "", reporter: Reporter | None = None) -> None:
        self._reporter = reporter_of(reporter)
        self._url, self._document = url.rstrip("/"), document
        self._messages: list[dict[str, str]] = []
        if urlsplit(url).scheme not in ("http", "https"):
            raise EndpointError(f"url={url!r} is no address; write it as http://127.0.0.1:8000")
        with self._asked("/models") as answer:
            models = json.load(answer).get("data", [])
        if not models:
            raise EndpointError(f"{self._url}/models names no model; is it an OpenAI-compatible server?")
        self.model = str(models[0]["id"])

    def ask(self, question: str, max_new_tokens: int, on_text: Callable[[str], None]) -> dict[str, Any]:
        """Stream the answer, `on_text` gets it in pieces; return its `usage`.

        Raises EndpointError as the class does, also for an answer that breaks off.
        """
        first = f"{self._document}\n\n" if self._document and not self._messages else ""
        messages = [*self._messages, {"role": "user", "content": first + question}]
        body = {"model": self.model, "messages": messages, "max_tokens": max_new_tokens, "stream": True}
        body["stream_options"] = {"include_usage": True}
        said = ""
        usage: dict[str, Any] = {}
        with ExitStack() as asking:
            waiting = asking.enter_context(ExitStack())
            waiting.enter_context(self._reporter.stage("Wait"))
            answer = asking.enter_context(self._asked("/chat/completions", body))
            for chunk in _chunks(answer):
                waiting.close()
                if "error" in chunk:
                    raise EndpointError(f"{self._url} broke off: {chunk['error'].get('message')}")
                usage = chunk.get("usage") or usage
                for choice in chunk.get("choices", []):
                    if piece := choice.get("delta", {}).get("content"):
                        on_text(piece)
                        said += piece
        self._messages = [*messages, {"role": "assistant", "content": said}]
        return usage

    @contextmanager
    def _asked(self, path: str, body: dict[str, Any] | None = None) -> Iterator[HTTPResponse]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            with urlopen(Request(self._url + path, data, headers), timeout=TIMEOUT_S) as answer:
                yield answer
        except HTTPError as error:
            hint = f"; set {KEY_VARIABLE}" if error.code == 401 else ""
            raise EndpointError(
                f"{self._url}{path} answered {error.code}: {_message(error)}{hint}"
            ) from error
        except json.JSONDecodeError as error:
            raise EndpointError(f"{self._url}{path} answered no JSON; give a server's address") from error
        except (URLError, HTTPException, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise EndpointError(
                f"{self._url} cannot be reached ({reason}); is the server running?"
            ) from error


def summary(usage: dict[str, Any]) -> str:
    """One line on what an answer took; of a server that is not fulmen's, only the tokens."""
    hit = usage.get("prompt_cache_hit_tokens", 0)
    prompt, output = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
    line = f"{prompt:,} prompt tokens, {hit:,} of them in the cache; {output:,} output"
    if bill := usage.get("fulmen"):
        context = bill["context_tokens"]
        share = percent(bill["tokens_read"] / context, 0) if context else "nothing"
        dense = f", {bill['dense_cost']} with dense attention" if bill.get("dense_cost") else ""
        line += f"; attention read {share} of its context; {bill['cost']} {bill['currency']}{dense}"
    return f"[{line}]"


def _chunks(answer: HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in answer:
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            yield json.loads(line[6:])


def _message(error: HTTPError) -> str:
    text = " ".join(error.read().decode("utf-8", "replace").split())
    try:
        return str(json.loads(text)["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return text[:160] or error.reason
