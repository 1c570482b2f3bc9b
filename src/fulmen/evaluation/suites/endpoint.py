"""A model behind an OpenAI-compatible address: `POST /completions` with text, greedy.

Completions, not chat: the prompts end with the first words of the answer, which a chat cannot.
"""

import json
from typing import Any

from torch import Tensor

from fulmen.data import token_ids
from fulmen.endpoints import TIMEOUT_S, Endpoint
from fulmen.errors import EndpointError
from fulmen.evaluation.suites.samples import Sample


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
        self.model, self.tokenizer = model, tokenizer
        self._server = Endpoint(url, timeout_s=timeout_s)
        self.url = self._server.url
        known = [row["id"] for row in self._server.models()]
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
        answer = self._server.call("/completions", body)
        try:
            return str(answer["choices"][0]["text"])
        except (KeyError, IndexError, TypeError):
            raise EndpointError(
                f"{self.url}/completions answered without choices[0].text: {json.dumps(answer)[:120]}; "
                "use an endpoint that completes text"
            ) from None
