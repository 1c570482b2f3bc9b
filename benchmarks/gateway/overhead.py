"""What the gateway adds to the time to first token: each question is asked of the engine and of the gateway.

    python -m benchmarks.gateway.overhead out/smollm2-135m-dsa --pairs 300

The two take turns and who is first alternates. Prints milliseconds, median and 99th percentile of both and of
the differences between their percentiles, as JSON.
"""

import json
import random
import time
from pathlib import Path
from statistics import quantiles

import httpx
import typer

from benchmarks.gateway.served import served


def main(model_dir: Path, pairs: int = 300, words: int = 40, warm: int = 20, seed: int = 0) -> None:
    """Measure and print."""
    chance = random.Random(seed)
    times: dict[str, list[float]] = {"engine": [], "gateway": []}
    with served(model_dir) as server:
        key = {"authorization": f"Bearer {server.engine_key()}"}
        clients = {
            "engine": httpx.Client(
                base_url="http://engine/v1",
                transport=httpx.HTTPTransport(uds=server.engine_socket()),
                headers=key,
                timeout=60,
            ),
            "gateway": httpx.Client(base_url=server.url, timeout=60),
        }
        model = clients["gateway"].get("/models").json()["data"][0]["id"]
        for pair in range(warm + pairs):
            text = " ".join(chance.choice(("ship", "sea", "light", "stone")) for _ in range(words))
            for name in sorted(clients, reverse=bool(pair % 2)):
                seconds = first_token_s(clients[name], model, text)
                if pair >= warm:
                    times[name].append(1000 * seconds)
    cuts = {name: quantiles(found, n=100) for name, found in times.items()}
    shown = {name: {"median": cut[49], "p99": cut[98]} for name, cut in cuts.items()}
    shown["added"] = {kind: shown["gateway"][kind] - shown["engine"][kind] for kind in ("median", "p99")}
    print(
        json.dumps({name: {k: round(v, 2) for k, v in row.items()} for name, row in shown.items()}, indent=1)
    )


def first_token_s(client: httpx.Client, model: str, text: str) -> float:
    """Seconds from asking to the first piece of the answer; the rest is read and left out."""
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 2, "stream": True}
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    started, first = time.perf_counter(), 0.0
    with client.stream("POST", "/chat/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: ") and not first:
                first = time.perf_counter() - started
        answer.raise_for_status()
    return first


if __name__ == "__main__":
    typer.run(main)
