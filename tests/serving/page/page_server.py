"""A small HTTP server that speaks the gateway's contract and answers from a script, to test the page against.

    with PageServer() as server: server.url, server.release, server.dropped, server.requests, server.questions

The last line of a message chooses the answer: "fail 402" an error, "html" markup, "code" a fenced block,
"hold" one whose second half waits for `release`, "cut" the same within a letter, "break" one that ends too
early, "long" many lines; all else a few words. A question about documents chooses alike: "fail 402", "hold",
"break", "error" one that comes after a step.
"""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fulmen.serving.page import FILES, HEADERS

MODEL = "smollm2-135m-dsa"
CONTEXT = 8192
MAX_BODY_BYTES = 3 * 2**20
TOPK = 512
PRICES = {"hit": "0.2", "miss": "2", "output": "3"}
DENSE_PRICES = {"hit": "0.5", "miss": "4", "output": "12"}
HTML = "<img src=x onerror=\"document.title='owned'\"><b>bold</b> & <script>document.title='owned'</script>"
CODE = "Here it is:\n\n```python\ndef f(x):\n    return  x < 1 or '<b>x</b>'\n```\n\nThat is all."
ANSWERS = {
    "html": [HTML],
    "code": [CODE[i : i + 7] for i in range(0, len(CODE), 7)],
    "hold": ["The first half, ", "and the second."],
    "cut": ["Whole, ", "cut in an ü."],
    "break": ["It began "],
    "long": [f"Line {i} of an answer that is longer than the window.\n" for i in range(120)],
}
SECONDS = 20.0
DOCUMENTS = {"folder": "harbour", "count": 3}
BEFORE, QUOTE, AFTER = "A line.\n" * 60, f"counts {HTML}\nships", "\nAnother line." * 60
CITATION = {
    "file": "a/guide.md",
    "span": {"first_line": 61, "last_line": 62, "first_character": 480, "end_character": 600},
    "quote": QUOTE,
    "before": BEFORE,
    "after": AFTER,
}


def info() -> dict[str, Any]:
    return {
        "model": MODEL,
        "context": CONTEXT,
        "max_body_bytes": MAX_BODY_BYTES,
        "needs_key": True,
        "currency": "CNY",
        "prices": PRICES,
        "dense_prices": DENSE_PRICES,
        "documents": DOCUMENTS,
        "dsa": {"topk": TOPK, "layers": 30, "kv_bytes_per_token": 23040, "index_bytes_per_token": 4500},
    }


