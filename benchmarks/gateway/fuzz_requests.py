"""Requests made up to break a gateway: odd schemas, halves of characters, headers, numbers, bodies that lie.

Each comes from a seed alone, so that it can be asked again: `make_request(random.Random("SEED:N"), MODEL)`.
"""

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES, COUNT = "/anthropic/v1/messages", "/anthropic/v1/messages/count_tokens"
TEXTS = (
    "ship",
    "",
    "a" * 3000,
    "\x00",
    "😀 ﷽ e\u0301",
    "\ud83d",
    "\udc00x",
    "<|im_end|>",
    "</tool_call>",
    "{{ 7 * 7 }}",
)
NUMBERS = (
    0,
    1,
    -1,
    2,
    5,
    0.5,
    -0.5,
    1e-320,
    1e300,
    2**31,
    2**63,
    2**64,
    -(2**70),
    10**400,
    math.inf,
    math.nan,
)
ODD: tuple[Any, ...] = (None, True, "x", [], {}, [[]], {"a": None}, *NUMBERS)
PATTERNS = (
    "^a{1,5}$", "^(.{0,6000})(.{0,6001})$", "(a+)+b", "(", "[", "\\p{L}+", "^(?=a)b$", "a{99999}",
    "(?<x>y)\\k<x>", "[\ud800-\udfff]", "\\1", "^$", ".*" * 50, "((a|b){0,300}){0,300}",
)  # fmt: skip
FORMATS = ("date", "uuid", "email", "ipv4", "nonsense")


@dataclass(frozen=True)
class Made:
    """One request.

    Attributes:
        kind: what is odd about it.
        fields: of its head, as bytes; Host and, if there is a body, its length come on top.
        leave_s: seconds after which the client leaves; None: it stays to the end.
        raw: sent as it is in place of head and body.
    """

    kind: str
    path: str = CHAT
    method: str = "POST"
    fields: tuple[tuple[bytes, bytes], ...] = ((b"Content-Type", b"application/json"),)
    body: bytes = b""
    leave_s: float | None = None
    raw: bytes | None = None


def make_request(chance: random.Random, model: str) -> Made:
    """One request of any kind."""
    return chance.choice(KINDS)(chance, model)


def _dump(body: Any) -> bytes:
    return json.dumps(body).encode()


def _base(chance: random.Random, model: str, path: str | None = None) -> tuple[str, dict[str, Any]]:
    """A request that could be answered, at one of the endpoints."""
    path = path or chance.choice((CHAT, CHAT, CHAT, COMPLETIONS, RESPONSES, MESSAGES, COUNT))
    text = "What is the ship called?"
    body: dict[str, Any] = {"model": model}
    if path != COUNT:
        body |= {"max_output_tokens" if path == RESPONSES else "max_tokens": chance.randint(1, 4)}
        body |= {"stream": chance.random() < 0.5}
    if path == COMPLETIONS:
        return path, body | {"prompt": text}
    if path == RESPONSES:
        return path, body | {"input": chance.choice((text, [{"role": "user", "content": text}]))}
    return path, body | {"messages": [{"role": "user", "content": text}]}


def plain(chance: random.Random, model: str) -> Made:
    path, body = _base(chance, model)
    return Made("plain", path, body=_dump(body))


def leaving(chance: random.Random, model: str) -> Made:
    path, body = _base(chance, model)
    asked = "max_output_tokens" if path == RESPONSES else "max_tokens"
    body |= {"ignore_eos": True} if path == COUNT else {asked: 4000, "ignore_eos": True}
    return Made("leaving", path, body=_dump(body), leave_s=chance.uniform(0, 1))


def numbers(chance: random.Random, model: str) -> Made:
    path, body = _base(chance, model)
    names = (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "n",
        "max_tokens",
        "max_output_tokens",
        "logprobs",
    )
    names += ("top_logprobs", "presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens")
    for name in chance.sample(names, chance.randint(1, 3)):
        value = chance.choice(NUMBERS)
        # What would only be long in coming is another kind's.
        body[name] = 3 if name in ("n", "max_tokens", "max_output_tokens") and 5 < value < 2**31 else value
    if chance.random() < 0.3:
        body["logit_bias"] = {chance.choice(("5", "-1", "x", "99999999", "1e3")): chance.choice(NUMBERS)}
    if path == COMPLETIONS and chance.random() < 0.4:
        body["prompt"] = [chance.choice(NUMBERS) for _ in range(chance.randint(0, 4))]
    return Made("numbers", path, body=_dump(body))


