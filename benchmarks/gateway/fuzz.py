"""Thousands of made-up requests, while one stream is watched: what fails, what stalls, what the engine keeps.

    python -m benchmarks.gateway.fuzz out/smollm2-135m-dsa --requests 10000 --seed 0

Counted by kind: statuses, refusals that do not say what is wrong, answers of 200 that hold an error, requests
without any answer. Printed besides: the longest time between two pieces of the watched stream, also while
nothing else was asked, and the memory of the engine's processes before and after. Exit 1 where one request
got a 5xx or no answer, the stream stalled for more than `--most-gap-s`, or the engine grew by more than
`--most-growth-mib`. Asks nobody but its own server, on this machine.
"""

import asyncio
import contextlib
import json
import math
import multiprocessing
import queue
import random
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx
import psutil
import typer

from benchmarks.gateway.fuzz_requests import Made, make_request
from benchmarks.gateway.served import Served, served

app = typer.Typer(add_completion=False)
WARM_REQUESTS, QUIET_S, ANSWER_S, SHOWN = 300, 15.0, 120.0, 5
SHOWN_NAMES = 20
READ_BYTES = 2**16


class Asking(NamedTuple):
    """Which requests to ask of which address, for how long, how many at once, and what kinds not."""

    url: str
    numbers: range
    seconds: float
    at_once: int
    without: frozenset[str]


class Gap(NamedTuple):
    """Time between two pieces of the watched stream: when it ended, and how long it was."""

    end: float
    seconds: float


@dataclass
class Seen:
    """What came of the requests so far; `asked`: each one's name, beginning and end."""

    asked: list[tuple[str, float, float]] = field(default_factory=list)
    statuses: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    problems: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, str]] = field(default_factory=list)

    def blame(self, what: str, made: Made, number: str, said: bytes = b"") -> None:
        """One request went wrong."""
        self.problems[what] += 1
        if self.problems[what] <= SHOWN:
            sent = (made.raw or made.body)[:300].decode(errors="replace")
            example = {"what": what, "request": number, "kind": made.kind, "path": made.path, "sent": sent}
            self.examples.append(example | {"said": said[-300:].decode(errors="replace")})


@app.command()
def fuzz(
    model_dir: Path,
    requests: int = typer.Option(10_000, help="How many to make up."),
    minutes: float = typer.Option(60.0, help="Ask no more after so long."),
    at_once: int = 8,
    seed: int = 0,
    first: int = typer.Option(0, help="The number to begin with, to ask some of a seed's again."),
    without: str = typer.Option("", help="Kinds to leave out, with commas between."),
    most_gap_s: float = 1.0,
    most_growth_mib: float = 256.0,
) -> None:
    """Run it and print what was found."""
    with served(model_dir) as server:
        asking = Asking(
            server.url, range(first, first + requests), minutes * 60, at_once, frozenset(without.split(","))
        )
        found = asyncio.run(_run(server, asking, seed))
    grown = found["engine_mib"]["after"] - found["engine_mib"]["before"]
    bad = bool(found["problems"]) or found["longest_gap_s"]["fuzzed"] > most_gap_s or grown > most_growth_mib
    print(json.dumps(found | {"grown_mib": round(grown, 1), "passed": not bad}, indent=1))
    raise typer.Exit(bad)


async def _run(server: Served, asking: Asking, seed: int) -> dict:
    seen, warm = Seen(), Seen()
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        model = (await client.get("/models")).json()["data"][0]["id"]
    with Watched(server.url, model) as watched:
        await _ask_all(asking._replace(numbers=range(WARM_REQUESTS)), model, warm, f"warm{seed}")
        await asyncio.sleep(QUIET_S)
        before, _ = _engine_mib(server), watched.gaps()
        await asyncio.sleep(QUIET_S)
        quiet, started = watched.gaps(), time.monotonic()
        await _ask_all(asking, model, seen, str(seed))
        took, fuzzed = time.monotonic() - started, watched.gaps()
    await asyncio.sleep(QUIET_S)
    return {
        "requests": len(seen.asked),
        "seconds": round(took, 1),
        "statuses": {kind: dict(sorted(counts.items())) for kind, counts in sorted(seen.statuses.items())},
        "problems": dict(seen.problems),
        "examples": seen.examples,
        "watched_pieces": len(fuzzed),
        "longest_gap_s": {"quiet": _longest(quiet), "fuzzed": _longest(fuzzed)},
        "during_gaps": [_during(gap, seen) for gap in fuzzed[:SHOWN]],
        "engine_mib": {"before": round(before, 1), "after": round(_engine_mib(server), 1)},
    }


def _longest(gaps: list[Gap]) -> float:
    return round(gaps[0].seconds, 3) if gaps else math.inf


