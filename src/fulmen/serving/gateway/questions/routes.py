"""The one route of questions about documents."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from fulmen.serving.billing.accounts import Account
from fulmen.serving.gateway.admission.asking import Asking
from fulmen.serving.gateway.admission.auth import key_in
from fulmen.serving.gateway.admission.json_body import JsonRoute
from fulmen.serving.gateway.dialects.requests import Count, Model
from fulmen.serving.gateway.errors import ApiError
from fulmen.serving.gateway.gateway import Gateway
from fulmen.serving.gateway.openapi import ANSWERS
from fulmen.serving.gateway.questions.desk import QuestionDesk
from fulmen.serving.gateway.questions.reply import QuestionReply

ASK = "/fulmen/ask"
LONGEST_QUESTION = 16_000


class FolderQuestion(Model):
    """A question, the tokens of each message of the model, and its messages at most."""

    question: Annotated[str, Field(pattern=r"\S", max_length=LONGEST_QUESTION)]
    max_new_tokens: Count = 1024
    max_steps: Annotated[int, Field(ge=1, le=100)] = 12


def question_routes(gateway: Gateway, desk: QuestionDesk) -> APIRouter:
    """Questions about the desk's folder."""
    routes = APIRouter(route_class=JsonRoute)

    @routes.post(ASK, response_model=None, responses=ANSWERS)
    async def ask(question: FolderQuestion, account: Asking, request: Request) -> Response:
        """An answer about the served documents, as server-sent events: steps, then answer or error."""
        if not gateway.engine.ready:
            raise ApiError(503, "the engine is starting; try again shortly")
        await _require_money(gateway, account)
        host, port = request.scope["server"]
        address = f"[{host}]" if ":" in host else host
        asked = {
            **question.model_dump(),
            "url": f"http://{address}:{port}/v1",
            "api_key": key_in(dict(request.scope["headers"])) or None,
            "model": gateway.model.name,
            "context": gateway.engine.settings.context,
        }
        return QuestionReply(gateway, desk, account, asked)

    return routes


async def _require_money(gateway: Gateway, account: Account) -> None:
    """Raise ApiError 402 for an account whose deposits are used up."""
    left = await asyncio.to_thread(gateway.billing.ledger.balance, account.id)
    if left is not None and left <= 0:
        raise ApiError(402, f"the balance of {account.id} is used up; top it up: fulmen keys topup")
