"""Serve a converted model, ask it through OpenAI's client, and see what its prefix cache saved.

    python examples/serve_and_call.py out/smol
    python examples/serve_and_call.py --url http://127.0.0.1:8000      # of a server that runs already

Needs the extra serve-cpu (or serve, and vLLM), and openai.
"""

import argparse
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from openai import OpenAI


def main(model: str | None, url: str | None, key: str) -> None:
    """Ask twice: the second question reads the document from the cache."""
    with nothing_to_start(url) if url else started(model) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key=key)
        name = client.models.list().data[0].id
        document = "The keeper of the lighthouse writes down every ship that passes. " * 40
        for question in ("Who writes?", "What passes?"):
            messages = [{"role": "user", "content": f"{document}\n{question}"}]
            answer = client.chat.completions.create(model=name, messages=messages, max_tokens=16)
            usage = answer.usage
            print(f"{question} {answer.choices[0].message.content!r}")
            print(f"  {usage.prompt_tokens} tokens, {usage.prompt_cache_hit_tokens} of them from the cache")


@contextmanager
def started(model: str) -> Iterator[str]:
    """`fulmen serve` at a free port: its address, once it is ready; stopped at the end."""
    command = [sys.executable, "-m", "fulmen.cli.main", "serve", model, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield next(line.split()[-1] for line in process.stdout if "ready at " in line)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()


@contextmanager
def nothing_to_start(url: str) -> Iterator[str]:
    """A server that runs already."""
    yield url.rstrip("/")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="what fulmen.convert wrote")
    parser.add_argument("--url", help="of a server that runs already, instead")
    parser.add_argument("--key", default="any", help="an API key, if the server has some")
    asked = parser.parse_args()
    if (asked.model is None) == (asked.url is None):
        parser.error("give a model or --url")
    main(**vars(asked))
