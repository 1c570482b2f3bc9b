"""HTTP to a model behind an OpenAI-compatible address: one client for all that ask one.

Standard library only.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from fulmen.errors import EndpointError

KEY_VARIABLE = "FULMEN_API_KEY"
TIMEOUT_S = 600.0
# A server that is busy, starting or gone for a moment is asked again.
ATTEMPTS, LONGEST_WAIT_S = 4, 30.0
BUSY = (429, 502, 503, 504)
REFUSED = (400, 404, 405, 413, 415, 422, 501)


class RequestRefused(EndpointError):
    """An answer of 4xx that another form of the request may not get."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.is_too_long = status == 413 or "context" in message.lower()


class EndpointBusy(EndpointError):
    """A failure that may be over in a moment.

    Attributes:
        wait_s: what the server asks for; None: nothing.
        broke_off: whether an answer had begun, which the server may have charged.
    """

    def __init__(self, message: str, wait_s: float | None = None, broke_off: bool = False) -> None:
        super().__init__(message)
        self.wait_s, self.broke_off = wait_s, broke_off


class Endpoint:
    """An address, and what is asked there.

    Args:
        url: as `http://127.0.0.1:8000/v1`; without a path, /v1 is meant.
        api_key: None: FULMEN_API_KEY, if it is set.
        timeout_s: until an answer goes on.

    Raises EndpointError if the address is none. So do its methods, for a server that cannot be reached,
    refuses, or answers what is no JSON object: one line that names the address.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        if not _is_address(url):
            raise EndpointError(f"url={url!r} is no address; write it as http://127.0.0.1:8000/v1")
        parts = urlsplit(url)
        self.url = url.rstrip("/") if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/v1"
        self._key, self._timeout_s = api_key or os.environ.get(KEY_VARIABLE), timeout_s
        if self._key and not _is_visible(self._key):
            raise EndpointError(f"the API key has characters that no key has; look at {KEY_VARIABLE}")

    def models(self) -> list[dict[str, Any]]:
        """What the server lists, each with an `id`, its name; empty where it names none."""
        rows = self.call("/models").get("data")
        listed = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        return [row for row in listed if isinstance(row.get("id"), str) and row["id"]]

    def call(self, path: str, body: dict[str, Any] | None = None, root: str | None = None) -> dict[str, Any]:
        """The answer to a POST of `body`, or to a GET. root: another one than `url`.

        Raises RequestRefused for a request that the server does not take, EndpointBusy for what may pass.
        """
        url = (root if root is not None else self.url) + path
        with self._opened(url, body) as response:
            try:
                found = read_json(response.read())
            except ValueError as error:
                raise EndpointError(f"{url} answered no JSON; give the address that ends in /v1") from error
        if not isinstance(found, dict):
            raise EndpointError(f"{url} answered no JSON object; give the address that ends in /v1")
        if "error" in found and "choices" not in found:
            raise EndpointBusy(f"{url} broke off: {error_text(found)}", broke_off=True)
        return found

    def call_again(
        self, path: str, body: dict[str, Any], on_wait: Callable[[EndpointBusy, float], None]
    ) -> dict[str, Any]:
        """As `call`, after other attempts where the server was busy or broke off.

        on_wait: told of what went wrong, and of the seconds until the next attempt.
        """
        for attempt in range(1, ATTEMPTS):
            try:
                return self.call(path, body)
            except EndpointBusy as error:
                wait = min(LONGEST_WAIT_S, 0.5 * 2**attempt if error.wait_s is None else error.wait_s)
                on_wait(error, wait)
                time.sleep(wait)
        return self.call(path, body)

    @contextmanager
    def streamed(self, path: str, body: dict[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
        """The chunks of an answer as they come."""
        with self._opened(self.url + path, body) as response:
            yield _chunks(self.url, response)

    @contextmanager
    def _opened(self, url: str, body: dict[str, Any] | None) -> Iterator[HTTPResponse]:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            with urlopen(Request(url, data, headers), timeout=self._timeout_s) as response:
                yield response
        except HTTPError as error:
            raise _refusal(url, error, _rest(error)) from error
        except URLError as error:
            reason = str(error.reason)
            raise EndpointError(f"{url} cannot be reached ({reason}); is the server running?") from error
        except TimeoutError as error:
            raise EndpointError(f"{url} did not answer within {self._timeout_s:g} s; ask for less") from error
        except (HTTPException, OSError) as error:
            raise EndpointBusy(
                f"{url} broke off ({error or type(error).__name__})", broke_off=True
            ) from error


def read_json(text: str | bytes) -> Any:
    """What a model or its server wrote as JSON.

    Raises ValueError for what is none, also for lists in lists without end. Half a surrogate pair, which JSON
    can spell and no file or terminal takes, is read as a question mark.
    """
    try:
        found = json.loads(text)
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            found = json.loads(json.dumps(found, ensure_ascii=False).encode("utf-8", "replace"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return found


def error_text(answer: Any) -> str:
    """What an error's body says, in one line: OpenAI's shape, or whatever it is."""
    error = answer.get("error") if isinstance(answer, dict) else None
    said = error.get("message") if isinstance(error, dict) else error or answer
    return " ".join(str(said).split())[:300]


def _chunks(url: str, response: HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            try:
                chunk = read_json(line[6:])
            except ValueError as error:
                raise EndpointError(f"{url} streamed no JSON; give the address that ends in /v1") from error
            if not isinstance(chunk, dict):
                raise EndpointError(f"{url} streamed no JSON object; give the address that ends in /v1")
            if "error" in chunk:
                raise EndpointError(f"{url} broke off: {error_text(chunk)}")
            yield chunk


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return is_whole and _is_visible(url)


def _is_visible(text: str) -> bool:
    """Whether a text is of letters that a request's first lines may have."""
    return text.isascii() and text.isprintable() and " " not in text


def _rest(error: HTTPError) -> str:
    """What an error's body says, as far as it comes."""
    try:
        return error.read().decode("utf-8", "replace")
    except (HTTPException, OSError):
        return ""


def _refusal(url: str, error: HTTPError, text: str) -> EndpointError:
    try:
        said = error_text(read_json(text))
    except ValueError:
        said = " ".join(text.split())[:160] or error.reason
    words = f"{url} answered {error.code}: {said}"
    if error.code in BUSY:
        wait = error.headers.get("Retry-After", "")
        return EndpointBusy(words, float(wait) if wait.isdigit() else None)
    if error.code in REFUSED:
        return RequestRefused(words, error.code)
    return EndpointError(f"{words}; set {KEY_VARIABLE}" if error.code == 401 else words)