def strings(chance: random.Random, model: str) -> Made:
    path, body = _base(chance, model)
    for _ in range(chance.randint(1, 3)):
        text = chance.choice(TEXTS)
        change: dict[str, Any] = chance.choice((
            {"model": text}, {"stop": [text]}, {"stop": text}, {"user": text}, {"metadata": {text: text}},
            {"prompt": text}, {"suffix": text}, {"input": text}, {"instructions": text}, {"system": text},
            {"messages": [{"role": "user", "content": text}]},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": text}], "name": text}]},
            {"messages": [{"role": "assistant", "content": text, "prefix": True}]},
            {"messages": [{"role": "tool", "content": text, "tool_call_id": text}]},
            {"stop_sequences": [text]}, {text: text}, {"tool_choice": text},
        ))  # fmt: skip
        body |= change
    return Made("strings", path, body=_dump(body))


def schema_of(chance: random.Random, depth: int = 0) -> Any:
    """A JSON schema, more or less."""
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: {"type": "string", "pattern": chance.choice(PATTERNS)},
        lambda: {"type": "string", "format": chance.choice(FORMATS), "maxLength": chance.choice(NUMBERS)},
        lambda: {
            "type": "string",
            "minLength": chance.choice((0, 5, 5000)),
            "maxLength": chance.choice((3, 10**6)),
        },
        lambda: {"type": "integer", "minimum": chance.choice(NUMBERS), "maximum": chance.choice(NUMBERS)},
        lambda: {"type": "number", "multipleOf": chance.choice(NUMBERS)},
        lambda: {"enum": [chance.choice((*ODD, *TEXTS)) for _ in range(chance.choice((0, 1, 3, 300)))]},
        lambda: {"const": chance.choice(TEXTS)},
        lambda: {
            "type": chance.choice(("boolean", "null", "array", "object", "nothing", ["string", "null"]))
        },
        lambda: {"$ref": chance.choice(("#", "#/$defs/a", "#/nowhere", "http://localhost/x.json"))},
        lambda: chance.choice(ODD),
    )
    if depth > 3 or chance.random() < 0.4:
        return chance.choice(kinds)()
    inner = [schema_of(chance, depth + 1) for _ in range(chance.choice((1, 2, 3)))]
    names = [chance.choice((f"p{i}", f"p{i}", chance.choice(TEXTS))) for i in range(len(inner))]
    nested: tuple[Callable[[], Any], ...] = (
        lambda: {"type": "object", "properties": dict(zip(names, inner, strict=True)), "required": names},
        lambda: {
            "type": "object",
            "properties": {f"p{i}": {} for i in range(chance.choice((10, 400, 6000)))},
        },
        lambda: {"type": "array", "items": inner[0], "minItems": chance.choice((0, 3, 10**5))},
        lambda: {"type": "array", "prefixItems": inner, "maxItems": chance.choice((1, 10**6))},
        lambda: {chance.choice(("anyOf", "oneOf", "allOf")): inner},
        lambda: {"type": "object", "patternProperties": {chance.choice(PATTERNS): inner[0]}},
        lambda: {"type": "object", "additionalProperties": inner[0], "$defs": {"a": inner[-1]}},
        lambda: {"not": inner[0]},
        lambda: {"if": inner[0], "then": inner[-1]},
    )
    return chance.choice(nested)()


def schemas(chance: random.Random, model: str) -> Made:
    path, body = _base(chance, model, chance.choice((CHAT, CHAT, RESPONSES, MESSAGES)))
    schema, strict = schema_of(chance), chance.choice((None, True, False))
    name = chance.choice(("get", "get", "get", "no spaces", "a" * 200, chance.choice(TEXTS)))
    if chance.random() < 0.2:
        for _ in range(chance.choice((50, 250, 2000))):
            schema = {"type": "array", "items": schema}
    if path == MESSAGES:
        body["tools"] = [{"name": name, "input_schema": schema}]
        body["tool_choice"] = chance.choice(
            ({"type": "any"}, {"type": "tool", "name": name}, {"type": "auto"})
        )
    elif path == RESPONSES and chance.random() < 0.5:
        body["text"] = {"format": {"type": "json_schema", "name": name, "schema": schema, "strict": strict}}
    elif path == RESPONSES:
        body["tools"] = [{"type": "function", "name": name, "parameters": schema, "strict": strict}]
        body["tool_choice"] = chance.choice(("auto", "required", {"type": "function", "name": name}))
    elif chance.random() < 0.6:
        wanted = {"name": name, "schema": schema, "strict": strict}
        body["response_format"] = {"type": "json_schema", "json_schema": wanted}
    else:
        body["tools"] = [
            {"type": "function", "function": {"name": name, "parameters": schema, "strict": strict}}
        ]
        named = {"type": "function", "function": {"name": name}}
        body["tool_choice"] = chance.choice(("auto", "required", "none", named))
    try:
        sent = _dump(body)
    except RecursionError:
        sent = b"[" * 3000
    return Made("schemas", path, body=sent, leave_s=chance.choice((None, None, 0.05)))


