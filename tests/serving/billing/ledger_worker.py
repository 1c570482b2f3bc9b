"""A server's life without the model, as a process of its own: requests begin, stream, and are settled.

    python ledger_worker.py PLACE SERVER THREADS REQUESTS

`place` is a file, or a database URL. Prints "ready", waits for a line, then prints what a client could have
seen: `answered ID TOKENS` for tokens that it got while streaming, `charged ID UNITS` for what it was charged.
"""

import random
import sys
import threading
from pathlib import Path

from fulmen.serving.billing.ledger import Ledger
from fulmen.serving.billing.prices import DEFAULT_PRICES, Tokens, to_units

ACCOUNTS = ("alice", "bob", "carl")


def serve(ledger: Ledger, server: str, thread: int, count: int) -> None:
    """One client of a server, request after request."""
    chance = random.Random(f"{server}/{thread}")
    for place in range(count):
        request_id, prompt = f"{server}-{thread}-{place}", chance.randrange(2000)
        ledger.begin(request_id, chance.choice(ACCOUNTS), "tiny", "/v1/chat/completions")
        steps = chance.randrange(4)
        for output in range(1, steps + 1):
            ledger.progress(request_id, Tokens(0, prompt, output))
            say(f"answered {request_id} {prompt} {output}")
        charge = ledger.settle(request_id, Tokens(0, prompt, steps), "stop")
        say(f"charged {request_id} {to_units(charge)}")


def say(line: str) -> None:
    """Print a line whole, whatever other threads print."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run the threads to their end, or to the process's."""
    place, server, threads, count = sys.argv[1:]
    ledger = Ledger(place if "://" in place else Path(place), DEFAULT_PRICES, server)
    say("ready")
    sys.stdin.readline()
    running = [
        threading.Thread(target=serve, args=(ledger, server, thread, int(count)))
        for thread in range(int(threads))
    ]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


if __name__ == "__main__":
    main()
