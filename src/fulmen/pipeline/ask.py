"""A question about a folder of documents, answered by a model behind an OpenAI-compatible address.

What fits the model's context is given whole, in front of the question. A larger folder is searched by the
model with the tools of `fulmen.agents.documents`. Either way its quotes are looked up in the documents, and
those that are not there word for word are dropped.
"""

import json
from collections.abc import Callable
from typing import Any

from fulmen.agents.documents.citations import checked_citations
from fulmen.agents.documents.index import Document, DocumentIndex
from fulmen.agents.documents.tools import RESULT_LIMIT, DocumentTools, passed_over_lines
from fulmen.config import require_positive_int
from fulmen.endpoints import RequestRefused
from fulmen.errors import ConfigError, DocumentError, EndpointError
from fulmen.pipeline.arguments import Place, place_argument
from fulmen.pipeline.ask_answer import AskStep, FolderAnswer
from fulmen.pipeline.ask_bill import Bill
from fulmen.pipeline.ask_endpoint import ChatEndpoint
from fulmen.pipeline.ask_prompt import (
    IN_TEXT,
    Written,
    answer_tools,
    documents_text,
    is_answer,
    whole_messages,
    written_as_call,
    written_as_text,
)
from fulmen.pipeline.ask_search import Search
from fulmen.pipeline.reporter import Reporter, reporter_of

DEFAULT_URL = "http://127.0.0.1:8000/v1"
DEFAULT_CONTEXT, DEFAULT_NEW_TOKENS, DEFAULT_STEPS = 32_768, 1024, 12
# Tokenizers make a token of this many bytes or more, but for text that is mostly digits or signs.
BYTES_PER_TOKEN = 3
# For the rules, the question and the template.
RESERVED_TOKENS = 1000


def ask(
    folder: Place,
    question: str,
    *,
    url: str = DEFAULT_URL,
    api_key: str | None = None,
    model: str | None = None,
    context: int | None = None,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    max_steps: int = DEFAULT_STEPS,
    cache: Place | None = None,
    reporter: Reporter | None = None,
    on_step: Callable[[AskStep, Bill], None] | None = None,
) -> FolderAnswer:
    """Answer a question about the documents in a folder, with checked citations and the bill.

    Args:
        folder: text, Markdown, source code, HTML, and PDF with the package pypdf. Nothing outside it is read.
        question: about the documents.
        url: of any OpenAI-compatible server, as `fulmen serve`.
        api_key: None: FULMEN_API_KEY, if it is set.
        model: None: the first that the server names.
        context: tokens that the model takes; None: what the server says, else 32,768.
        max_new_tokens: of each of the model's messages.
        max_steps: messages of the model at most, where it searches.
        cache: folder of the index; None: $FULMEN_CACHE, else $XDG_CACHE_HOME/fulmen, else ~/.cache/fulmen.
        reporter: whom to tell of the steps as they are made; None: nobody.
        on_step: gets each step as it is made, and the bill until then; None: the reporter gets a line.

    Raises:
        ConfigError: an argument that cannot be.
        DocumentError: a folder that is missing, has no document, or is too large.
        OutputError: the cache cannot be written.
        EndpointError: the server cannot be reached, refuses or breaks off; the message has the bill so far.
    """
    place = place_argument("folder", folder, "a folder of documents")
    if not isinstance(question, str) or not question.strip():
        raise ConfigError(f"question={question!r} cannot be; write a question", arguments=["question"])
    for name, value in (("max_new_tokens", max_new_tokens), ("max_steps", max_steps)):
        require_positive_int(name, value)
    if context is not None:
        require_positive_int("context", context)
    # A terminal may pass bytes that are no text.
    question = question.strip().encode("utf-8", "replace").decode()
    told = reporter_of(reporter)
    index = DocumentIndex(place, None if cache is None else place_argument("cache", cache, "a folder"))
    try:
        documents = read_documents(index, told)
        endpoint = ChatEndpoint(url, api_key, model, told)
        asking = _Asking(index, documents, endpoint, question, max_new_tokens, max_steps, told, on_step)
        return asking.answer(context or endpoint.context)
    finally:
        index.close()


def read_documents(index: DocumentIndex, reporter: Reporter) -> list[Document]:
    """All documents of an index, brought up to date; what is passed over goes to the reporter.

    Raises DocumentError if there are none.
    """
    with reporter.stage("Read"):
        index.refresh()
    for line in passed_over_lines(index):
        reporter.note(line)
    documents = index.documents()
    if not documents:
        reasons = "; ".join(passed_over_lines(index)) or "it is empty"
        raise DocumentError(f"{index.folder} has no document ({reasons}); name a folder with text")
    return documents


