"""`fulmen ask`: a question about a folder of documents, to any OpenAI-compatible server."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from fulmen.cli.docs import Cache, Folder
from fulmen.cli.progress import reporter

if TYPE_CHECKING:
    from fulmen.pipeline.ask_answer import FolderAnswer

QUOTE_SHOWN = 200


def ask_command(
    folder: Folder,
    question: Annotated[
        str, typer.Argument(metavar="QUESTION", help="About the documents.", show_default=False)
    ],
    url: Annotated[
        str, typer.Option(metavar="URL", help="An OpenAI-compatible server, as fulmen serve.")
    ] = "http://127.0.0.1:8000/v1",
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="FULMEN_API_KEY",
            help="Better in the variable, where no list of processes shows it.",
            show_default=False,
            show_envvar=True,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="[dim]Default: the first that the server names.[/]", show_default=False
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens that the model takes. [dim]Default: what the server says, else 32768.[/]",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest message of the model, in tokens.")] = 1024,
    max_steps: Annotated[int, typer.Option(help="Steps at most, where the model searches.")] = 12,
    cache: Cache = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print answer, citations, usage and cost as JSON.")
    ] = False,
) -> None:
    """Answer a question about a folder's documents, with citations that are checked. Steps go to stderr.

    Small folders are given whole, before the question, so that the next one finds them in the prefix cache;
    larger ones are searched by the model.

    Example: [bold]fulmen ask docs/ "What does the indexer store for each token?"[/]
    """
    from fulmen.pipeline.ask import ask

    answer = ask(
        folder,
        question,
        url=url,
        api_key=api_key,
        model=model,
        context=context,
        max_new_tokens=max_new_tokens,
        max_steps=max_steps,
        cache=cache,
        reporter=reporter(),
    )
    if as_json:
        typer.echo(json.dumps(answer.to_dict(), indent=2, ensure_ascii=False))
    else:
        _print(answer)
    typer.echo(f"[{answer.bill.text()}]", err=True)


def _print(answer: "FolderAnswer") -> None:
    from fulmen.pipeline.ask_answer import printable

    typer.echo(printable(answer.answer))
    if answer.citations:
        typer.echo()
    for one in answer.citations:
        typer.echo(f"{one.file}:{one.span.first_line}-{one.span.last_line}  {_shown(one.quote)}")
    for left in answer.dropped:
        typer.echo(f"quote dropped, {left.reason}: {printable(left.file)}  {_shown(left.quote)}", err=True)


def _shown(quote: str) -> str:
    """The beginning of a quote, in one line."""
    from fulmen.pipeline.ask_answer import printable

    text = printable(" ".join(quote.split()))
    return f"“{text[:QUOTE_SHOWN]}{'…' if len(text) > QUOTE_SHOWN else ''}”"