def shapes(chance: random.Random, model: str) -> Made:
    """Values of the wrong type anywhere."""
    path, body = _base(chance, model)
    names = (
        "messages",
        "prompt",
        "input",
        "stream",
        "stream_options",
        "response_format",
        "tools",
        "tool_choice",
    )
    names += (
        "thinking",
        "reasoning",
        "reasoning_effort",
        "text",
        "system",
        "logit_bias",
        "stop",
        "model",
        "suffix",
    )
    for name in chance.sample(names, chance.randint(1, 2)):
        value: Any = chance.choice(ODD)
        body[name] = chance.choice(
            (value, [value], {"type": value}, {"role": "user", "content": value}, [{"a": value}])
        )
    if chance.random() < 0.3:
        body["messages"] = [
            {"role": chance.choice(("user", "system", "x", None)), "content": chance.choice(ODD)}
        ]
    return Made("shapes", path, body=_dump(body))


def bodies(chance: random.Random, model: str) -> Made:
    """Bytes that are no JSON any more, or hardly."""
    path, body = _base(chance, model)
    sent = bytearray(_dump(body))
    for _ in range(chance.randint(1, 5)):
        place = chance.randrange(len(sent))
        cut = chance.choice(
            (b"", b"\xff", b"\xed\xa0\x80", b"\\u", b"\\ud800", b"NaN", b"[" * 500, b"1e999", b"\x00")
        )
        sent[place : place + chance.randint(0, 4)] = cut
    whole = chance.choice(
        (bytes(sent), bytes(sent), b"", b"null", b"[]", b"{" * 5000, b"[" + b"[]," * 200_000 + b"[]]")
    )
    # Some ask for an answer of any length now.
    return Made("bodies", path, body=whole, leave_s=10.0)


def fields(chance: random.Random, model: str) -> Made:
    """Odd heads that are still HTTP."""
    path, body = _base(chance, model)
    value = chance.choice(
        (b"", b"\xff\xfe", b"a" * 9000, b"1, 2", b"\xf0\x9f\x98\x80", b"0", b"gzip", b"*/*;q=\x80")
    )
    names = (
        b"Content-Type",
        b"Content-Encoding",
        b"Accept",
        b"Authorization",
        b"x-api-key",
        b"Cookie",
        b"Expect",
    )
    names += (
        b"X-Request-Id",
        b"X-Forwarded-For",
        b"Connection",
        b"Upgrade",
        b"anthropic-version",
        b"Range",
        b"TE",
    )
    head = [(chance.choice(names), value) for _ in range(chance.choice((1, 2, 90)))]
    if chance.random() < 0.7:
        head.append((b"Content-Type", b"application/json"))
    return Made("fields", path, fields=tuple(head), body=_dump(body))


def paths(chance: random.Random, model: str) -> Made:
    whole = (
        "/v1/models/%ED%A0%80",
        "/v1/models/" + "a" * 5000,
        "/%",
        "/%zz",
        "/..%2f..%2fetc/passwd",
        "//v1/models",
    )
    whole += (
        "/v1/models?after_id=%ff&limit=-1",
        "/user/balance?x=\xff",
        "/openapi.json",
        "/metrics",
        "/fulmen/info",
    )
    whole += (
        "/v1/responses/resp_1",
        "/invocations",
        "/tokenize",
        "/docs",
        "/v1/models/" + model,
        "*",
        "http://x/",
    )
    method = chance.choice(("GET", "GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE"))
    return Made("paths", chance.choice(whole), method)


def wire(chance: random.Random, model: str) -> Made:
    """What is no request, or two."""
    path, body = _base(chance, model)
    sent = _dump(body)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
    length = b"Content-Length: %d\r\n" % len(sent)
    raw = chance.choice((
        head + length + length + b"\r\n" + sent,
        head + length + b"Transfer-Encoding: chunked\r\n\r\n" + sent,
        head + b"Content-Length: -1\r\n\r\n" + sent,
        head + b"Content-Length: 999999999999999999999999\r\n\r\n" + sent,
        head + b"Content-Length: 99999999\r\n\r\n" + sent,
        head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(sent) + sent + b"\r\n0\r\n\r\n",
        head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + sent,
        head + b"X: " + b"a" * 200_000,
        head + b"".join(b"X-%d: a\r\n" % i for i in range(500)) + b"\r\n",
        head.replace(b"HTTP/1.1", b"HTTP/1.0") + length + b"\r\n" + sent,
        head.replace(b"localhost", b"evil.example") + length + b"\r\n" + sent,
        head + b"Connection: Upgrade\r\nUpgrade: websocket\r\n" + length + b"\r\n" + sent,
        (head + length + b"\r\n" + sent) * 3,
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        chance.randbytes(300),
        (head + length + b"\r\n" + sent)[: chance.randint(1, 200)],
    ))  # fmt: skip
    return Made("wire", raw=raw, leave_s=1.0)


KINDS = (plain, leaving, numbers, strings, schemas, schemas, schemas, shapes, bodies, fields, paths, wire)
