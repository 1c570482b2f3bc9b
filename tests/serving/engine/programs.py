"""In place of vLLM: small programs whose life as an engine can be watched."""

import os
import sys

SERVER = """
import sys, http.server, socketserver
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def address_string(self):
        return "somebody"
print("hello", flush=True)
socketserver.UnixStreamServer(sys.argv[1], Handler).serve_forever()
"""
# Two that outlive their parent's group and session.
CHILD = """
import subprocess
for _ in range(2):
    subprocess.Popen(["sleep", "600"], start_new_session=True)
"""


class Program:
    """In place of vLLM's settings: a program that gets the name of a socket."""

    def __init__(self, code):
        self._code = code

    def command(self, socket):
        return [sys.executable, "-c", self._code, str(socket)]

    def environment(self, folder):
        return dict(os.environ)
