"""What the OpenAPI description says of answers and errors."""

from typing import Any

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_MEANINGS = {
    400: "The body is no JSON, too big or too slow, or asks for what this model cannot do.",
    401: "No API key, or one that is not known.",
    402: "The account's deposits are used up.",
    403: "A page of another site asks a server without keys.",
    404: "There is nothing of that name.",
    415: "The body does not come as plain application/json.",
    421: "The Host is not this machine, and the server has no keys.",
    422: "A field is missing, of the wrong type or out of range; `param` names it.",
    429: "The key has as many requests under way as it may, or other schemas take their time to be checked.",
    500: "The server failed.",
    503: "The engine is starting, or the server is full.",
}


def _described(meaning: str) -> dict[str, Any]:
    return {"description": meaning, "content": {"application/json": {"schema": _ERROR}}}


ERRORS: dict[int | str, dict[str, Any]] = {status: _described(text) for status, text in _MEANINGS.items()}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream`, in server-sent events.",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
    },
    **ERRORS,
}
