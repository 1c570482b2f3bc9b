"""An endpoint asked over HTTP: a real server in a thread, with a real tiny model behind it."""

import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pydoc_data.topics import topics
from threading import Thread

import pytest

from fulmen.data import Document, draw_sequences
from fulmen.errors import ConfigError, EndpointError
from fulmen.evaluation.journal import Journal
from fulmen.evaluation.suites.endpoint import EndpointResponder
from fulmen.evaluation.suites.responders import LocalResponder
from fulmen.evaluation.suites.run import SuitePlan, run_suites
from tests.data.byte_tokenizer import byte_tokenizer
from tests.evaluation.suites.tiny_suites import tiny_llama

HELD_OUT = [Document(name, "prose", text) for name, text in topics.items() if len(text) > 12_000]
PLAN = SuitePlan(
    suites=("ruler", "generate"), lengths=(448,), samples=2, tasks=("niah_single", "niah_multivalue")
)


class Completions(BaseHTTPRequestHandler):
    """`GET /v1/models` and `POST /v1/completions`, by `generate`."""

    model, tokenizer = tiny_llama(), byte_tokenizer()

    def do_GET(self):
        self.reply(200, {"object": "list", "data": [{"id": "tiny"}, {"id": "other"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions" or asked["model"] != "tiny":
            self.reply(404, {"error": {"message": f"no {asked['model']} here"}})
            return
        assert asked["temperature"] == 0
        ids = self.tokenizer(asked["prompt"], return_tensors="pt")["input_ids"]
        written = self.model.generate(
            ids, max_new_tokens=asked["max_tokens"], do_sample=False, eos_token_id=None
        )
        self.reply(200, {"choices": [{"text": self.tokenizer.decode(written[0, ids.shape[1] :])}]})

    def reply(self, code, answer):
        body = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@contextmanager
def serving(handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def url():
    with serving(Completions) as address:
        yield address


def ascii_window(tokenizer):
    """A text of one byte a letter: it comes back from its tokens as it was."""
    return next(
        one
        for one in draw_sequences(HELD_OUT, tokenizer, 300, 4)
        if tokenizer.decode(one.input_ids).isascii()
    )


def test_it_writes_what_the_model_writes_here(url):
    tokenizer = byte_tokenizer()
    prompt_ids = ascii_window(tokenizer).input_ids
    here = LocalResponder(Completions.model, tokenizer).continue_text(prompt_ids, 12, "dense")
    there = EndpointResponder(url, "tiny", tokenizer).continue_text(prompt_ids, 12, "dense")
    assert tokenizer.decode(there) == tokenizer.decode(here)


def test_suites_run_through_it(url, tmp_path):
    tokenizer = byte_tokenizer()
    responder = EndpointResponder(f"{url}/", "tiny", tokenizer)
    report = run_suites(responder, tokenizer, HELD_OUT, PLAN, Journal(tmp_path / "samples.jsonl", {}))
    assert {cell["variant"] for cell in report.suites["ruler"]["cells"]} == {"dense"}
    assert report.suites["ruler"]["differences"] == []
    assert [row["texts"] for row in report.suites["generate"]["rows"]] == [2]
    assert len(report.sections()) == 2


@pytest.mark.parametrize("suite", ["keyloss", "short"])
def test_suites_that_need_logits_are_refused(url, suite, tmp_path):
    responder = EndpointResponder(url, "tiny", byte_tokenizer())
    plan, journal = (
        SuitePlan(suites=(suite,), lengths=(64,), samples=1),
        Journal(tmp_path / "samples.jsonl", {}),
    )
    with pytest.raises(ConfigError, match=f"suite='{suite}' needs the model's logits, which an endpoint"):
        run_suites(responder, responder.tokenizer, HELD_OUT, plan, journal)


def refusal(url, model="tiny"):
    with pytest.raises(EndpointError) as caught:
        EndpointResponder(url, model, byte_tokenizer()).continue_text(
            ascii_window(byte_tokenizer()).input_ids, 2, "dense"
        )
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_it_does_not_have(url):
    assert refusal(url, "big") == f"{url} has no model 'big'; it has tiny, other"


def test_what_the_server_says_is_passed_on(url):
    assert refusal(url, "other") == f"{url}/completions answered 404: no other here"


def test_addresses_that_cannot_be(url):
    assert "is no address; write it as http://" in refusal("localhost:8000")
    with serving(Completions) as closed:
        pass
    assert re.fullmatch(
        rf"{closed}/models cannot be reached \(.*refused.*\); is the server running\?", refusal(closed)
    )


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"data": []}'])
def test_other_servers(body):
    class Other(Completions):
        def reply(self, code, answer):
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with serving(Other) as address:
        assert re.search("no JSON; give the|no JSON object; give the|without choices", refusal(address))
