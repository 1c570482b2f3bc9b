"""Errors as DeepSeek's API words them: one JSON body, one code for each kind of trouble."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "insufficient_balance",
    403: "permission_error",
    404: "not_found_error",
    405: "not_found_error",
    408: "invalid_request_error",
    414: "invalid_request_error",
    415: "invalid_request_error",
    421: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "server_error",
    503: "service_unavailable",
}
RETRY_AFTER_S = {429: "1", 503: "5"}
# Pydantic's words for a way through a union, not fields of a request.
_NO_FIELD = re.compile(r"body|str|int|float|bool|dict|none|.*[\[(|].*|[A-Z]\w*")
_BODY_FIELD = re.compile(r"^body\.")
# The engine's own validation, in what it says of each complaint.
_COMPLAINT = re.compile(r"""'loc': 'body\.([^']*)', 'msg': (?:'([^']*)'|"([^"]*)")""")


class ApiError(Exception):
    """What a client gets to read.

    Attributes:
        status: of HTTP.
        message: one sentence that names the field, its value and what would be right.
        param: the field, if one is to blame.
    """

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI and DeepSeek lay it out."""
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": kind}}

    @property
    def anthropic_body(self) -> dict[str, Any]:
        """As Anthropic lays it out."""
        return {
            "type": "error",
            "error": {"type": TYPES.get(self.status, "api_error"), "message": self.message},
        }

    def body_for(self, path: str) -> dict[str, Any]:
        """In the dialect of the path that was asked."""
        return self.anthropic_body if path.startswith("/anthropic") else self.body

    @property
    def headers(self) -> dict[str, str]:
        """When to come again, where that helps."""
        return {"retry-after": RETRY_AFTER_S[self.status]} if self.status in RETRY_AFTER_S else {}


def engine_error(status: int, body: Any, fields: Collection[str] = ()) -> ApiError:
    """What the engine refused, in our codes; `fields` are those of the request, to find the one to blame."""
    said = body.get("error", body) if isinstance(body, Mapping) else {}
    message = said.get("message") if isinstance(said, Mapping) else None
    param = said.get("param") if isinstance(said, Mapping) else None
    if isinstance(param, str):
        param = _BODY_FIELD.sub("", param)
    if status == 503:
        return ApiError(503, "the engine is overloaded; try again shortly")
    if status >= 500 or not isinstance(message, str):
        return ApiError(500, "the engine failed on this request; its log says why")
    if complaints := _COMPLAINT.findall(message):
        place, *said = max(complaints, key=lambda complaint: complaint[0].count("."))
        param = _field([int(part) if part.isdigit() else part for part in place.split(".")])
        message = f"{param}: {''.join(said)}"
    if param == "input_tokens":
        param = "prompt" if "prompt" in fields else "messages"
    elif param is None and "rammar" in message:
        param = "response_format" if "response_format" in fields else "tools"
        message = f"{param} has a schema that no answer can meet, or that cannot be enforced: {message}"
    return ApiError(400, " ".join(message.split())[:1000], param)


def read_json_object(content: bytes) -> Any:
    """What an engine said, as far as it is JSON."""
    try:
        return json.loads(content)
    except ValueError:
        return {}


def validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The most telling of pydantic's complaints: the one that looked deepest into the request."""
    first = max(errors, key=lambda error: len(error["loc"]))
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON ({first.get('ctx', {}).get('error', 'unreadable')})")
    field = _field(first["loc"])
    where = field or "the body"
    if first["type"] == "missing":
        return ApiError(422, f"{where} is missing", field)
    return ApiError(422, f"{where}: {first['msg'][:300]}", field)


def install(app: FastAPI) -> None:
    """Make every error of the app one of ours."""
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_failure)


def respond(error: ApiError, path: str) -> JSONResponse:
    """The error in the dialect of the path that was asked."""
    return JSONResponse(error.body_for(path), error.status, headers=error.headers)


async def _on_api_error(request: Request, error: Any) -> JSONResponse:
    return respond(error, request.url.path)


async def _on_validation(request: Request, error: Any) -> JSONResponse:
    return respond(validation_error(error.errors()), request.url.path)


async def _on_http(request: Request, error: Any) -> JSONResponse:
    if error.status_code == 404:
        error = ApiError(404, f"there is nothing at {request.url.path[:100]}; see /openapi.json")
    elif error.status_code == 405:
        error = ApiError(405, f"{request.method} is not known at {request.url.path[:100]}; see /openapi.json")
    else:
        error = ApiError(error.status_code, str(error.detail))
    return respond(error, request.url.path)


async def _on_failure(request: Request, _error: Any) -> JSONResponse:
    return respond(ApiError(500, "the server failed on this request; its log says why"), request.url.path)


def _field(place: Sequence[Any]) -> str | None:
    """`messages[0].role` of pydantic's ("body", "messages", 0, "role")."""
    text = ""
    for part in place:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not _NO_FIELD.fullmatch(part):
            text += f".{part}" if text else part
    return text or None
