"""`fulmen docs`: a folder of documents as tools for programs that speak the Model Context Protocol."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fulmen.cli.progress import reporter
from fulmen.errors import ConfigError

if TYPE_CHECKING:
    from fulmen.agents.documents.index import DocumentIndex

docs_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Serve a folder's documents as tools, over MCP.",
    epilog="Text, Markdown, source code, HTML; PDF with the package pypdf. No file is changed.",
)

Folder = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="The folder; nothing outside it is read.", show_default=False),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        envvar="FULMEN_CACHE",
        help="Where the index lies. [dim]Default: ~/.cache/fulmen, or in XDG_CACHE_HOME.[/]",
        show_default=False,
    ),
]


@docs_app.command("serve")
def serve_docs_command(folder: Folder, cache: Cache = None) -> None:
    """Serve list, search, open and grep over stdin and stdout, until stdin ends.

    Example: [bold]fulmen docs serve notes/[/]
    """
    try:
        from fulmen.agents.documents.server import serve_documents
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the package {error.name} is not installed; run: pip install 'fulmen[docs]'"
        ) from error
    from fulmen.agents.documents.tools import DocumentTools

    index = read_index(folder, cache)
    typer.echo(f"{len(index.documents()):,} documents of {index.folder}; index in {index.path}", err=True)
    serve_documents(DocumentTools(index))


def read_index(folder: Path, cache: Path | None) -> "DocumentIndex":
    """The folder's index, up to date. What is passed over goes to stderr."""
    from fulmen.agents.documents.index import DocumentIndex
    from fulmen.agents.documents.tools import passed_over_lines

    index = DocumentIndex(folder, cache)
    with reporter().stage("Read"):
        index.refresh()
    for line in passed_over_lines(index):
        typer.echo(line, err=True)
    return index
