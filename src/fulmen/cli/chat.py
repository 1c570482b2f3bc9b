"""`fulmen chat`: talk to a converted model and see what each answer read."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fulmen.config import require_positive_int
from fulmen.errors import ConfigError, CorpusError

if TYPE_CHECKING:
    from fulmen.cli.chat_session import ChatSession, Turn


def chat_command(
    model_dir: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="A model directory that fulmen convert wrote.", show_default=False
        ),
    ],
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
    text = "" if document is None else read_document(document)
    from fulmen.cli.chat_session import ChatSession

    session = ChatSession(model_dir, topk, text)
    if prompt is None:
        _converse(session, max_new_tokens)
    else:
        _answer(session, prompt, max_new_tokens)


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


def _converse(session: "ChatSession", max_new_tokens: int) -> None:
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        _answer(session, question, max_new_tokens)


def _answer(session: "ChatSession", question: str, max_new_tokens: int) -> None:
    turn = session.ask(question, max_new_tokens, lambda piece: typer.echo(piece, nl=False))
    typer.echo()
    typer.echo(_summary(turn), err=True)


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
