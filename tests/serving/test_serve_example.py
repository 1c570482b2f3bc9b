"""What a reader types to call a server: the example, and the block of docs/serving.md."""

import re
import runpy
from pathlib import Path

from tests.serving.served import ALICE

ROOT = Path(__file__).parents[2]


def test_the_example_asks_twice_and_the_second_time_from_the_cache(server, capsys):
    example = runpy.run_path(str(ROOT / "examples" / "serve_and_call.py"))
    example["main"](None, server.url, ALICE)
    printed = capsys.readouterr().out
    first, second = map(int, re.findall(r"tokens, (\d+) of them from the cache", printed))
    assert second > first == 0


def test_the_block_of_the_guide_runs(server, capsys):
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    block = block.replace("http://127.0.0.1:8000", server.url).replace("any, or a key of fulmen keys", ALICE)
    # The tests' model never ends by itself.
    block = block.replace("messages=[", "max_tokens=4, messages=[")
    exec(compile(block, "docs/serving.md", "exec"), {})
    assert "prompt_cache_hit_tokens" in capsys.readouterr().out
