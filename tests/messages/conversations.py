"""Conversations drawn by chance: turns of users, steps of tool calls with results, answers."""

import json
import string
from random import Random

LETTERS = string.ascii_letters + string.digits + " \n\t\"'\\{}[]<>&,:/äß漢字🙂 "
NAMES = ("search", "open", "run_code", "get_weather")
KEYS = ("query", "path", "n", "options", "größe", "a b")


def words(draw: Random, least: int = 0) -> str:
    """A text of at least so many characters."""
    return "".join(draw.choices(LETTERS, k=draw.randint(least, 30)))


def value(draw: Random, depth: int = 2):
    """Anything that JSON has."""
    plain = [words(draw), draw.randint(-(10**20), 10**20), draw.random() * 1e9, True, False, None]
    if depth and draw.random() < 0.4:
        return draw.choice(
            [
                [value(draw, depth - 1) for _ in range(draw.randint(0, 3))],
                {words(draw): value(draw, depth - 1) for _ in range(draw.randint(0, 3))},
            ]
        )
    return draw.choice(plain)


def arguments(draw: Random) -> dict:
    """Of one call."""
    return {key: value(draw) for key in draw.sample(KEYS, draw.randint(0, 4))}


def step(draw: Random, number: int) -> list[dict]:
    """A message with one to three calls, and their results in order."""
    calls = [
        {
            "id": f"id-{number}-{place}",
            "type": "function",
            "function": {
                "name": draw.choice(NAMES),
                "arguments": json.dumps(arguments(draw), ensure_ascii=draw.random() < 0.5),
            },
        }
        for place in range(draw.choice((1, 1, 2, 3)))
    ]
    said = {
        "role": "assistant",
        "content": words(draw),
        "reasoning_content": words(draw),
        "tool_calls": calls,
    }
    results = [{"role": "tool", "tool_call_id": call["id"], "content": words(draw)} for call in calls]
    return [said, *results]


def conversation(draw: Random, turns: int = 3, steps: int = 5) -> list[dict]:
    """Up to where the model goes on: behind a user's message, or behind results."""
    messages = [{"role": "system", "content": words(draw)}] if draw.random() < 0.7 else []
    count = draw.randint(1, turns)
    for turn in range(count):
        messages.append({"role": "user", "content": words(draw, 1)})
        for number in range(draw.randint(0, steps)):
            messages += step(draw, 100 * turn + number)
        if turn < count - 1:
            messages.append({"role": "assistant", "content": words(draw), "reasoning_content": words(draw)})
    return messages


def tools(draw: Random) -> list[dict]:
    """Offered to the model."""
    schema = {"type": "object", "properties": {key: {"type": "string"} for key in KEYS}}
    return [
        {"type": "function", "function": {"name": name, "description": words(draw), "parameters": schema}}
        for name in draw.sample(NAMES, draw.randint(1, 3))
    ]
