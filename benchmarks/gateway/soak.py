"""Many streams, clients that leave at random, the engine killed in the middle; then the books are checked.

    python -m benchmarks.gateway.soak out/smollm2-135m-dsa --streams 200 --minutes 5

Checked: every request that reached the ledger is settled there once; what a client was billed is what the
ledger says; who left in the middle pays for all that came and for no more than was asked for (how much
more than came is printed); the account's balance is its deposit less all charges; nothing is under way at the
end, in the gateway or in the engine; the server answers again after the kill.
"""

import asyncio
import json
import random
import sqlite3
import time
from collections import Counter
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from statistics import median

import httpx
import typer

from benchmarks.gateway.served import Served, served
from fulmen.cli.billing import open_store

app = typer.Typer(add_completion=False)
DEPOSIT = Decimal(1000)
DROPPING, LONGEST_PROMPT, LONGEST_ANSWER = 0.4, 200, 64
# For the engine to be back and the last requests to end.
AFTERWARDS_S = 300.0


@dataclass
class Seen:
    """What the clients saw.

    Attributes:
        left: of requests whose client left, the tokens that had come and those that were asked for.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    bills: dict[str, str] = field(default_factory=dict)
    left: dict[str, tuple[int, int]] = field(default_factory=dict)


@app.command()
def soak(
    model_dir: Path,
    streams: int = 200,
    minutes: float = 5.0,
    kill: bool = typer.Option(True, help="Kill the engine halfway."),
    seed: int = 0,
) -> None:
    """Run it and print what was found; exit 1 if the books are wrong."""
    with served(model_dir) as server:
        books = open_store(server.state, None)
        key = books.accounts.issue("soak")
        books.ledger.deposit("soak", DEPOSIT, "soak")
        seen = Seen()
        asyncio.run(_load(server, key, seen, streams, minutes * 60, kill, random.Random(seed)))
        problems = asyncio.run(_after(server, key))
        problems += _check_books(server.state / "ledger.db", seen, books.ledger.balance("soak"))
    print(json.dumps({"outcomes": seen.outcomes, "billed": len(seen.bills), "problems": problems}, indent=1))
    raise typer.Exit(bool(problems))


async def _load(
    server: Served, key: str, seen: Seen, streams: int, seconds: float, kill: bool, chance: random.Random
) -> None:
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    headers = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, limits=limits, timeout=None) as client:
        model = (await client.get("/models")).json()["data"][0]["id"]
        clients = [asyncio.create_task(_client(client, model, end, seen, chance)) for _ in range(streams)]
        if kill:
            await asyncio.sleep(seconds / 2)
            server.engine().kill()
        await asyncio.gather(*clients)


async def _client(
    client: httpx.AsyncClient, model: str, end: float, seen: Seen, chance: random.Random
) -> None:
    while time.monotonic() < end:
        outcome = await _one(client, model, seen, chance)
        seen.outcomes[outcome] += 1
        if outcome in ("lost", "503"):
            await asyncio.sleep(1)


async def _one(client: httpx.AsyncClient, model: str, seen: Seen, chance: random.Random) -> str:
    """One request; what became of it."""
    words = " ".join(
        chance.choice(("ship", "sea", "light", "stone")) for _ in range(chance.randint(1, LONGEST_PROMPT))
    )
    streams = chance.random() < 0.8
    leave_s = chance.uniform(0, 20) if chance.random() < DROPPING else None
    body = {"model": model, "messages": [{"role": "user", "content": words}], "stream": streams}
    body |= {"max_tokens": chance.randint(1, LONGEST_ANSWER), "ignore_eos": True}
    lines: list[str] = []
    try:
        async with asyncio.timeout(leave_s), client.stream("POST", "/chat/completions", json=body) as answer:
            request = answer.headers.get("x-request-id", "")
            try:
                async for line in answer.aiter_lines():
                    lines.append(line)
            except asyncio.CancelledError:
                seen.left[request] = (sum(map(_has_token, lines)), body["max_tokens"])
                raise
    except TimeoutError:
        return "left"
    except httpx.HTTPError:
        return "lost"
    if answer.status_code != httpx.codes.OK:
        return str(answer.status_code)
    said = [line.removeprefix("data: ") for line in lines if line and line != "data: [DONE]"]
    if not said or '"error"' in said[-1][:9]:
        return "lost"
    seen.bills[request] = json.loads(said[-1])["usage"]["fulmen"]["cost"]
    return "done"


def _has_token(line: str) -> bool:
    """Whether a line of a stream brings some of the answer: at least one token."""
    if not line.startswith("data: {"):
        return False
    choices = json.loads(line.removeprefix("data: ")).get("choices")
    return bool(choices and choices[0]["delta"].get("content"))


async def _after(server: Served, key: str) -> list[str]:
    """Wait until the engine is back and all is quiet; what is wrong then."""
    deadline, said = time.monotonic() + AFTERWARDS_S, ["the engine did not come back"]
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {key}"}, timeout=60) as client:
        while said and time.monotonic() < deadline:
            await asyncio.sleep(1)
            if (await client.get(f"{server.url}/health")).status_code == httpx.codes.OK:
                gateway = (await client.get(f"{server.url}/metrics")).text
                way = httpx.AsyncHTTPTransport(uds=server.engine_socket())
                async with httpx.AsyncClient(transport=way, timeout=60) as beside:
                    engine = (await beside.get("http://engine/metrics")).text
                left = _gauges(gateway, "fulmen_open_requests") | _gauges(engine, "vllm:num_requests_")
                said = [f"{name} is {value:g} at the end" for name, value in left.items() if value]
        body = {
            "model": "deepseek-chat",
            "messages": [{"role": "user", "content": "Still there?"}],
            "max_tokens": 4,
        }
        last = await client.post(f"{server.url}/chat/completions", json=body)
    return said if last.status_code == httpx.codes.OK else [*said, f"the last answer was {last.status_code}"]


def _gauges(text: str, name: str) -> dict[str, float]:
    lines = [line.rpartition(" ") for line in text.splitlines() if line.startswith(name)]
    return {line: float(value) for line, _, value in lines}


def _check_books(ledger: Path, seen: Seen, balance: Decimal | None) -> list[str]:
    with sqlite3.connect(ledger) as connection:
        rows = connection.execute("select id, state, outcome, charge, output from requests").fetchall()
    problems = [f"{row[0]} is {row[1]}" for row in rows if row[1] != "settled"]
    charges = {row[0]: Decimal(row[3] or 0).scaleb(-9) for row in rows}
    problems += [
        f"{request}: billed {cost}, charged {charges.get(request)}"
        for request, cost in seen.bills.items()
        if charges.get(request) != Decimal(cost)
    ]
    if balance != DEPOSIT - sum(charges.values()):
        problems.append(f"balance {balance} is not {DEPOSIT} less {sum(charges.values())}")
    print(json.dumps({"ledger": Counter(row[2] for row in rows), "charged": str(sum(charges.values()))}))
    return problems + _check_leavers(seen, {row[0]: row[4] for row in rows})


def _check_leavers(seen: Seen, outputs: dict[str, int]) -> list[str]:
    """Who left pays for all that came and for no more than was asked for."""
    problems, beyond = [], []
    for request, (came, asked) in seen.left.items():
        charged = outputs.get(request, 0)
        beyond.append(charged - came)
        if not came <= charged <= asked:
            problems.append(f"{request}: {came} tokens came of {asked}, {charged} were charged")
    if beyond:
        shown = {"requests": len(beyond), "median": median(beyond), "most": max(beyond)}
        print(json.dumps({"charged beyond what leavers saw, in tokens": shown}))
    return problems


if __name__ == "__main__":
    app()
