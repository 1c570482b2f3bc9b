"""What all commands share at the program's edge: one-line errors, an answer to Ctrl-C, quiet libraries."""

import logging
import os
import re
import shlex
import sys
import warnings
from typing import Any

import typer
from typer.core import TyperGroup

from fulmen.errors import ConfigError, FulmenError

TRACEBACK_VARIABLE = "FULMEN_TRACEBACK"
USER_ERROR, INTERRUPTED = 2, 130
# What is part of a longer name, a path or a quoted value is no argument.
NO_WORD_BEFORE, NO_WORD_AFTER = r"(?<![\w.'\"/=-])", r"(?![\w'\"/=-]|\.\w)"


class FulmenGroup(TyperGroup):
    """Runs a command; a user's error becomes one line on stderr and exit code 2, Ctrl-C one line and 130."""

    def invoke(self, ctx: Any) -> Any:
        """As the base class, with an end that a user can read."""
        quiet_libraries()
        # Read by torch when it allocates. Else a seventh of training goes to page faults.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        try:
            return super().invoke(ctx)
        except FulmenError as error:
            if os.environ.get(TRACEBACK_VARIABLE):
                raise
            asked = self.get_command(ctx, str(ctx.invoked_subcommand))
            typer.echo(f"error: {as_options(error, asked)}", err=True)
            raise typer.Exit(USER_ERROR) from None
        except KeyboardInterrupt:
            command = shlex.join(["fulmen", *sys.argv[1:]])
            typer.echo(f"\ninterrupted; to go on, run the same command again: {command}", err=True)
            raise typer.Exit(INTERRUPTED) from None


def as_options(error: FulmenError, command: Any) -> str:
    """A message with the command's options in place of the arguments that it names: `budget` is `--budget`.

    Arguments are what the error says are some, and names before an equals sign.
    """
    text = str(error)
    for parameter in getattr(command, "params", []):
        option = next((name for name in parameter.opts if name.startswith("--")), None)
        if option is None:
            continue
        text = re.sub(rf"{NO_WORD_BEFORE}{parameter.name}(?==)", option, text)
        if parameter.name in error.arguments:
            text = re.sub(rf"{NO_WORD_BEFORE}{parameter.name}{NO_WORD_AFTER}", option, text)
    return text


def renamed(old: str, old_value: Any, new: str, new_value: Any) -> Any:
    """The value of an option that had another name, which goes on working with a notice.

    Raises ConfigError if both names are used.
    """
    if old_value is None:
        return new_value
    if new_value is not None:
        raise ConfigError(f"--{old} is the old name of --{new}; give one of them")
    typer.echo(f"--{old} is called --{new} now; the old name will go", err=True)
    return old_value


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
