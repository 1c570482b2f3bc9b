"""Who asks, for routes: a parameter `account: Asking` is the account that the middleware found."""

from typing import Annotated

from fastapi import Depends, Request

from fulmen.serving.billing.accounts import Account
from fulmen.serving.gateway.errors import ApiError


async def account_of(request: Request) -> Account:
    """Who asks, as the middleware found. A coroutine: FastAPI would run a plain function in a thread."""
    account = getattr(request.state, "account", None)
    if account is None:
        raise ApiError(401, "no API key; send it as the header Authorization: Bearer KEY")
    return account


Asking = Annotated[Account, Depends(account_of)]
