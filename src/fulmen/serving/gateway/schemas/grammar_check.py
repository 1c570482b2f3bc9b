"""Schemas compiled beside the engine before it gets them, in a process that is killed at a limit.

vLLM compiles a schema where it serves everybody, without a limit and to the end. What it is given has been
compiled here before, by the same compiler, within bounds on time and memory; what has not is refused.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections import OrderedDict, defaultdict
from typing import Any

from fulmen.serving.engine.served_model import ServedModel
from fulmen.serving.gateway.errors import ApiError
from fulmen.serving.gateway.schemas.json_schema import FieldSchema

# Seconds that a check may wait for its turn and take on a busy machine: beyond that nobody is to blame.
PATIENCE_S = 60.0
REMEMBERED = 4096
# CPU seconds for all schemas of a request and a vocabulary of so many tokens; more for a larger one, as each
# rule of a grammar meets each token.
COMPILE_S, COMPILE_TOKENS = 3.0, 2**16


class GrammarCheck:
    """One check at a time, one per account in the queue; what was found is remembered.

    Args:
        model: whose tokens the grammars are compiled for.
        compile_s: CPU seconds for all schemas of a request, for COMPILE_TOKENS tokens.
    """

    def __init__(self, model: ServedModel, compile_s: float = COMPILE_S) -> None:
        self._place, self._tokens = model.place, model.config.get_text_config().vocab_size
        self._seconds = compile_s * max(1.0, self._tokens / COMPILE_TOKENS)
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._found: OrderedDict[bytes, tuple[int, str] | None] = OrderedDict()
        self._child: int | None = None
        self._left = False

    async def check(self, account: str, schemas: list[FieldSchema]) -> None:
        """Return when the engine may have the schemas.

        Raises ApiError 422 that names the field and the limit for one that cannot be compiled within bounds,
        429 if its turn does not come. Whoever is cancelled ends the compilation.
        """
        line = json.dumps([schema for _, schema in schemas]).encode() + b"\n"
        key = hashlib.sha256(line).digest()
        if key not in self._found:
            try:
                async with asyncio.timeout(PATIENCE_S), self._turns[account], self._turn:
                    found = await self._ask(line)
            except TimeoutError:
                raise ApiError(
                    429, "the schemas of other requests are being checked; try again shortly"
                ) from None
            finally:
                self._forget(account)
            self._found[key] = found
            while len(self._found) > REMEMBERED:
                self._found.popitem(last=False)
        if (fault := self._found[key]) is not None:
            place, why = fault
            raise ApiError(422, f"{schemas[place].field} {why}", schemas[place].field)

    async def start(self) -> None:
        """Begin the process, which takes seconds; a check would begin it too."""
        async with self._turn:
            await self._started()

    async def close(self) -> None:
        """End the process."""
        if self._process is not None and self._process.returncode is None:
            self._kill_child()
            self._process.kill()
            await self._process.wait()

    def _forget(self, account: str) -> None:
        """Keep no lock that nobody holds."""
        if not self._turns[account].locked():
            del self._turns[account]

    async def _ask(self, line: bytes) -> tuple[int, str] | None:
        """The child's verdict on the schemas of a request."""
        process = await self._started()
        assert process.stdin is not None
        process.stdin.write(line)
        self._left = False
        reading = asyncio.create_task(self._read(process))
        try:
            return await asyncio.shield(reading)
        except asyncio.CancelledError:
            self._left = True
            self._kill_child()
            # The next check must find the pipe as this one did.
            await asyncio.wait([reading])
            raise

    async def _read(self, process: asyncio.subprocess.Process) -> tuple[int, str] | None:
        """What the process says of one request."""
        last: dict[str, Any] = {"at": 0}
        while (word := await _word(process)) != "ended":
            if isinstance(word, dict):
                last = word
            else:
                self._child = word
                if self._left:
                    self._kill_child()
        self._child = None
        assert process.stdin is not None
        process.stdin.write(b"\n")
        if last.get("sound"):
            return None
        why = f"takes more than {self._seconds:.0f} s or 1 GiB to compile, the limit; make it simpler"
        return last["at"], last.get("why", why)

    def _kill_child(self) -> None:
        """End the compilation under way; until the next request its id is nobody else's."""
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGKILL)

    async def _started(self) -> asyncio.subprocess.Process:
        """The process; started anew if it is lost."""
        if self._process is None or self._process.returncode is not None:
            command = [sys.executable, "-m", "fulmen.serving.gateway.schemas.grammar_worker"]
            self._process = await asyncio.create_subprocess_exec(
                *(*command, str(self._place), str(self._tokens), str(self._seconds)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # A group of its own: Ctrl-C is for the gateway.
                start_new_session=True,
            )
        return self._process


async def _word(process: asyncio.subprocess.Process) -> Any:
    """The next line. Raises ApiError 503 if the process is lost."""
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        await process.wait()
        raise ApiError(503, "the check of schemas was lost and starts again; try again shortly")
    return json.loads(line)
