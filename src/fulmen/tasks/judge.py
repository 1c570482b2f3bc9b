"""A model at an OpenAI-compatible address that gives marks."""

import hashlib
import json
import re
from pathlib import Path

from fulmen.endpoints import Endpoint
from fulmen.errors import EndpointError, unwritable

TIMEOUT_S = 120.0
_MARK = re.compile(r"<score>\s*(\d+(?:\.\d+)?)\s*</score>")
_HIGHEST = 10.0


class Judge:
    """Gives a prompt's mark of 0 to 10, over 10.

    Args:
        url: as `http://127.0.0.1:8000/v1`.
        model: the server's name for it.
        api_key: None: FULMEN_API_KEY, if it is set.
        journal: a file that keeps marks, so that an interrupted run does not ask again; None: none.

    Raises EndpointError for what is no address.
    """

    def __init__(self, url: str, model: str, api_key: str | None = None, journal: Path | None = None) -> None:
        self._endpoint, self._model, self._journal = Endpoint(url, api_key, TIMEOUT_S), model, journal
        self._marks: dict[str, float] = {}
        if journal is not None and journal.exists():
            self._marks = dict(_read(journal))

    def __call__(self, prompt: str) -> float:
        """The mark.

        Raises:
            EndpointError: the server is down, stays busy, refuses, or is no chat API.
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
        body = {"model": self._model, "messages": [message], "temperature": 0}
        answer = self._endpoint.call_again("/chat/completions", body, lambda error, wait_s: None)
        try:
            return str(answer["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError):
            raise EndpointError(
                f"{self._endpoint.url} answered without choices[0].message; is it a chat API?"
            ) from None

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
