"""`fulmen chat`: talk to a converted model, or to a server, and see what each answer read."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fulmen.cli.progress import STARTING, reporter
from fulmen.config import require_positive_int
from fulmen.errors import ConfigError, CorpusError

if TYPE_CHECKING:
    from fulmen.pipeline.chat import Turn

# Asks the model one question, prints the answer, and returns a line about it.
Ask = Callable[[str], str]


def chat_command(
    model_dir: Annotated[
        Path | None,
        typer.Argument(
            metavar="DIR",
            help="A model directory that fulmen convert wrote; none with --url.",
            show_default=False,
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Talk to a server, as of fulmen serve; its key is read from FULMEN_API_KEY.",
            show_default=False,
        ),
    ] = None,
    document: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Text to put before the first question; it is read once.", show_default=False
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="One question; answer it and stop. [dim]Default: ask until an empty line or Ctrl-D.[/]",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    topk: Annotated[
        int | None,
        typer.Option(
            help="Tokens that each query keeps. [dim]Default: the model's own.[/]", show_default=False
        ),
    ] = None,
) -> None:
    """Talk to a converted model. Answers go to stdout, what they cost to stderr.

    Example: [bold]fulmen chat out/smollm2-dsa --document README.md --prompt "What is this about?"[/]
    """
    require_positive_int("max_new_tokens", max_new_tokens)
    if prompt is not None and not prompt.strip():
        raise ConfigError("prompt is empty; write a question, or leave --prompt out to be asked for it")
    if (model_dir is None) == (url is None):
        raise ConfigError("give a model directory, or a server with --url; one of the two")
    if url is not None and topk is not None:
        raise ConfigError(f"topk={topk} is the server's to choose; leave it out with --url")
    text = "" if document is None else read_document(document)
    ask = _server(url, text, max_new_tokens) if url else _model(model_dir, topk, text, max_new_tokens)
    if prompt is None:
        _converse(ask)
    else:
        _answer(ask, prompt)


def _model(model_dir: Path | None, topk: int | None, document: str, max_new_tokens: int) -> Ask:
    told = reporter()
    with told.stage(STARTING):
        from fulmen.pipeline.chat import ChatSession
    assert model_dir is not None
    session = ChatSession(model_dir, topk, document, told)
    return lambda question: _summary(session.ask(question, max_new_tokens, _print))


def _server(url: str, document: str, max_new_tokens: int) -> Ask:
    from fulmen.pipeline.chat_remote import RemoteChat, summary

    chat = RemoteChat(url, document, reporter())
    return lambda question: summary(chat.ask(question, max_new_tokens, _print))


def _print(piece: str) -> None:
    typer.echo(piece, nl=False)


def read_document(path: Path) -> str:
    """A text file's content. Raises CorpusError if it is missing, empty or binary."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CorpusError(f"{path} cannot be read ({error.strerror}); name a text file") from error
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is no UTF-8 text (byte {error.start}); name a text file") from error
    if not text.strip():
        raise CorpusError(f"{path} is empty; name a file with text")
    return text


def _converse(ask: Ask) -> None:
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        _answer(ask, question)


def _answer(ask: Ask, question: str) -> None:
    about = ask(question)
    typer.echo()
    typer.echo(about, err=True)


def _summary(turn: "Turn") -> str:
    reused = f", {turn.reused:,} of them cached before" if turn.reused else ""
    kv, index_keys = (size / 1e6 for size in turn.cache)
    speed = f", then {turn.tokens_per_s:.1f} tokens/s" if turn.tokens_per_s else ""
    return (
        f"[{turn.context:,} tokens in context{reused}; "
        f"{turn.read_per_step:,} of {turn.context:,} read per step; "
        f"cache {kv + index_keys:.1f} MB, {index_keys:.1f} MB of it index keys; "
        f"first token after {turn.first_token_s:.2f} s{speed}]"
    )
