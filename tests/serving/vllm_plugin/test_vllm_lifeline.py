"""A process of vLLM's that is left alone ends, if `fulmen serve` started its engine."""

import subprocess
import sys
from contextlib import suppress

import psutil
import pytest

from fulmen.serving.vllm_plugin.lifeline import KEPT

# Its child says its number, and goes on.
PARENT = """
import multiprocessing, os, time
from fulmen.serving.vllm_plugin.lifeline import end_with_parent

def child():
    end_with_parent()
    end_with_parent()
    print(os.getpid(), flush=True)
    time.sleep(600)

end_with_parent()
multiprocessing.get_context("fork").Process(target=child).start()
time.sleep(600)
"""


@pytest.mark.parametrize("kept", [True, False], ids=["serve", "alone"])
def test_it_ends_with_its_parent_where_it_should(monkeypatch, kept):
    if kept:
        monkeypatch.setenv(KEPT, "1")
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    try:
        if kept:
            child.wait(60)
        else:
            with pytest.raises(psutil.TimeoutExpired):
                child.wait(0.5)
    finally:
        with suppress(psutil.NoSuchProcess):
            child.kill()
        parent.stdout.close()
