"""Thousands of made-up requests, while one stream is watched: what fails, what stalls, what the engine keeps.

    .venv/bin/python benchmarks/gateway_fuzz.py out/smollm2-135m-dsa --requests 10000 --seed 0

Counted by kind: statuses, refusals that do not say what is wrong, answers of 200 that hold an error, requests
without any answer. Printed besides: the longest time between two pieces of the watched stream, also while
nothing else was asked, and the memory of the engine's processes before and after. Exit 1 where one request
got a 5xx or no answer, the stream stalled for more than `--most-gap-s`, or the engine grew by more than
`--most-growth-mib`. Asks nobody but its own server, on this machine.
"""

import asyncio
import json
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
from fuzz_requests import Made, make_request
from served import Served, served

app = typer.Typer(add_completion=False)
WARM_REQUESTS, QUIET_S, ANSWER_S, SHOWN = 300, 15.0, 120.0, 5
READ_BYTES = 2**16


class Asking(NamedTuple):
    """How many requests to ask of which address, for how long, how many at once, and what kinds not."""

    url: str
    requests: int
    seconds: float
    at_once: int
    without: frozenset[str]


@dataclass
class Seen:
    """What came of the requests so far."""

    statuses: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    problems: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, str]] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    pieces: int = 0

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
    without: str = typer.Option("", help="Kinds to leave out, with commas between."),
    most_gap_s: float = 1.0,
    most_growth_mib: float = 256.0,
) -> None:
    """Run it and print what was found."""
    with served(model_dir) as server:
        asking = Asking(server.url, requests, minutes * 60, at_once, frozenset(without.split(",")))
        found = asyncio.run(_run(server, asking, seed))
    grown = found["engine_mib"]["after"] - found["engine_mib"]["before"]
    bad = bool(found["problems"]) or found["longest_gap_s"]["fuzzed"] > most_gap_s or grown > most_growth_mib
    print(json.dumps(found | {"grown_mib": round(grown, 1), "passed": not bad}, indent=1))
    raise typer.Exit(bad)


async def _run(server: Served, asking: Asking, seed: int) -> dict:
    seen, warm = Seen(), Seen()
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        model = (await client.get("/models")).json()["data"][0]["id"]
    watch = asyncio.create_task(_watch(server.url, model, seen))
    await _ask_all(asking._replace(requests=WARM_REQUESTS), model, warm, f"warm{seed}")
    await asyncio.sleep(QUIET_S)
    before = _engine_mib(server)
    seen.gaps.clear()
    await asyncio.sleep(QUIET_S)
    quiet = max(seen.gaps, default=0.0)
    seen.gaps.clear()
    started = time.monotonic()
    asked = await _ask_all(asking, model, seen, str(seed))
    took, fuzzed = time.monotonic() - started, max(seen.gaps, default=0.0)
    await asyncio.sleep(QUIET_S)
    after = _engine_mib(server)
    watch.cancel()
    return {
        "requests": asked,
        "seconds": round(took, 1),
        "statuses": {kind: dict(sorted(counts.items())) for kind, counts in sorted(seen.statuses.items())},
        "problems": dict(seen.problems),
        "examples": seen.examples,
        "watched_pieces": seen.pieces,
        "longest_gap_s": {"quiet": round(quiet, 3), "fuzzed": round(fuzzed, 3)},
        "engine_mib": {"before": round(before, 1), "after": round(after, 1)},
    }


async def _ask_all(asking: Asking, model: str, seen: Seen, seed: str) -> int:
    """Ask until the number or the time is reached; how many were asked."""
    numbers, end, asked = iter(range(asking.requests)), time.monotonic() + asking.seconds, 0

    async def client() -> None:
        nonlocal asked
        for number in numbers:
            if time.monotonic() > end:
                return
            name = f"{seed}:{number}"
            made = make_request(random.Random(name), model)
            if made.kind not in asking.without:
                await ask(asking.url, made, seen, name)
                asked += 1

    await asyncio.gather(*(client() for _ in range(asking.at_once)))
    return asked


async def ask(url: str, made: Made, seen: Seen, number: str, key: str | None = None) -> None:
    """One request, by a connection of its own, and what is to be said of its answer."""
    said, left = b"", False
    try:
        async with asyncio.timeout(ANSWER_S if made.leave_s is None else made.leave_s):
            said = await _talk(url, made, key)
    except TimeoutError:
        left = True
    except OSError:
        pass
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


async def _watch(url: str, model: str, seen: Seen) -> None:
    """One stream after another; the time between any two pieces of one is kept."""
    body = {"model": model, "messages": [{"role": "user", "content": "Count the ships."}], "stream": True}
    body |= {"max_tokens": 2000, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        while True:
            async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                last = None
                async for _ in answer.aiter_bytes():
                    now = time.monotonic()
                    if last is not None:
                        seen.gaps.append(now - last)
                    last, seen.pieces = now, seen.pieces + 1


def _engine_mib(server: Served) -> float:
    """Memory of the engine's processes that is theirs alone, in MiB."""
    engine = server.engine()
    processes = [engine, *engine.children(recursive=True)]
    return (
        sum(process.memory_full_info().uss for process in processes if psutil.pid_exists(process.pid)) / 2**20
    )


if __name__ == "__main__":
    app()
