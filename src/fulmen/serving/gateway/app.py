"""The gateway's routes: DeepSeek's API in front of one engine."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Header, HTTPException, Request
from fastapi.responses import FileResponse, Response

from fulmen.serving.billing.prices import Rates, money_text, rounded_text
from fulmen.serving.engine.served_model import ServedModel
from fulmen.serving.engine.settings import call_marks
from fulmen.serving.gateway import errors
from fulmen.serving.gateway.admission.asking import Asking
from fulmen.serving.gateway.admission.auth import MAX_BODY_BYTES, AuthMiddleware
from fulmen.serving.gateway.admission.json_body import JsonRoute
from fulmen.serving.gateway.dialects.anthropic import (
    AnthropicDialect,
    count_body,
    messages_body,
    model_info,
    model_list,
    require_known,
)
from fulmen.serving.gateway.dialects.assembled_message import AssembledMessage
from fulmen.serving.gateway.dialects.base import Cleaner
from fulmen.serving.gateway.dialects.deepseek import chat_body, completion_body
from fulmen.serving.gateway.dialects.openai import OpenAiDialect
from fulmen.serving.gateway.dialects.requests import (
    ChatRequest,
    CompletionRequest,
    CountTokensRequest,
    MessagesRequest,
    Sampling,
)
from fulmen.serving.gateway.dialects.responses import ResponsesRequest, chat_of, in_our_words
from fulmen.serving.gateway.dialects.responses_stream import ResponsesDialect
from fulmen.serving.gateway.dialects.tool_call_text import CleanChat, CleanMessages
from fulmen.serving.gateway.dialects.v32_chat import V32Reader
from fulmen.serving.gateway.errors import ApiError
from fulmen.serving.gateway.gateway import Gateway
from fulmen.serving.gateway.jobs.engine_job import EngineRequest
from fulmen.serving.gateway.jobs.streaming_reply import StreamingReply
from fulmen.serving.gateway.openapi import ANSWERS, ERRORS
from fulmen.serving.gateway.questions.desk import QuestionDesk
from fulmen.serving.gateway.questions.routes import question_routes
from fulmen.serving.page import FILES, HEADERS
from fulmen.version import __version__

CHAT = "/v1/chat/completions"
# DeepSeek's base URLs: plain, as OpenAI's clients write it, and for prefix completion and FIM.
PREFIXES = ("", "/v1", "/beta")


def create_app(gateway: Gateway, desk: QuestionDesk | None = None) -> FastAPI:
    """The gateway as an ASGI application; with a desk, for questions about a folder too."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        gateway.keep(gateway.grammars.start())
        yield
        await gateway.close()

    app = FastAPI(title="fulmen", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(AuthMiddleware, keys=gateway.keys)
    errors.install(app)
    for prefix in PREFIXES:
        app.include_router(_model_routes(gateway), prefix=prefix, include_in_schema=prefix == "")
    app.include_router(_anthropic_routes(gateway), prefix="/anthropic/v1")
    app.include_router(_account_routes(gateway))
    app.include_router(_open_routes(gateway, desk))
    if desk is not None:
        app.include_router(question_routes(gateway, desk))
    return app


AnthropicVersion = Annotated[str | None, Header()]


def _model_routes(gateway: Gateway) -> APIRouter:
    routes, model = APIRouter(route_class=JsonRoute), gateway.model
    about = {"id": model.name, "object": "model", "created": 0, "owned_by": "fulmen"}

    @routes.post("/chat/completions", response_model=None, responses=ANSWERS)
    async def chat(request: ChatRequest, account: Asking) -> Response:
        """An answer to a conversation."""
        with gateway.limiter.hold(account):
            request, notes = await gateway.contexts.managed(request, account)
        body = chat_body(request, model, account.salt)
        cleaner = _chat_cleaner(request, body, model)
        asked = EngineRequest(CHAT, body, account, _openai(request), cleaner=cleaner, notes=notes)
        return StreamingReply(gateway, asked)

    @routes.post("/completions", response_model=None, responses=ANSWERS)
    async def complete(request: CompletionRequest, account: Asking) -> Response:
        """A text that goes on; with `suffix`, what stands between."""
        body = completion_body(request, model, account.salt)
        suffixes = tuple(f"-{index}" for index in range(request.texts))
        return StreamingReply(
            gateway, EngineRequest("/v1/completions", body, account, _openai(request), "cmpl-", suffixes)
        )

    @routes.post("/responses", response_model=None, responses=ANSWERS)
    async def respond(request: ResponsesRequest, account: Asking) -> Response:
        """An answer to a conversation, as OpenAI's newer API has it."""
        identity = uuid.uuid4().hex
        try:
            with gateway.limiter.hold(account):
                chat, notes = await gateway.contexts.managed(chat_of(request), account)
            body = chat_body(chat, model, account.salt)
        except ApiError as error:
            raise in_our_words(error) from error
        dialect = ResponsesDialect(request, model.name, identity)
        asked = EngineRequest(CHAT, body, account, dialect, id=identity, explain=in_our_words)
        return StreamingReply(gateway, replace(asked, cleaner=_chat_cleaner(chat, body, model), notes=notes))

    @routes.get("/models", responses=ERRORS)
    async def models(account: Asking, anthropic_version: AnthropicVersion = None) -> dict[str, Any]:
        """The one model, in Anthropic's words to its clients."""
        if anthropic_version is not None:
            return model_list(model, gateway.engine.settings.context)
        return {"object": "list", "data": [about]}

    @routes.get("/models/{name}", responses=ERRORS)
    async def one_model(
        name: str, account: Asking, anthropic_version: AnthropicVersion = None
    ) -> dict[str, Any]:
        """The model by its name."""
        if anthropic_version is not None:
            require_known(name, model)
            return model_info(model, gateway.engine.settings.context)
        if name != model.name:
            raise ApiError(404, f"model={name[:80]!r} does not exist; this server has {model.name}", "model")
        return about

    return routes


def _chat_cleaner(request: ChatRequest, body: dict[str, Any], model: ServedModel) -> Cleaner | None:
    """Of the answer to a request with tools; in others the marks of calls are text like any."""
    if model.chat_encoding:
        return V32Reader(body, sum(len(message.tool_calls or ()) for message in request.messages))
    return CleanChat(call_marks(model)) if "tools" in body else None


def _openai(request: Sampling) -> OpenAiDialect:
    options = request.stream_options
    return OpenAiDialect(bool(options and options.include_usage))


def _anthropic_routes(gateway: Gateway) -> APIRouter:
    routes, model = APIRouter(route_class=JsonRoute), gateway.model

    @routes.post("/messages", response_model=None, responses=ANSWERS)
    async def messages(request: MessagesRequest, account: Asking) -> Response:
        """Anthropic's messages, as vLLM answers them."""
        with gateway.limiter.hold(account):
            request, notes = await gateway.contexts.managed_messages(request, account)
        body = messages_body(request, model, account.salt)
        assembled = "tools" in body and not request.stream
        cleaner = CleanMessages(call_marks(model)) if "tools" in body else None
        dialect = AssembledMessage() if assembled else AnthropicDialect()
        asked = EngineRequest(
            "/v1/messages", body | {"stream": assembled or bool(request.stream)}, account, dialect
        )
        return StreamingReply(gateway, replace(asked, assembled=assembled, cleaner=cleaner, notes=notes))

    @routes.post("/messages/count_tokens", responses=ERRORS)
    async def count(request: CountTokensRequest, account: Asking) -> dict[str, int]:
        """Tokens of a prompt, as the model's template writes it; free of charge."""
        with gateway.limiter.hold(account):
            counted = await gateway.ask("/v1/messages/count_tokens", count_body(request, model))
        return {"input_tokens": counted["input_tokens"]}

    @routes.get("/models", responses=ERRORS)
    async def models(account: Asking) -> dict[str, Any]:
        """The one model."""
        return model_list(model, gateway.engine.settings.context)

    @routes.get("/models/{name}", responses=ERRORS)
    async def one_model(name: str, account: Asking) -> dict[str, Any]:
        """The model by its name, or by one of Anthropic's."""
        require_known(name, model)
        return model_info(model, gateway.engine.settings.context)

    return routes


def _account_routes(gateway: Gateway) -> APIRouter:
    routes, billing = APIRouter(), gateway.billing

    @routes.get("/user/balance", responses=ERRORS)
    async def balance(account: Asking) -> dict[str, Any]:
        """What is left of the deposits; no entry for an account without a limit."""
        left = await asyncio.to_thread(billing.ledger.balance, account.id)
        if left is None:
            return {"is_available": True, "balance_infos": []}
        total = rounded_text(left)
        info = {"currency": billing.prices.currency, "total_balance": total}
        info |= {"granted_balance": "0.00", "topped_up_balance": total}
        return {"is_available": left > 0, "balance_infos": [info]}

    return routes


def _open_routes(gateway: Gateway, desk: QuestionDesk | None) -> APIRouter:
    routes, model, prices = APIRouter(), gateway.model, gateway.billing.prices

    @routes.get("/fulmen/info")
    async def info() -> dict[str, Any]:
        """What the page shows before the first turn."""
        return {
            "model": model.name,
            "context": gateway.engine.settings.context,
            "max_body_bytes": MAX_BODY_BYTES,
            "needs_key": gateway.keys.needed,
            "currency": prices.currency,
            "prices": _shown(prices.rates),
            "dense_prices": prices.dense and _shown(prices.dense),
            "documents": desk and {"folder": desk.folder.name, "count": desk.documents},
            "dsa": model.dsa
            and {
                "topk": model.dsa.topk,
                "layers": len(model.dsa.layers),
                "kv_bytes_per_token": model.token_bytes.kv,
                "index_bytes_per_token": model.token_bytes.index_keys,
            },
        }

    @routes.get("/health", responses={503: ERRORS[500]})
    async def health() -> dict[str, str]:
        """200 while the engine answers, else 503."""
        if not gateway.engine.ready:
            raise ApiError(503, "the engine is starting")
        return {"status": "ok"}

    @routes.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        gateway.metrics.open.set(len(gateway.limiter))
        gateway.metrics.engine_restarts.set(gateway.engine.restarts)
        text, kind = gateway.metrics.text()
        return Response(text, media_type=kind)

    @routes.get("/", include_in_schema=False)
    @routes.get("/{name}.{kind}", include_in_schema=False)
    async def page(request: Request) -> FileResponse:
        """The page to chat with, and its parts."""
        file = FILES.get(request.url.path)
        if file is None:
            raise HTTPException(404)
        return FileResponse(file.path, headers=HEADERS, media_type=file.media_type)

    return routes


def _shown(rates: Rates) -> dict[str, str]:
    return {kind: money_text(rate) for kind, rate in rates._asdict().items()}
