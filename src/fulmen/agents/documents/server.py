"""The document tools as an MCP server over stdin and stdout, for any client of the Model Context Protocol."""

from typing import Any

import anyio
import mcp_types as types
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server

from fulmen.agents.documents.framing import RULE
from fulmen.agents.documents.tools import TOOLS, DocumentTools, tool_schema
from fulmen.errors import FulmenError
from fulmen.version import __version__

INSTRUCTIONS = f"Documents of one folder: list them, search by words, grep by pattern, open to read. {RULE}"
READ_ONLY = types.ToolAnnotations(read_only_hint=True, open_world_hint=False)


def serve_documents(tools: DocumentTools) -> None:
    """Serve until stdin ends. stdout has the protocol alone; a mistake in a call is its answer."""
    anyio.run(_serve, tools)


def document_server(tools: DocumentTools) -> Server[Any]:
    """The server, for a transport of the caller's."""
    one_at_a_time = anyio.CapacityLimiter(1)

    async def list_tools(context: Any, asked: Any) -> types.ListToolsResult:
        return types.ListToolsResult(tools=[_described(name) for name in TOOLS])

    async def call_tool(context: Any, asked: types.CallToolRequestParams) -> types.CallToolResult:
        # In a thread: other messages of the client are answered meanwhile.
        try:
            text = await anyio.to_thread.run_sync(
                tools.call, asked.name, asked.arguments or {}, limiter=one_at_a_time
            )
        except FulmenError as error:
            return _result(str(error), is_error=True)
        return _result(text, is_error=False)

    return Server(
        "fulmen-docs",
        version=__version__,
        instructions=INSTRUCTIONS,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )


async def _serve(tools: DocumentTools) -> None:
    server = document_server(tools)
    async with stdio_server() as (read, write):
        await server.run(read, write, server.create_initialization_options())


def _described(name: str) -> types.Tool:
    description, _ = TOOLS[name]
    return types.Tool(
        name=name, description=description, input_schema=tool_schema(name), annotations=READ_ONLY
    )


def _result(text: str, is_error: bool) -> types.CallToolResult:
    return types.CallToolResult(content=[types.TextContent(type="text", text=text)], is_error=is_error)