def usage(messages: list[dict[str, str]], output: int) -> dict[str, Any]:
    """A usage whose figures all differ and add up as the contract says; a token is four characters here."""
    lengths = [len(message["content"]) // 4 + 1 for message in messages]
    hit, miss = sum(lengths[:-1]), lengths[-1]
    positions = range(hit, hit + miss + output)
    dense_reads, dsa_reads = sum(positions), sum(min(TOPK, position) for position in positions)
    cost, dense_cost = (
        (hit * float(rates["hit"]) + miss * float(rates["miss"]) + output * float(rates["output"])) / 1e6
        for rates in (PRICES, DENSE_PRICES)
    )
    return {
        "prompt_tokens": hit + miss,
        "completion_tokens": output,
        "total_tokens": hit + miss + output,
        "prompt_cache_hit_tokens": hit,
        "prompt_cache_miss_tokens": miss,
        "prompt_tokens_details": {"cached_tokens": hit},
        "fulmen": {
            "cost": f"{cost:.7f}",
            "dense_cost": f"{dense_cost:.7f}",
            "currency": "CNY",
            "context_tokens": dense_reads,
            "tokens_read": dsa_reads,
            "bytes_saved": (dense_reads - dsa_reads) * 768,
        },
    }


def bill(requests: int) -> dict[str, Any]:
    """A question's bill after so many requests."""
    hit, miss, output = 600 * requests, 400 * requests, 10 * requests
    return {
        "usage": {
            "requests": requests,
            "prompt_cache_hit_tokens": hit,
            "prompt_cache_miss_tokens": miss,
            "completion_tokens": output,
        },
        "cost": {
            "amount": f"{0.0005 * requests:.4f}" if requests else None,
            "currency": "CNY",
            "dense_amount": f"{0.002 * requests:.3f}" if requests else None,
            "deepseek_list": {"amount": f"{0.00095 * requests:.5f}", "currency": "CNY"},
        },
    }


def step(number: int, tool: str | None, arguments: dict[str, Any], result: str) -> dict[str, Any]:
    """The event of a step."""
    made = {"tool": tool, "arguments": json.dumps(arguments), "result": result, "characters": 1234}
    return {"event": "step", "text": tool or result, **made, **bill(number)}


def question_events(script: str) -> list[dict[str, Any]]:
    """What happens for a question."""
    first = [
        {"event": "note", "text": "not read, hidden: 1 (.x)"},
        step(1, "search", {"query": "ships"}, "2 passages, best first"),
    ]
    if script == "break":
        return first
    if script == "error":
        return [
            *first,
            {"event": "error", "message": "no answer in 2 steps; ask otherwise", "param": None, **bill(2)},
        ]
    answer = {"answer": f"Forty-two {HTML}", "complete": True, "citations": [CITATION], "dropped": 1}
    return [
        *first,
        step(2, "open", {"path": "a/guide.md"}, f'<document 12 file="a/guide.md"> {HTML}'),
        {"event": "answer", **answer, "notes": [], **bill(3)},
    ]


class PageServer(ThreadingHTTPServer):
    """Serves the page at `url`. release: set it to let a held answer go on. dropped: the page hung up."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.release = threading.Event()
        self.dropped = threading.Event()
        self.requests: list[dict[str, Any]] = []
        self.questions: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,))
        self._thread.start()

    def __exit__(self, *args: object) -> None:
        self.release.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that closes its connection is no error here."""


class _Handler(BaseHTTPRequestHandler):
    server: PageServer

    def log_message(self, format: str, *args: object) -> None:
        """Tests print nothing."""

    def do_GET(self) -> None:
        if self.path == "/fulmen/info":
            self._send(200, "application/json", json.dumps(info()).encode())
        elif file := FILES.get(self.path):
            self._send(200, file.media_type, file.path.read_bytes())
        else:
            self._send(404, "application/json", b'{"error": {"message": "not here"}}')

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        is_question = self.path == "/fulmen/ask"
        (self.server.questions if is_question else self.server.requests).append(request)
        self.server.keys.append(self.headers["Authorization"])
        text = request["question"] if is_question else request["messages"][-1]["content"]
        script = text.split("\n")[-1]
        if script.startswith("fail "):
            error = {"error": {"message": "said by the server", "type": "x", "param": None, "code": "x"}}
            self._send(int(script.removeprefix("fail ")), "application/json", json.dumps(error).encode())
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for event in self._happens(script) if is_question else self._events(request, script):
                self.wfile.write(event)
                self.wfile.flush()
        except OSError:
            self.server.dropped.set()

    def _events(self, request: dict[str, Any], script: str) -> Iterator[bytes]:
        pieces = ANSWERS.get(script, ["An ", "answer ", "— ünïcode."])
        yield b": keep-alive\n\n"
        events = [
            _event([{"index": 0, "delta": {"content": text}, "finish_reason": None}]) for text in pieces
        ]
        if script == "hold":
            yield events.pop(0)
            yield from self._until_released()
        elif script == "cut":
            start, letter, end = b"".join(events).partition("ü".encode())
            yield start + letter[:1]
            self.server.release.wait(SECONDS)
            events = [letter[1:] + end]
        yield from events
        if script == "break":
            return
        yield _event([{"index": 0, "delta": {}, "finish_reason": "stop"}])
        yield _event([], usage=usage(request["messages"], len(pieces)))
        yield b"data: [DONE]\n\n"

    def _happens(self, script: str) -> Iterator[bytes]:
        yield b": keep-alive\n\n"
        events = [f"data: {json.dumps(event)}\n\n".encode() for event in question_events(script)]
        if script == "hold":
            yield events.pop(0) + events.pop(0)
            yield from self._until_released()
        yield from events

    def _until_released(self) -> Iterator[bytes]:
        """Keep-alives: the writes by which a server learns that nobody listens any more."""
        for _ in range(int(SECONDS / 0.02)):
            if self.server.release.wait(0.02):
                return
            yield b": keep-alive\n\n"

    def _send(self, status: int, media_type: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": media_type, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def _event(choices: list[dict[str, Any]], **more: Any) -> bytes:
    chunk = {"object": "chat.completion.chunk", "model": MODEL, "choices": choices, **more}
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()