class _Asking:
    """One question, its steps and notes."""

    def __init__(
        self,
        index: DocumentIndex,
        documents: list[Document],
        endpoint: ChatEndpoint,
        question: str,
        max_new_tokens: int,
        max_steps: int,
        reporter: Reporter,
        on_step: Callable[[AskStep, Bill], None] | None,
    ) -> None:
        self._index, self._documents, self._endpoint = index, documents, endpoint
        self._question, self._max_new_tokens, self._max_steps = question, max_new_tokens, max_steps
        self._reporter, self._on_step = reporter, on_step or self._tell
        self._steps: list[str] = []
        self._notes: list[str] = []

    def answer(self, context: int | None) -> FolderAnswer:
        """Ask in the way that fits. Raises EndpointError with the bill so far."""
        if context is None:
            context = DEFAULT_CONTEXT
            self._note(f"the server does not tell its context; taken as {context:,} tokens (context)")
        room = (context - self._max_new_tokens - RESERVED_TOKENS) * BYTES_PER_TOKEN
        if room <= 0:
            raise ConfigError(
                f"max_new_tokens={self._max_new_tokens} leaves no room in a context of {context:,}; lower it",
                arguments=["max_new_tokens"],
            )
        try:
            written, is_cut, by_tools = self._written(room)
        except EndpointError as error:
            if not self._endpoint.bill.requests:
                raise
            raise EndpointError(
                f"{error}; so far: {self._endpoint.bill.text()}", arguments=error.arguments
            ) from error
        citations, dropped = checked_citations(written.quotes, self._index)
        if is_cut:
            self._note(f"the answer reached max_new_tokens={self._max_new_tokens} and ends there")
        return FolderAnswer(
            question=self._question,
            answer=written.text,
            is_complete=not is_cut,
            citations=tuple(citations),
            dropped=tuple(dropped),
            by_tools=by_tools,
            steps=tuple(self._steps),
            notes=tuple(self._notes),
            documents=len(self._documents),
            left_out=tuple(self._index.passed_over()),
            model=self._endpoint.model,
            bill=self._endpoint.bill,
        )

    def _written(self, room: int) -> tuple[Written, bool, bool]:
        """The model's answer, whether it was cut, and whether the model searched."""
        if sum(one.characters for one in self._documents) <= room:
            text = documents_text((one.path, self._index.text(one.path)) for one in self._documents)
            if len(text.encode()) <= room:
                try:
                    return *self._whole(text), False
                except RequestRefused as refused:
                    if not refused.is_too_long:
                        raise
                    self._note(f"{refused}; so the model searches")
        tools = DocumentTools(self._index, min(RESULT_LIMIT, room // 4))
        search = Search(self._endpoint, tools, self._max_new_tokens, self._step, self._note)
        return *search.run(self._question, self._overview(), self._max_steps, room), True

    def _whole(self, text: str) -> tuple[Written, bool]:
        what = f"all {len(self._documents):,} documents and the question, {len(text):,} characters"
        self._step(AskStep(what, characters=len(text)))
        messages = whole_messages(text, self._question)
        try:
            reply = self._endpoint.complete(messages, self._max_new_tokens, answer_tools())
        except RequestRefused as refused:
            if refused.is_too_long:
                raise
            self._note(f"{refused}; asked for plain text")
            messages[-1]["content"] += IN_TEXT
            reply = self._endpoint.complete(messages, self._max_new_tokens)
        self._look_for_cut(messages)
        call = next((call for call in reply.calls if is_answer(call.name)), None)
        written = written_as_call(call.arguments, reply.is_cut) if call else written_as_text(reply.text)
        if written is not None and written.text:
            return written, reply.is_cut
        if reply.is_cut:
            raise EndpointError(
                f"max_new_tokens={self._max_new_tokens} were written before an answer began; raise it",
                arguments=["max_new_tokens"],
            )
        said = call.arguments if call else json.dumps(reply.text)
        raise EndpointError(f"{self._endpoint.model} gave no answer but {said[:120]}; ask a larger model")

    def _look_for_cut(self, messages: list[dict[str, Any]]) -> None:
        """Say so if the server counted fewer tokens than a prompt of so many words can have."""
        words = sum(len(message["content"].split()) for message in messages)
        counted = self._endpoint.bill.prompts[-1]
        if 0 < counted < words // 2:
            self._note(
                f"the server counted {counted:,} tokens for {words:,} words: it may have cut the documents"
            )

    def _overview(self) -> str:
        size = sum(one.characters for one in self._documents)
        return f"The folder has {len(self._documents):,} documents with {size:,} characters."

    def _step(self, step: AskStep) -> None:
        self._steps.append(step.text)
        self._on_step(step, self._endpoint.bill)

    def _tell(self, step: AskStep, _bill: Bill) -> None:
        self._reporter.note(f"step {len(self._steps)}: {step.text}")

    def _note(self, text: str) -> None:
        self._notes.append(text)
        self._reporter.note(text)
