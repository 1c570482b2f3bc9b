"""Options that `fulmen eval` and `fulmen suite` share."""

from pathlib import Path
from typing import Annotated

import typer

ModelDir = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        help="A model directory that fulmen convert wrote; for suites that need no DSA any model's, "
        "and with --url only the tokenizer is read.",
        show_default=False,
    ),
]
Dense = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="The dense model to compare with, after fulmen train above all; in suites it is the one "
        "that answers as dense. [dim]Default: only DIR itself, read densely.[/]",
        show_default=False,
    ),
]
HeldOutData = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATH",
        help="Held-out text: a file, or a directory of them; may be repeated. "
        "[dim]Default: what comes with Python and was not trained on.[/]",
        show_default=False,
    ),
]
Topk = Annotated[
    int | None,
    typer.Option(help="Tokens that each query keeps. [dim]Default: the model's own.[/]", show_default=False),
]
Lengths = Annotated[
    str | None,
    typer.Option(
        help="Suites: tokens of a prompt, as 1k,2k,4k, or max. [dim]Default: 1k,2k; with a k above 512: "
        "2 k and 4 k; within the context.[/]",
        show_default=False,
    ),
]
Samples = Annotated[int, typer.Option(help="Suites: questions per task and length, or texts per length.")]
Tasks = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES", help="Suite ruler: some of its tasks. [dim]Default: all.[/]", show_default=False
    ),
]
Seed = Annotated[int, typer.Option(help="Suites: another seed asks other questions.")]
Url = Annotated[
    str | None,
    typer.Option(
        help="Suites ruler and generate: ask an OpenAI-compatible endpoint, as http://host:8000/v1.",
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The endpoint's name for the model.", show_default=False),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Suites: folder for results. [dim]Default: suites in DIR, or eval-NAME.[/]",
        show_default=False,
    ),
]
