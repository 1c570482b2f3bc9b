"""Options that `fulmen eval` and `fulmen suite` share."""

from pathlib import Path
from typing import Annotated

import typer

ConvertedDir = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="What fulmen convert or train wrote.", show_default=False),
]
AnyDir = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        help="What fulmen convert or train wrote; for suites that need no DSA any model's directory. With "
        "--url only its tokenizer is read.",
        show_default=False,
    ),
]
Dense = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="The dense model to compare with, after fulmen train above all. [dim]Default: DIR itself, "
        "read densely.[/]",
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
        help="Tokens of a prompt, as 1k,2k,4k, or max. [dim]Default: 1k,2k; with a k above 512: "
        "2 k and 4 k; within the context.[/]",
        show_default=False,
    ),
]
Samples = Annotated[int, typer.Option(help="Questions per task and length, or texts per length.")]
Tasks = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="Of the suite ruler, some of its tasks. [dim]Default: all.[/]",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(help="Another seed asks other questions.")]
Url = Annotated[
    str | None,
    typer.Option(
        help="For the suites ruler and generate: ask an OpenAI-compatible endpoint, as http://host:8000/v1.",
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
        help="Folder for results. [dim]Default: suites in DIR, or eval-NAME.[/]",
        show_default=False,
    ),
]
