"""Histories that a strategy of `fulmen.messages` keeps within the context before the engine reads them.

Clients send the whole history each time. What was kept of it last time is remembered, so that the prompt
begins as it did then and the prefix cache hits; where that is forgotten, it is found anew by the same rules.
"""

import asyncio
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from pydantic import TypeAdapter

from fulmen.errors import ContextBudgetError, MessageError
from fulmen.messages import strategies
from fulmen.messages.strategies import OMITTED, SUMMARY_NAME
from fulmen.serving.billing.accounts import Account
from fulmen.serving.engine.served_model import ServedModel
from fulmen.serving.engine.settings import EngineSettings
from fulmen.serving.gateway.context.anthropic_history import chat_of_messages, messages_of_chat
from fulmen.serving.gateway.context.message_tokens import MessageTokens
from fulmen.serving.gateway.dialects.requests import ChatRequest, ContextOptions, Message, MessagesRequest
from fulmen.serving.gateway.errors import ApiError

# Conversations whose managed history is remembered.
REMEMBERED = 256
MESSAGES = TypeAdapter(list[Message])
FIELD = "fulmen_context"
History = Sequence[Mapping[str, Any]]


class ManagedContexts:
    """Applies the strategy of a request, or of its key.

    Args:
        model: whose tokens are counted.
        settings: of the engine, for the tokens of prompt and answer together.
    """

    def __init__(self, model: ServedModel, settings: EngineSettings) -> None:
        self._settings = settings
        self._tokens = MessageTokens(model)
        # Of each conversation what remembers its kept messages, and what remembers their tokens.
        self._managed: OrderedDict[tuple[Any, ...], tuple[strategies.Strategy, strategies.Counter]] = (
            OrderedDict()
        )
        # One thread: counting waits for counting, not the ledger or the event loop.
        self._thread = ThreadPoolExecutor(1, "fulmen-context")

    async def managed(self, request: ChatRequest, account: Account) -> tuple[ChatRequest, dict[str, Any]]:
        """The request with what is kept of its messages, and a note for its usage; itself without a strategy.

        Raises ApiError for options that cannot be, and for messages that no strategy can keep.
        """
        options = options_of(request, account)
        if options is None:
            return request, {}
        run = asyncio.get_running_loop().run_in_executor
        return await run(self._thread, self.manage, request, account, options)

    async def managed_messages(
        self, request: MessagesRequest, account: Account
    ) -> tuple[MessagesRequest, dict[str, Any]]:
        """The same for Anthropic's messages."""
        if options_of(request, account) is None:
            return request, {}
        given = chat_of_messages(request)
        chat, notes = await self.managed(given, account)
        return (request if chat is given else messages_of_chat(request, chat)), notes

    def manage(
        self, request: ChatRequest, account: Account, options: ContextOptions
    ) -> tuple[ChatRequest, dict[str, Any]]:
        """The same, at once."""
        budget = self._budget(request, options)
        given = MESSAGES.dump_python(request.messages, exclude_none=True)
        tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
        key = (account.id, options.model_dump_json(), budget, _opening(given), json.dumps(tools))
        try:
            kept, tokens = self._kept(key, given, tools, budget, options)
        except ContextBudgetError as error:
            raise ApiError(400, str(error), "messages") from error
        except MessageError as error:
            raise ApiError(400, f"{FIELD}: {error}", "messages") from error
        note = _note(options.strategy, given, kept) | {"budget": budget, "prompt_tokens": tokens}
        if kept != given:
            request = request.model_copy(update={"messages": MESSAGES.validate_python(kept)})
        return request, {"context": note}

    def close(self) -> None:
        """Give back the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _kept(
        self,
        key: tuple[Any, ...],
        given: list[dict[str, Any]],
        tools: list[dict[str, Any]],
        budget: int,
        options: ContextOptions,
    ) -> tuple[History, int]:
        """What is kept of the messages, and the tokens of that."""
        known = self._managed.get(key)
        if known is None:
            count = self._tokens.counter(tools)
            if (tokens := count(given)) <= options.trigger * budget:
                # A strategy would never have done anything.
                return given, tokens
            known = self._managed[key] = strategies.at_every_call(_strategy(options)), count
            while len(self._managed) > REMEMBERED:
                self._managed.popitem(last=False)
        self._managed.move_to_end(key)
        strategy, count = known
        kept = strategy(given, budget, count)
        return kept, count(kept)

    def _budget(self, request: ChatRequest, options: ContextOptions) -> int:
        """Tokens that the prompt may have: the context without the answer's, or fewer where asked for."""
        answer = request.max_completion_tokens or request.max_tokens or 0
        room = self._settings.context - answer
        if room < 1:
            field = "max_completion_tokens" if request.max_completion_tokens else "max_tokens"
            why = f"leaves no room in a context of {self._settings.context}"
            raise ApiError(400, f"{field}={answer} {why}", field)
        return min(room, options.budget or room)


def options_of(request: ChatRequest | MessagesRequest, account: Account) -> ContextOptions | None:
    """What the request says of its context, else its key; None: nothing is done.

    Raises ApiError 422 for an option that the strategy does not have.
    """
    options = request.fulmen_context
    if options is None:
        options = ContextOptions.model_validate({"strategy": account.strategy or "none"})
    if options.strategy == "none":
        return None
    if options.newest is not None and options.strategy not in ("keep_newest", "hierarchical"):
        field = f"{FIELD}.newest"
        raise ApiError(422, f"{field} is for keep_newest and hierarchical; leave it out", field)
    return options


def _strategy(options: ContextOptions) -> strategies.Strategy:
    newest = {} if options.newest is None else {"n": options.newest}
    return partial(getattr(strategies, options.strategy), trigger=options.trigger, **newest)


def _opening(messages: History) -> int:
    """What a conversation is known by: its messages up to the first answer."""
    answers = (place for place, message in enumerate(messages) if message["role"] == "assistant")
    return hash(json.dumps(messages[: next(answers, len(messages))]))


def _note(strategy: str, given: History, kept: History) -> dict[str, Any]:
    """What a strategy did, in messages."""
    of_client = sum(message.get("name") != SUMMARY_NAME for message in kept)
    shortened = sum(message["role"] == "tool" and message["content"] == OMITTED for message in kept)
    return {
        "strategy": strategy,
        "messages": len(given),
        "dropped": len(given) - of_client,
        "shortened": shortened,
    }
