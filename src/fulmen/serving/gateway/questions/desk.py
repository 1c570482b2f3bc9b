"""Questions about the one folder of documents that whoever serves has named, each in a process of its own.

Reading a folder takes seconds, and a model's steps take minutes: a process neither holds up the
gateway's other streams, nor outlives a client that left. It asks this gateway with the client's key, so
that each request is admitted, metered and charged like any other. What the folder is, no request says.
"""

import asyncio
import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fulmen.serving.gateway.admission.concurrency import ConcurrencyLimiter

MOST_QUESTIONS = 8
# Of an event: a citation may be as long as a document.
LONGEST_LINE = 64 * 2**20


@dataclass(frozen=True)
class QuestionDesk:
    """Where questions about a folder are answered.

    Attributes:
        folder: all that is read.
        documents: how many there were when the serving began.
        command: reads a question from stdin, as one line of JSON, and writes a line for each event.
        limiter: how many questions may be under way.
    """

    folder: Path
    documents: int
    command: tuple[str, ...]
    limiter: ConcurrencyLimiter = field(default_factory=lambda: ConcurrencyLimiter(MOST_QUESTIONS))

    async def start(self, question: dict[str, Any]) -> asyncio.subprocess.Process:
        """Begin with a question (the fields that `command` takes, without the folder)."""
        process = await asyncio.create_subprocess_exec(
            *self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            limit=LONGEST_LINE,
            # It asks nobody but this gateway: no proxy shall see the key.
            env={**os.environ, "no_proxy": "*"},
            # A group of its own: Ctrl-C is for the gateway.
            start_new_session=True,
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps({"folder": str(self.folder), **question}).encode() + b"\n")
        process.stdin.close()
        return process
