"""The `fulmen` program. Commands import torch and Transformers inside themselves, so that help is instant."""

from typing import Annotated

import typer

from fulmen.cli.ask import ask_command
from fulmen.cli.chat import chat_command
from fulmen.cli.console import FulmenGroup
from fulmen.cli.convert import convert_command
from fulmen.cli.cost import cost_command
from fulmen.cli.docs import docs_app
from fulmen.cli.doctor import doctor_command
from fulmen.cli.evaluate import evaluate_command
from fulmen.cli.export_rl import export_rl_command
from fulmen.cli.inspect import inspect_command
from fulmen.cli.keys import keys_app
from fulmen.cli.recipe import distill_command, recipe_app, specialize_command
from fulmen.cli.rl import rl_command
from fulmen.cli.serve import EXTRA_FLAGS, serve_command
from fulmen.cli.sft import sft_command
from fulmen.cli.suite import suite_command
from fulmen.cli.train import train_command
from fulmen.cli.usage import usage_command
from fulmen.cli.verify import verify_app
from fulmen.version import __version__

app = typer.Typer(
    cls=FulmenGroup,
    name="fulmen",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback(
    epilog="Start with: fulmen inspect smollm2-135m\n\n"
    "A mistake ends with one line and exit code 2; FULMEN_TRACEBACK=1 shows where it arose."
)
def fulmen(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop."),
    ] = False,
) -> None:
    """Give a dense language model DeepSeek Sparse Attention, and measure what that costs and saves.

    inspect a model, convert it, train it further, eval the result against the dense model, chat with it,
    serve it. suite runs tests on any model, cost prices its tokens, doctor shows what computes here.
    sft goes on with chats, rl with rewards, export-rl writes that for other trainers; recipe: specialists
    (specialize), one model of them (distill), mixed RL; verify makes and scores verifiers of proofs.
    For a server: keys makes its API keys, usage shows what they used. ask answers questions about a folder
    of documents, docs serves one as tools.
    """


app.command("inspect")(inspect_command)
app.command("convert")(convert_command)
app.command("train")(train_command)
app.command("sft")(sft_command)
app.add_typer(recipe_app, name="recipe")
app.command("specialize")(specialize_command)
app.command("distill")(distill_command)
app.command("rl")(rl_command)
app.command("export-rl")(export_rl_command)
app.command("eval")(evaluate_command)
app.command("suite")(suite_command)
app.command("chat")(chat_command)
app.command("ask")(ask_command)
app.command("cost")(cost_command)
app.command("doctor")(doctor_command)
app.command("serve", context_settings=EXTRA_FLAGS)(serve_command)
app.add_typer(docs_app, name="docs")
app.add_typer(keys_app, name="keys")
app.command("usage")(usage_command)
app.add_typer(verify_app, name="verify")


def main() -> None:
    """Entry point of the installed program."""
    app()


# `accelerate launch -m fulmen.cli.main convert ...` starts several processes of it.
if __name__ == "__main__":
    main()
