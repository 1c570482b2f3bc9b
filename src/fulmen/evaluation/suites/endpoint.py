"""A model behind an OpenAI-compatible address: `POST /completions` with text, greedy. Standard library only.

Completions, not chat: the prompts end with the first words of the answer, which a chat cannot.
"""

import json
from collections.abc import Callable
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from torch import Tensor

from fulmen.data import token_ids
from fulmen.errors import EndpointError
from fulmen.evaluation.suites.samples import Sample

TIMEOUT_S = 600.0


class EndpointResponder:
    """Asks an endpoint; it is one variant, "dense" (whatever attention it runs).

    Args:
        url: as `http://host:8000/v1`.
        model: the endpoint's name for it.
        tokenizer: of that model; lengths are counted with it, and prompts are made of its tokens.

    Raises:
        EndpointError: the address is none, cannot be reached, or has no such model.
    """

    variants: tuple[str, ...] = ("dense",)
    topk: int | None = None
    context: int | None = None

    def __init__(self, url: str, model: str, tokenizer: Any, timeout_s: float = TIMEOUT_S) -> None:
        self.url, self.model, self.tokenizer, self.timeout_s = url.rstrip("/"), model, tokenizer, timeout_s
        if urlsplit(url).scheme not in ("http", "https"):
            raise EndpointError(f"url={url!r} is no address; write it as http://host:8000/v1")
        known = [str(row.get("id")) for row in self._call("/models").get("data", [])]
        if known and model not in known:
            raise EndpointError(f"{self.url} has no model {model!r}; it has {', '.join(known[:8])}")

    def answer(self, sample: Sample, variant: str) -> str:
        """As `Responder.answer`."""
        return self._complete(sample.prompt_ids, sample.answer_tokens)

    def continue_text(self, prompt_ids: Tensor, n_tokens: int, variant: str) -> list[int]:
        """As `Responder.continue_text`, but the end of text may stop it; tokens of what came back as text."""
        return token_ids(self.tokenizer, self._complete(prompt_ids, n_tokens))

    def _complete(self, prompt_ids: Tensor, n_tokens: int) -> str:
        # The endpoint writes its own opening token.
        prompt = self.tokenizer.decode(prompt_ids.tolist(), skip_special_tokens=True)
        body = {"model": self.model, "prompt": prompt, "max_tokens": n_tokens, "temperature": 0}
        answer = self._call("/completions", body)
        try:
            return str(answer["choices"][0]["text"])
        except (KeyError, IndexError, TypeError):
            raise EndpointError(
                f"{self.url}/completions answered without choices[0].text: {json.dumps(answer)[:120]}; "
                "use an endpoint that completes text"
            ) from None

    def _call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data, {"Content-Type": "application/json"})

        def read() -> dict[str, Any]:
            with urlopen(request, timeout=self.timeout_s) as response:
                return json.loads(response.read())

        return _in_one_line(self.url + path, read)


def _in_one_line(url: str, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `read` returns; whatever goes wrong on the way is an EndpointError."""
    try:
        found = read()
    except HTTPError as error:
        said = " ".join(error.read().decode("utf-8", "replace").split())[:160]
        raise EndpointError(
            f"{url} answered {error.code} {error.reason}: {said or 'nothing more'}"
        ) from error
    except json.JSONDecodeError as error:
        raise EndpointError(f"{url} answered no JSON; give the address that ends in /v1") from error
    except (URLError, HTTPException, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise EndpointError(f"{url} cannot be reached ({reason}); is the server running?") from error
    if not isinstance(found, dict):
        raise EndpointError(f"{url} answered no JSON object; give the address that ends in /v1")
    return found
