"""A chat server that writes by a function of the request, as many at a time as are asked; and proofs for it.

with ProofServer(honest) as server: server.url, server.requests
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from fulmen.tasks.proofs.labelled import KINDS
from fulmen.tasks.proofs.proof import examined
from fulmen.tasks.proofs.replies import lenient_steps, truth_of


class ProofServer(ThreadingHTTPServer):
    """write: (text asked, seed) -> the reply, or None: the server is down."""

    daemon_threads = True

    def __init__(self, write):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.write, self.requests = write, []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        self._thread.start()

    def __exit__(self, *args):
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: ProofServer

    def log_message(self, format, *args):
        """Tests print nothing."""

    def do_GET(self):
        self._send(200, {"data": [{"id": "tiny"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        text = self.server.write(body["messages"][0]["content"], body["seed"])
        if text is None:
            self._send(500, {"error": {"message": "out of memory"}})
        else:
            self._send(200, {"choices": [{"message": {"role": "assistant", "content": text}}]})

    def _send(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def parts_of(asked):
    """Problem and proof of a request to verify."""
    problem, proof = asked.split("\nProblem:\n")[1].split("\n\nProof:\n")
    return problem, proof.split("\n\nAnswer in this form")[0]


def kind_of(problem):
    name = "equations" if "Solve for x" in problem else "logic" if "Premises" in problem else "words"
    return KINDS[name]


def truth(problem, proof):
    """The right assessment, by machine."""
    return truth_of(examined(kind_of(problem), problem, lenient_steps(proof)))


def honest(asked, seed):
    """A verifier that checks."""
    return str(truth(*parts_of(asked)))
