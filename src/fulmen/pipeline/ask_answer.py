"""What came of a question about a folder."""

from dataclasses import dataclass
from typing import Any

from fulmen.agents.documents.citations import Citation, Dropped
from fulmen.agents.documents.folder import PassedOver
from fulmen.pipeline.ask_bill import Bill


def printable(text: str) -> str:
    """Text for a terminal: documents and models may write what a terminal obeys."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "�" for letter in text)


@dataclass(frozen=True)
class AskStep:
    """One thing that was done for an answer.

    Args:
        text: what, in a line.
        tool: which was called; None where none was.
        arguments: of the call, as JSON.
        result: the first line of what it brought.
        characters: of all that it brought.
    """

    text: str
    tool: str | None = None
    arguments: str = ""
    result: str = ""
    characters: int = 0


@dataclass(frozen=True)
class FolderAnswer:
    """An answer about a folder of documents, with what backs it and what it took.

    Args:
        question: as it was asked.
        answer: the model's words.
        is_complete: False if the answer reached `max_new_tokens` and ends there.
        citations: quotes that are in the documents, word for word, with their places.
        dropped: quotes of the model that are not, with the reason.
        by_tools: whether the model searched; else it was given all documents.
        steps: what the model did, a line each.
        notes: what else there is to know, as of documents that the server may have cut.
        documents: how many there are.
        left_out: files of the folder that are no documents, with the reason.
        model: the server's name for it.
        bill: tokens and money.
    """

    question: str
    answer: str
    is_complete: bool
    citations: tuple[Citation, ...]
    dropped: tuple[Dropped, ...]
    by_tools: bool
    steps: tuple[str, ...]
    notes: tuple[str, ...]
    documents: int
    left_out: tuple[PassedOver, ...]
    model: str
    bill: Bill

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "question": self.question,
            "answer": self.answer,
            "complete": self.is_complete,
            "citations": [
                {"file": one.file, "span": one.span._asdict(), "quote": one.quote} for one in self.citations
            ],
            "dropped_citations": [vars(one) for one in self.dropped],
            "mode": "tools" if self.by_tools else "whole",
            "steps": list(self.steps),
            "notes": list(self.notes),
            "documents": self.documents,
            "left_out": [vars(one) for one in self.left_out],
            "model": self.model,
            **self.bill.to_dict(),
        }
