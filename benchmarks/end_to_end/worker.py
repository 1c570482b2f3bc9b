"""One engine of the benchmark in a process of its own, which may be that of another interpreter.

    python worker.py SETTINGS

SETTINGS is JSON and names the engine. The process writes one JSON line when the engine is ready (its
versions) and one for every job that it reads: `["prefill", [1, 2, 3]]` calls that method of the engine. What
libraries print goes to stderr.
"""

import json
import os
import sys
from importlib import import_module

ENGINES = {"vllm": "vllm_engine", "transformers": "transformers_engine", "llama.cpp": "llama_engine"}


def main() -> None:
    settings = json.loads(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine = import_module(ENGINES[settings["engine"]]).Engine(settings)
    print(json.dumps(engine.versions), file=replies)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(engine, name)(*arguments)), file=replies)
    # vLLM's own leave-taking can take minutes.
    os._exit(0)


if __name__ == "__main__":
    main()
