"""The process that compiles schemas to see what becomes of them: `python -m ... MODEL TOKENS SECONDS`.

SECONDS of CPU time are what all schemas of a request may take. It compiles nothing itself. Per line on
stdin, a JSON list of schemas, it forks: the child compiles them as the engine would, under limits of the
kernel, writes one line with its verdict and ends. So whatever a schema does, it does to a process that is
thrown away, and the next one starts from the same clean state.

On stdout, per request: the child's id, the schema it is at, its verdict, unless it was killed; then "ended".
The child is collected at the next line, an empty one: until then its id is nobody else's, so that the caller
may kill it.
"""

import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import xgrammar
from transformers import PreTrainedTokenizerFast

# CPU seconds: of turning a schema into rules, which vLLM does before it serves anybody else, and of choosing
# one token's mask, which its other requests wait for too.
CONVERT_S, MASK_S = 0.2, 0.1
MEMORY_BYTES = 2**30
# So many tokens of a made-up answer are tried.
STEPS = 32


def verdict(schemas: list[Any], info: xgrammar.TokenizerInfo) -> tuple[int, str] | None:
    """The place of the first schema that an engine should not be given, and why; None if all are sound."""
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    for place, schema in enumerate(schemas):
        _say({"at": place})
        text, started = json.dumps(schema), time.process_time()
        try:
            xgrammar.Grammar.from_json_schema(text)
            if time.process_time() - started > CONVERT_S:
                return place, f"takes more than {CONVERT_S} s to turn into a grammar; make it smaller"
            compiled = compiler.compile_json_schema(text)
        except Exception as error:
            return place, f"cannot be enforced: {_first_words(error)}"
        if why := _walk(compiled, info):
            return place, why
    return None


def _walk(compiled: xgrammar.CompiledGrammar, info: xgrammar.TokenizerInfo) -> str | None:
    """What is wrong with a made-up answer; None if it can be written."""
    dice, matcher = random.Random(0), xgrammar.GrammarMatcher(compiled)
    mask = xgrammar.allocate_token_bitmask(1, info.vocab_size)
    for _ in range(STEPS):
        started = time.process_time()
        matcher.fill_next_token_bitmask(mask, 0)
        if time.process_time() - started > MASK_S:
            return f"takes more than {MASK_S} s for a token; make its patterns simpler"
        bits = np.unpackbits(mask.numpy().view(np.uint8), bitorder="little")[: info.vocab_size]
        allowed = np.flatnonzero(bits)
        if not len(allowed):
            return "has no answer that meets it"
        if not matcher.accept_token(int(dice.choice(allowed))) or matcher.is_terminated():
            break
    return None


def _first_words(error: Exception) -> str:
    """XGrammar's reason without the place in its own source."""
    return str(error).strip().rpartition(": ")[2][:200] or type(error).__name__


def _check(line: bytes, info: xgrammar.TokenizerInfo, seconds: float) -> None:
    """In the child: its id, limits, then the verdict."""
    _say(os.getpid())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES,) * 2)
    # Ends the process, whatever its threads are at.
    signal.setitimer(signal.ITIMER_PROF, seconds)
    found = verdict(json.loads(line), info)
    _say({"sound": True} if found is None else {"at": found[0], "why": found[1]})


def _say(word: Any) -> None:
    """One line; short enough to arrive whole."""
    os.write(sys.stdout.fileno(), json.dumps(word).encode() + b"\n")


def main(model: str, tokens: str, seconds: str) -> None:
    """Serve until stdin ends."""
    # Ctrl-C is for the gateway, which closes stdin.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{model}/tokenizer.json")
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=int(tokens))
    for line in sys.stdin.buffer:
        child = os.fork()
        if child == 0:
            try:
                _check(line, info, float(seconds))
            finally:
                os._exit(0)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        _say("ended")
        sys.stdin.buffer.readline()
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
