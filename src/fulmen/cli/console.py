"""What all commands share at the program's edge: one-line errors, an answer to Ctrl-C, quiet libraries."""

import logging
import os
import shlex
import sys
import warnings
from typing import Any

import typer
from typer.core import TyperGroup

from fulmen.errors import FulmenError

TRACEBACK_VARIABLE = "FULMEN_TRACEBACK"
USER_ERROR, INTERRUPTED = 2, 130


class FulmenGroup(TyperGroup):
    """Runs a command; a user's error becomes one line on stderr and exit code 2, Ctrl-C one line and 130."""

    def invoke(self, ctx: Any) -> Any:
        """As the base class, with an end that a user can read."""
        quiet_libraries()
        try:
            return super().invoke(ctx)
        except FulmenError as error:
            if os.environ.get(TRACEBACK_VARIABLE):
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(USER_ERROR) from None
        except KeyboardInterrupt:
            command = shlex.join(["fulmen", *sys.argv[1:]])
            typer.echo(f"\ninterrupted; to go on, run the same command again: {command}", err=True)
            raise typer.Exit(INTERRUPTED) from None


def quiet_libraries() -> None:
    """Keep the libraries' chatter off the console; the user's own settings of these variables win.

    Only variables, which the libraries read when they are imported: importing them here would take seconds.
    """
    quiet = {
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "HF_HUB_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    if os.environ.get("RANK", "0") != "0":
        # Of several processes (`accelerate launch`) the first one speaks.
        logging.getLogger("fulmen").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
