"""`fulmen serve`: a model behind DeepSeek's API, with vLLM as the engine."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fulmen.cli.billing import DEFAULT_STATE, LedgerUrl, State, missing_extra, open_store
from fulmen.cli.progress import STARTING, reporter

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fulmen.serving.billing.store import BillingStore
    from fulmen.serving.engine.settings import EngineSettings

EXTRA_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": False}


def serve_command(
    context: typer.Context,
    model_dir: Annotated[
        Path, typer.Argument(metavar="DIR", help="A model directory, converted or dense.", show_default=False)
    ],
    host: Annotated[
        str, typer.Option(help="Address to serve at; others than this machine's need keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    chat_encoding: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How chats are written: deepseek-v3.2, for a model that was trained on it, or template, the "
            "model's own. [dim]Default: chat_encoding of its config, else template.[/]",
            show_default=False,
        ),
    ] = None,
    docs: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A folder for the page to ask about: whoever may use the model may read all of it, and "
            "nothing outside it.",
            show_default=False,
        ),
    ] = None,
    state: State = DEFAULT_STATE,
    ledger: LedgerUrl = None,
) -> None:
    """Serve a model: OpenAI's and DeepSeek's API, Anthropic's messages, a page to chat, metering by key.

    What follows -- goes to vLLM: fulmen serve out/smol -- --max-num-seqs 64

    Example: [bold]fulmen serve out/smollm2-dsa[/]
    """
    stage = reporter().stage
    with stage(STARTING):
        from fulmen.pipeline.model_config import read_config, require_no_dense_whole

        found, config = read_config(model_dir)
        require_no_dense_whole(found)
        try:
            from fulmen.pipeline.ask_desk import folder_desk
            from fulmen.serving.engine.served_model import served_model
            from fulmen.serving.engine.settings import EngineSettings, require_vllm
            from fulmen.serving.server import serve
        except ModuleNotFoundError as error:
            raise missing_extra(error) from error
    model = served_model(Path(found.place), config, chat_encoding)
    settings = EngineSettings(model, tuple(context.args))
    require_vllm()
    desk = None if docs is None else folder_desk(docs, reporter())
    store = open_store(state, ledger)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    for line in describe(settings, store):
        typer.echo(line)
    if desk is not None:
        typer.echo(f"answers questions about {desk.documents:,} documents of {desk.folder}")
    raise typer.Exit(serve(settings, store, state.expanduser(), host, port, typer.echo, stage, desk))


def describe(settings: "EngineSettings", store: "BillingStore") -> list[str]:
    """Model, context, price list and who may ask."""
    model, prices, keys = settings.model, store.prices, len(store.accounts)
    kept = f"DSA, k = {model.dsa.topk:,}" if model.dsa else "dense attention"
    rates = prices.rates
    shown = f"{rates.hit} prompt in cache, {rates.miss} prompt computed, {rates.output} output"
    encoding = ["chats in DeepSeek-V3.2's encoding"] if model.chat_encoding else []
    return [
        f"{model.name}: {kept}, context {settings.context:,} tokens",
        f"{prices.currency} per million tokens: {shown}",
        f"{keys} keys" if keys else "no keys: everybody on this machine is one anonymous account",
        *(["texts alone: images are not served"] if model.reads_images else []),
        *encoding,
        *longrope_note(model.config, settings.context),
    ]


def longrope_note(config: "PreTrainedConfig", context: int) -> list[str]:
    """What a user of LongRoPE must know of vLLM, which has one rotary table for all lengths; else nothing."""
    from fulmen.modeling.rope_tables import full_attention_rope

    rope = full_attention_rope(config)
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") != "longrope" or not original or context <= original:
        return []
    return [
        f"LongRoPE: vLLM takes the long factors for texts up to {original:,} tokens too, Transformers the "
        f"short ones; so does vLLM with -- --max-model-len {original}"
    ]
