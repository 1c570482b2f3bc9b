"""A model at an OpenAI-compatible address that gives marks."""

import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fulmen.errors import ConfigError, EndpointError, first_line, unwritable

KEY_VARIABLE = "FULMEN_API_KEY"
_MARK = re.compile(r"<score>\s*(\d+(?:\.\d+)?)\s*</score>")
_BUSY = {408, 429, 500, 502, 503, 504}
_HIGHEST = 10.0


class Judge:
    """Gives a prompt's mark of 0 to 10, over 10.

    Args:
        url: as `http://127.0.0.1:8000/v1`.
        model: the server's name for it.
        api_key: None: FULMEN_API_KEY, if it is set.
        journal: a file that keeps marks, so that an interrupted run does not ask again; None: none.
        attempts: how often a server that is down or busy is asked.
        wait_s: before the second attempt; doubled for each other one.
        timeout_s: of one attempt.

    Raises ConfigError for what is no address, and without the package httpx.
    """

    def __init__(
        self,
        url: str,
        model: str,
        api_key: str | None = None,
        journal: Path | None = None,
        attempts: int = 6,
        wait_s: float = 1.0,
        timeout_s: float = 120.0,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"url={url!r} is no address; write it as http://127.0.0.1:8000/v1")
        try:
            import httpx
        except ImportError as error:
            raise ConfigError("a judge needs the package httpx; run: pip install 'fulmen[rl]'") from error
        key = api_key or os.environ.get(KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(headers=headers, timeout=timeout_s)
        self._url, self._model, self._journal = url.rstrip("/") + "/chat/completions", model, journal
        self._attempts, self._wait_s = attempts, wait_s
        self._marks: dict[str, float] = {}
        if journal is not None and journal.exists():
            self._marks = dict(_read(journal))

    def __call__(self, prompt: str) -> float:
        """The mark.

        Raises:
            EndpointError: the server is down, refuses, or is no chat API.
            ValueError: the answer has no mark.
        """
        digest = hashlib.sha256(f"{self._model}\n{prompt}".encode()).hexdigest()
        if digest not in self._marks:
            found = _MARK.findall(self._answer(prompt))
            if not found:
                raise ValueError("the judge gave no mark between <score> and </score>")
            self._marks[digest] = min(_HIGHEST, float(found[-1])) / _HIGHEST
            self._keep(digest)
        return self._marks[digest]

    def _answer(self, prompt: str) -> str:
        message = {"role": "user", "content": prompt}
        answer = self._asked({"model": self._model, "messages": [message], "temperature": 0})
        try:
            return str(answer["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError):
            raise EndpointError(
                f"{self._url} answered without choices[0].message; is it a chat API?"
            ) from None

    def _asked(self, body: dict[str, Any]) -> Any:
        import httpx

        reason = ""
        for attempt in range(self._attempts):
            if attempt:
                time.sleep(self._wait_s * 2 ** (attempt - 1))
            try:
                response = self._client.post(self._url, json=body)
                if response.status_code not in _BUSY:
                    response.raise_for_status()
                    return response.json()
                reason = f"status {response.status_code}"
            except httpx.HTTPStatusError as error:
                status = error.response.status_code
                raise EndpointError(
                    f"the judge at {self._url} refused with {status}; check model and key"
                ) from error
            except (httpx.HTTPError, ValueError) as error:
                reason = first_line(error)
        reason = f"{reason}, {self._attempts} attempts"
        raise EndpointError(
            f"the judge at {self._url} cannot be reached ({reason}); start it, and run the same again: what "
            "was judged is kept"
        )

    def _keep(self, digest: str) -> None:
        if self._journal is None:
            return
        try:
            with open(self._journal, "a", encoding="utf-8") as file:
                file.write(f"\n{json.dumps([digest, self._marks[digest]])}\n")
        except OSError as error:
            raise unwritable(self._journal, error) from error


def _read(journal: Path) -> list[tuple[str, float]]:
    """Marks by prompt; a line that was torn by a kill is left out."""
    found = []
    for line in filter(None, journal.read_text(encoding="utf-8").splitlines()):
        try:
            digest, mark = json.loads(line)
        except ValueError:
            continue
        found.append((digest, mark))
    return found
