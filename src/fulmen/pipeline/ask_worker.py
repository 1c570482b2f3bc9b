"""One question about a folder, in a process of its own that may be killed at any time: `fulmen serve --docs`.

    python -m fulmen.pipeline.ask_worker

reads one line of JSON, the arguments of `fulmen.ask` (so that no list of processes shows the key), and writes
one for each event, as it happens:

    {"event": "note", "text"}
    {"event": "step", "text", "tool", "arguments", "result", "characters", "usage", "cost"}
    {"event": "answer", "answer", "complete", "citations", "dropped", "notes", "usage", "cost"}
    {"event": "error", "message", "param", "usage", "cost"}

The last one is an answer or an error, which has no bill before the first step. What is wrong with the folder
itself is for whoever serves it, and goes to stderr.
"""

import json
import sys
from collections.abc import Iterable
from typing import Any

from fulmen.errors import DocumentError, FulmenError, OutputError
from fulmen.pipeline.ask import ask
from fulmen.pipeline.ask_answer import AskStep, FolderAnswer
from fulmen.pipeline.ask_bill import Bill
from fulmen.pipeline.reporter import SilentReporter

UNREADABLE = "the documents cannot be read; the server's log says why"


class EventWriter(SilentReporter):
    """Writes events as lines to stdout."""

    def __init__(self) -> None:
        self._bill: Bill | None = None

    def write(self, event: str, **fields: Any) -> None:
        """One event."""
        sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """As `Reporter.note`."""
        self.write("note", text=text)

    def step(self, step: AskStep, bill: Bill) -> None:
        """`on_step` of `ask`, whose bill goes on after that."""
        self._bill = bill
        self.write("step", **vars(step), **bill.to_dict())

    def error(self, message: str, param: str | None) -> None:
        """The last event of a question without an answer."""
        billed = {} if self._bill is None else self._bill.to_dict()
        self.write("error", message=message, param=param, **billed)


def main(lines: Iterable[str]) -> None:
    """Answer the question in the first line."""
    events = EventWriter()
    try:
        answer = ask(**json.loads(next(iter(lines))), reporter=events, on_step=events.step)
    except (DocumentError, OutputError) as error:
        sys.stderr.write(f"{error}\n")
        events.error(UNREADABLE, None)
    except FulmenError as error:
        events.error(str(error), next(iter(error.arguments), None))
    else:
        events.write("answer", **_shown(answer))


def _shown(answer: FolderAnswer) -> dict[str, Any]:
    """What a page shows of an answer: citations with what stands around them."""
    told = answer.to_dict()
    shown = {name: told[name] for name in ("answer", "complete", "notes", "usage", "cost")}
    citations = [
        {**cited, "before": one.before, "after": one.after}
        for cited, one in zip(told["citations"], answer.citations, strict=True)
    ]
    return {**shown, "citations": citations, "dropped": len(answer.dropped)}


if __name__ == "__main__":
    main(sys.stdin)
