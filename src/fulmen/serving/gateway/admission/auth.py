"""Who may ask: accounts by their keys, known before the body is read; bytes and seconds of a body."""

import asyncio
import secrets

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fulmen.serving.billing.accounts import Account, Accounts
from fulmen.serving.gateway.admission.origin import require_local
from fulmen.serving.gateway.errors import ApiError, respond

MAX_BODY_BYTES = 16 * 2**20
BODY_S = 60.0
# What belongs to an account although it only reads.
PRIVATE = ("/models", "/v1/models", "/beta/models", "/anthropic/", "/user/")


class Keys:
    """Accounts by their keys. While there is no key at all, everybody is one anonymous account."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._anonymous = Account("anonymous", None, secrets.token_hex(32))

    @property
    def needed(self) -> bool:
        """Whether requests need a key."""
        return len(self._accounts) > 0

    def account_of(self, headers: dict[bytes, bytes]) -> Account:
        """Who asks, by the key. Raises ApiError 401, which does not repeat it."""
        if not self.needed:
            return self._anonymous
        key = key_in(headers)
        if not key:
            raise ApiError(401, "no API key; send it as the header Authorization: Bearer KEY")
        account = self._accounts.find(key)
        if account is None:
            raise ApiError(401, "the API key is not known here; ask whoever runs this server for one")
        return account


def key_in(headers: dict[bytes, bytes]) -> str:
    """The key of `Authorization: Bearer KEY`, or of `x-api-key` as Anthropic has it; or nothing."""
    scheme, _, key = headers.get(b"authorization", b"").strip().partition(b" ")
    key = key.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"").strip()
    return key.decode("latin-1")


class AuthMiddleware:
    """Middleware: who asks is known before the body is read; a body too big or too slow ends the request.

    Without keys, requests must name this machine, or a page of another site could use the server.

    The account is left in the request's state. Pages and what scrapers read are open to all.
    """

    def __init__(self, app: ASGIApp, keys: Keys, most: int = MAX_BODY_BYTES, seconds: float = BODY_S) -> None:
        self._app, self._keys, self._most, self._seconds = app, keys, most, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        reads = scope["method"] in ("GET", "HEAD")
        try:
            if not self._keys.needed:
                require_local(scope["headers"])
            if not reads or scope["path"].startswith(PRIVATE):
                scope.setdefault("state", {})["account"] = self._keys.account_of(dict(scope["headers"]))
            body = b"" if reads else await self._read(scope, receive)
        except ApiError as error:
            await respond(error, scope["path"])(scope, receive, send)
            return
        if body is not None:
            sent = _while_open(send, receive)
            await self._app(scope, receive if reads else _replay(body, receive), sent)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client left."""
        announced = dict(scope["headers"]).get(b"content-length", b"")
        too_big = announced.isdigit() and int(announced) > self._most
        pieces, left, more = [], -1 if too_big else self._most, True
        try:
            async with asyncio.timeout(self._seconds):
                while more and left >= 0:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    pieces.append(message.get("body", b""))
                    left -= len(pieces[-1])
                    more = message.get("more_body", False)
        except TimeoutError:
            slow = f"the body did not come within {self._seconds:.0f} s; send it at once"
            raise ApiError(400, slow) from None
        if left < 0:
            raise ApiError(400, f"the body has more than {self._most:,} bytes; send less")
        return b"".join(pieces)


def _while_open(send: Send, receive: Receive) -> Send:
    """Sends to a client that may be gone already."""

    async def sent(message: Message) -> None:
        try:
            await send(message)
        except RuntimeError as error:
            # uvloop's word for a connection that is gone, a moment before anybody is told.
            if "handler is closed" not in str(error):
                raise
            await receive()

    return sent


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body that was read, and then what comes: the client's leaving."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return first.pop() if first else await receive()

    return again