def _during(gap: Gap, seen: Seen) -> dict:
    """A gap and the requests that were under way in it."""
    names = [name for name, start, end in seen.asked if start < gap.end and end > gap.end - gap.seconds]
    return {"seconds": round(gap.seconds, 3), "requests": names[:SHOWN_NAMES]}


async def _ask_all(asking: Asking, model: str, seen: Seen, seed: str) -> None:
    """Ask until the number or the time is reached."""
    numbers, end = iter(asking.numbers), time.monotonic() + asking.seconds

    async def client() -> None:
        for number in numbers:
            if time.monotonic() > end:
                return
            name = f"{seed}:{number}"
            made = make_request(random.Random(name), model)
            if made.kind not in asking.without:
                await ask(asking.url, made, seen, name)

    await asyncio.gather(*(client() for _ in range(asking.at_once)))


async def ask(url: str, made: Made, seen: Seen, number: str, key: str | None = None) -> None:
    """One request, by a connection of its own, and what is to be said of its answer."""
    said, left, started = b"", False, time.monotonic()
    try:
        async with asyncio.timeout(ANSWER_S if made.leave_s is None else made.leave_s):
            said = await _talk(url, made, key)
    except TimeoutError:
        left = True
    except OSError:
        pass
    seen.asked.append((number, started, time.monotonic()))
    if left and made.leave_s is not None:
        seen.statuses[made.kind]["left"] += 1
        return
    head, _, body = said.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 ") or left:
        seen.statuses[made.kind]["no answer"] += 1
        if made.kind != "wire":
            seen.blame("no answer", made, number)
        return
    status = head.split()[1].decode()
    seen.statuses[made.kind][status] += 1
    if status >= "500":
        seen.blame(status, made, number, body)
    elif status >= "400" and made.method != "HEAD" and not _names_what(body):
        seen.blame("a refusal without a message", made, number, body)
    elif status == "200" and (b'data: {"error"' in body or body.lstrip(b"\n").startswith(b'{"error"')):
        seen.blame("an error in an answer of 200", made, number, body)


async def _talk(url: str, made: Made, key: str | None) -> bytes:
    """Send it and read to the end of the connection."""
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    said = b""
    try:
        writer.write(made.raw or _head(made, place.netloc, key) + made.body)
        await writer.drain()
        while piece := await reader.read(READ_BYTES):
            said += piece
    except ConnectionError:
        pass
    finally:
        writer.transport.abort()
    return said


def _head(made: Made, host: str, key: str | None) -> bytes:
    lines = [f"{made.method} {made.path} HTTP/1.1".encode("latin-1", "replace"), b"Host: " + host.encode()]
    lines += [name + b": " + value for name, value in made.fields]
    lines += [f"Authorization: Bearer {key}".encode()] if key else []
    if made.method in ("POST", "PUT", "PATCH"):
        lines.append(b"Content-Length: %d" % len(made.body))
    return b"\r\n".join([*lines, b"Connection: close", b"", b""])


def _names_what(body: bytes) -> bool:
    try:
        start, end = body.index(b"{"), body.rindex(b"}")
        return bool(json.loads(body[start : end + 1])["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return False


class Watched:
    """One stream after another, read in a process of its own; the times between any two pieces of one."""

    def __init__(self, url: str, model: str) -> None:
        spawning = multiprocessing.get_context("spawn")
        self._gaps: multiprocessing.Queue[Gap] = spawning.Queue()
        self._process = spawning.Process(target=_watch, args=(url, model, self._gaps), daemon=True)

    def __enter__(self) -> "Watched":
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def gaps(self) -> list[Gap]:
        """All since the last call, the longest first."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._gaps.get_nowait())
        return sorted(found, key=lambda gap: -gap.seconds)


def _watch(url: str, model: str, gaps: "multiprocessing.Queue[Gap]") -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "Count the ships."}], "stream": True}
    body |= {"max_tokens": 2000, "ignore_eos": True}
    with httpx.Client(base_url=url, timeout=None) as client:
        while True:
            with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                last = None
                # Signs of life are no pieces of an answer.
                for _ in (piece for piece in answer.iter_bytes() if b"data:" in piece):
                    now = time.monotonic()
                    if last is not None:
                        gaps.put(Gap(now, now - last))
                    last = now


def _engine_mib(server: Served) -> float:
    """Memory of the engine's processes that is theirs alone, in MiB."""
    engine = server.engine()
    processes = [engine, *engine.children(recursive=True)]
    return (
        sum(process.memory_full_info().uss for process in processes if psutil.pid_exists(process.pid)) / 2**20
    )


if __name__ == "__main__":
    app()
