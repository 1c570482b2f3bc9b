"""A chat server that answers from a script: what a model may say, and how a server may fail.

    with ChatServer([say("Hello")]) as server: server.url, server.requests

A token is four characters here, and those with which an earlier prompt began are hits.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "tiny"


def say(text, **more):
    """A message in plain text."""
    return {"message": {"role": "assistant", "content": text}, "finish_reason": "stop", **more}


def call(*calls, finish_reason="tool_calls"):
    """A message with calls: (name, arguments); arguments that are text go as they are."""
    made = [
        {
            "id": f"call-{number}",
            "type": "function",
            "function": {"name": name, "arguments": said if isinstance(said, str) else json.dumps(said)},
        }
        for number, (name, said) in enumerate(calls)
    ]
    message = {"role": "assistant", "content": None, "tool_calls": made}
    return {"message": message, "finish_reason": finish_reason}


def answer(text, *quotes, **more):
    """The call that ends a question; quotes: (file, words)."""
    quoted = [{"file": file, "quote": words} for file, words in quotes]
    return call(("answer", {"quotes": quoted, "answer": text}), **more)


def fail(status, message="said by the server", **headers):
    """An error of the server."""
    return {"status": status, "error": message, "headers": headers}


# status: of the answer that breaks off.
BREAK_OFF = {"break_off": 200}


class ChatServer(ThreadingHTTPServer):
    """Serves at `url`; each request takes the next line of the script. context: what it tells of itself."""

    daemon_threads = True

    def __init__(self, script, context=32_768, is_priced=True, counts=True):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.script, self.context, self.is_priced, self.counts = list(script), context, is_priced, counts
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        self._thread.start()

    def __exit__(self, *args):
        self.shutdown()
        self._thread.join()
        self.server_close()

    def usage(self, output):
        """Of the newest request."""
        prompts = [json.dumps(request["messages"]) for request in self.requests]
        prompt = len(prompts[-1]) // 4 if self.counts else 7
        hit = max((_common(prompts[-1], other) // 4 for other in prompts[:-1]), default=0)
        used = {"prompt_tokens": prompt, "completion_tokens": output}
        if self.is_priced:
            used |= {"prompt_cache_hit_tokens": hit, "prompt_cache_miss_tokens": prompt - hit}
            used["fulmen"] = {"cost": "0.0005", "dense_cost": "0.002", "currency": "CNY"}
        return used


def _common(one, other):
    """Characters with which both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (left, right) in pairs if left != right), min(len(one), len(other)))


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def log_message(self, format, *args):
        """Tests print nothing."""

    def do_GET(self):
        entry = {"id": MODEL, "object": "model"}
        if self.server.context:
            entry["max_model_len"] = self.server.context
        known = self.path == "/v1/models"
        self._send(200 if known else 404, {"data": [entry]} if known else {"error": {"message": "not here"}})

    def do_POST(self):
        self.server.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.server.keys.append(self.headers["Authorization"])
        line = self.server.script.pop(0)
        if "break_off" in line:
            self.send_response(line["break_off"])
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices"')
            self.close_connection = True
        elif "body" in line:
            self._send_data(200, line["body"])
        elif "error" in line:
            self._send(line["status"], {"error": {"message": line["error"]}}, line["headers"])
        else:
            usage = self.server.usage(5)
            self._send(200, {"choices": [{"index": 0, **line}], "usage": usage})

    def _send(self, status, body, headers=()):
        self._send_data(status, json.dumps(body).encode(), headers)

    def _send_data(self, status, data, headers=()):
        self.send_response(status)
        for name, value in {**dict(headers), "Content-Length": str(len(data))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)
