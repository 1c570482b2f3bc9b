"""Who writes proofs and analyses: a model behind an OpenAI-compatible address, or one that is loaded here."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from fulmen.endpoints import Endpoint, EndpointBusy
from fulmen.errors import EndpointError
from fulmen.pipeline.reporter import Reporter

Messages = Sequence[Mapping[str, Any]]


class Drawing(NamedTuple):
    """How a reply is drawn. temperature: 0 is greedy; number: among the replies to the same messages."""

    max_new_tokens: int
    temperature: float
    number: int = 0


class Writer(Protocol):
    """Writes replies to chat messages, the same for the same arguments as far as it can; from any thread.

    name: for a reader. identity: what tells it from others, whose replies are not taken for its own.
    """

    name: str
    identity: str

    def write(self, messages: Messages, drawing: Drawing) -> str:
        """The reply's text."""
        ...


class EndpointWriter:
    """A model at an address. model: None: the first that the server names.

    Raises EndpointError: the address is none, cannot be reached, refuses, or names no model.
    """

    def __init__(self, url: str, model: str | None, reporter: Reporter) -> None:
        self._server, self._reporter = Endpoint(url), reporter
        known = self._server.models() if model is None else []
        if not known and model is None:
            raise EndpointError(f"{self._server.url}/models names none; pass model", arguments=["model"])
        self._model: str = model or known[0]["id"]
        self.name = self.identity = f"{self._model} at {self._server.url}"

    def write(self, messages: Messages, drawing: Drawing) -> str:
        """As `Writer.write`. Raises EndpointError, also for a server that is busy again and again."""
        body = {
            "model": self._model,
            "messages": list(messages),
            "max_tokens": drawing.max_new_tokens,
            "temperature": drawing.temperature,
            "seed": drawing.number,
        }
        answer = self._server.call_again("/chat/completions", body, self._waits)
        try:
            return str(answer["choices"][0]["message"].get("content") or "")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise EndpointError(
                f"{self._server.url} answered without choices[0].message; is it a chat API?"
            ) from None

    def _waits(self, error: EndpointBusy, wait_s: float) -> None:
        self._reporter.note(f"{error}; asked again in {wait_s:g} s")
