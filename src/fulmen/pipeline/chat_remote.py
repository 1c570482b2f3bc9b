"""A conversation with a model behind an OpenAI-compatible address."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from fulmen.endpoints import Endpoint
from fulmen.errors import EndpointError
from fulmen.evaluation.wording import percent
from fulmen.pipeline.reporter import Reporter, reporter_of


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
        self._server, self._document = Endpoint(url), document
        self._messages: list[dict[str, str]] = []
        models = self._server.models()
        if not models:
            raise EndpointError(
                f"{self._server.url}/models names no model; is it an OpenAI-compatible server?"
            )
        self.model: str = models[0]["id"]

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
            for chunk in asking.enter_context(self._server.streamed("/chat/completions", body)):
                waiting.close()
                usage = chunk.get("usage") or usage
                for choice in chunk.get("choices", []):
                    if piece := choice.get("delta", {}).get("content"):
                        on_text(piece)
                        said += piece
        self._messages = [*messages, {"role": "assistant", "content": said}]
        return usage


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
