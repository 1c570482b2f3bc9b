"""`fulmen docs serve` as a process, by the SDK's own client."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if not find_spec("mcp"):
    pytest.skip("mcp is not installed: pip install 'fulmen[docs]'", allow_module_level=True)

import anyio
from mcp import ClientSession, StdioServerParameters, stdio_client

import fulmen

PROGRAM = "import sys; sys.argv[0] = 'fulmen'; from fulmen.cli.main import main; main()"
CALLS = [
    ("list", {}),
    ("search", {"query": "lighthouse"}),
    ("open", {"path": "guide.md", "first_line": 4}),
    ("grep", {"pattern": "def .*ships"}),
    ("open", {"path": "../secret.md"}),
    ("grep", {"pattern": "("}),
    ("remove", {"path": "guide.md"}),
    ("search", {"words": "ships"}),
    ("search", {"query": "dock"}),
]


def said_by_server(folder, cache, errors):
    """Name, instructions and tools of the server; of each call whether it is an error, and its text."""
    chosen = {"PYTHONPATH": str(Path(fulmen.__file__).parents[1]), "FULMEN_CACHE": str(cache)}
    command = ["-c", PROGRAM, "docs", "serve", str(folder)]
    parameters = StdioServerParameters(command=sys.executable, args=command, env={**os.environ, **chosen})

    async def talk():
        with open(errors, "w") as stderr:
            async with (
                stdio_client(parameters, errlog=stderr) as (read, write),
                ClientSession(read, write) as session,
            ):
                about = await session.initialize()
                tools = (await session.list_tools()).tools
                (folder / "news.txt").write_text("A new dock.\n")
                results = [await session.call_tool(name, arguments) for name, arguments in CALLS]
        return about, tools, [(one.is_error, one.content[0].text) for one in results]

    return anyio.run(talk)


def test_a_client_lists_and_calls_the_tools(folder, tmp_path):
    (tmp_path / "secret.md").write_text("the secret of the neighbour")
    (folder / "link.md").symlink_to(tmp_path / "secret.md")
    about, tools, results = said_by_server(folder, tmp_path / "cache", tmp_path / "stderr")
    assert about.server_info.name == "fulmen-docs"
    assert "never instructions" in about.instructions
    assert [tool.name for tool in tools] == ["list", "search", "open", "grep"]
    assert all(tool.annotations.read_only_hint for tool in tools)
    assert tools[2].input_schema["required"] == ["path"]
    assert [is_error for is_error, _ in results] == [False] * 4 + [True] * 4 + [False]
    texts = [text for _, text in results]
    assert texts[0].startswith("4 documents\n")
    assert "forty-two ships" in texts[1]
    assert "Each has a red sail." in texts[2]
    assert "1: def count_ships(harbour):" in texts[3]
    assert texts[4] == "path='../secret.md' lies outside the folder; list names all documents"
    assert "no regular expression" in texts[5]
    assert "call one of list, search, open, grep" in texts[6]
    assert "'words' is none; use query, glob, limit" in texts[7]
    assert "A new dock." in texts[8]
    assert "neighbour" not in "".join(texts)
    said = (tmp_path / "stderr").read_text()
    assert "not read, a symbolic link: 1 (link.md)" in said
    assert "3 documents of" in said
