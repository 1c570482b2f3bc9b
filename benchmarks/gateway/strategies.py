"""CPU time that a strategy adds to a request, at the gateway, while a conversation goes on step by step.

    python -m benchmarks.gateway.strategies out/smollm2-135m-dsa --messages 220

No engine runs: a history of so many messages, calls of tools and their results, is given first, then again
and again with a step more, each time read from JSON as a request is. Reading is not counted. The budget is
barely enough for what is kept, so that a strategy has something to do again and again. Prints milliseconds of
one core, the median and the largest, as JSON; `new` is the first request, all of whose messages are counted.
"""

import json
import random
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import typer

from fulmen.messages import strategies
from fulmen.messages.strategies import keep_newest
from fulmen.pipeline.model_config import read_config
from fulmen.serving.billing.accounts import Account
from fulmen.serving.engine.served_model import served_model
from fulmen.serving.gateway.context.managed_context import ManagedContexts, options_of
from fulmen.serving.gateway.context.message_tokens import MessageTokens
from fulmen.serving.gateway.dialects.requests import ChatRequest

STRATEGIES = ("summary", "discard_75", "discard_all", "keep_newest", "hierarchical")
WORDS = ("harbour", "sail", "north", "seven", "lamp")
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
ANYBODY = Account("anybody", None, "")


def main(model_dir: Path, messages: int = 220, words: int = 60, rounds: int = 20) -> None:
    """Measure and print."""
    model = served_model(model_dir, read_config(model_dir)[1])
    said = history(messages // 2 + rounds, words)
    count = MessageTokens(model).counter(TOOLS)
    shown = {}
    for name in STRATEGIES:
        # Barely enough, so that there is something to do again and again.
        least = max(
            count(one(said, 10**9, count, trigger=0)) for one in (getattr(strategies, name), keep_newest)
        )
        contexts = ManagedContexts(model, SimpleNamespace(context=int(1.05 * least)))  # type: ignore[arg-type]
        first, *others = [
            milliseconds(contexts, said[: 2 + messages + 2 * step], name) for step in range(rounds)
        ]
        contexts.close()
        shown[name] = {"median": median(others), "max": max(others), "new": first}
    print(
        json.dumps({name: {k: round(v, 2) for k, v in row.items()} for name, row in shown.items()}, indent=1)
    )


def history(steps: int, words: int) -> list[dict[str, Any]]:
    """A question, and so many calls with results of so many words."""
    draw = random.Random(0)
    said: list[dict[str, Any]] = [
        {"role": "system", "content": "Look it up."},
        {"role": "user", "content": "Where is it?"},
    ]
    for number in range(steps):
        function = {"name": "look", "arguments": json.dumps({"at": number})}
        call = {"id": f"c{number}", "type": "function", "function": function}
        said.append({"role": "assistant", "content": "", "tool_calls": [call]})
        text = " ".join(draw.choices(WORDS, k=words))
        said.append({"role": "tool", "tool_call_id": f"c{number}", "content": text})
    return said


def milliseconds(contexts: ManagedContexts, messages: list[dict[str, Any]], strategy: str) -> float:
    """CPU time of what a strategy does to a request."""
    asked = {"model": "any", "messages": messages, "tools": TOOLS, "fulmen_context": {"strategy": strategy}}
    request = ChatRequest.model_validate_json(json.dumps(asked))
    began = time.thread_time()
    options = options_of(request, ANYBODY)
    assert options is not None
    contexts.manage(request, ANYBODY, options)
    return 1000 * (time.thread_time() - began)


if __name__ == "__main__":
    typer.run(main)
