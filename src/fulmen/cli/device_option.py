"""The option that every command with a model of its own has."""

from typing import Annotated

import typer

Device = Annotated[
    str,
    typer.Option(help="Where to compute: cpu, cuda, or what else torch names. auto: a GPU if there is one."),
]
