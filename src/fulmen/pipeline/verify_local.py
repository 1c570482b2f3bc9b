"""A model that is loaded here; what is asked at the same time is written together."""

import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch

from fulmen.errors import UnsupportedModelError
from fulmen.modeling.checkpoint import load_dense
from fulmen.modeling.families import accelerate_model, dsa_of
from fulmen.pipeline.devices import device_of, move
from fulmen.pipeline.fingerprint import weights_fingerprint
from fulmen.pipeline.load import load_converted
from fulmen.pipeline.model_config import read_config
from fulmen.pipeline.verify_writers import Drawing, Messages

# Those that have their replies ask again in so many seconds, and are waited for.
GATHERING_S = 0.2


class _Asked(NamedTuple):
    """A reply to come."""

    ids: list[int]
    drawing: Drawing
    reply: "Future[str]"


class LocalWriter:
    """A model's directory or name, converted or not.

    Raises CheckpointError, UnsupportedModelError: a model that cannot be read; ConfigError: such a device.
    """

    def __init__(self, source: str, device: object) -> None:
        self.name = source
        place = device_of(device)
        is_converted = _is_converted(source)
        if is_converted:
            model, self._tokenizer = load_converted(source)
            accelerate_model(model)
        else:
            model, self._tokenizer = load_dense(source)
        self._model: Any = model.eval() if place is None else move(model.eval(), place)
        # Trained anew, or with another k, it is another one at the same place.
        dsa = dsa_of(model.config).to_dict() if is_converted else None
        self.identity = f"{source} {weights_fingerprint(model.state_dict())} {dsa}"
        # Torch's generator is one, and so are its threads.
        self._lock = threading.Lock()
        self._waiting: deque[_Asked] = deque()

    def write(self, messages: Messages, drawing: Drawing) -> str:
        """As `Writer.write`. Whoever comes first writes for all that wait."""
        text = self._text(messages)
        ids = self._tokenizer(text, add_special_tokens=not self._has_template)["input_ids"]
        asked = _Asked(ids, drawing, Future())
        self._waiting.append(asked)
        # Whoever has a reply meanwhile goes on at once: its next request joins those that wait.
        while not asked.reply.done():
            if self._lock.acquire(timeout=GATHERING_S):
                try:
                    time.sleep(GATHERING_S)
                    if not asked.reply.done():
                        self._write_next()
                finally:
                    self._lock.release()
        return asked.reply.result()

    def _write_next(self) -> None:
        """The next reply, with all that wait and are drawn alike; what is sampled has a seed of its own."""
        first, *others = [self._waiting.popleft() for _ in range(len(self._waiting))]
        alike = [] if first.drawing.temperature else [one for one in others if one.drawing == first.drawing]
        self._waiting.extend(one for one in others if one not in alike)
        try:
            replies = self._replies([one.ids for one in (first, *alike)], first.drawing)
        except BaseException as error:
            for one in (first, *alike):
                one.reply.set_exception(error)
            raise
        for one, reply in zip((first, *alike), replies, strict=True):
            one.reply.set_result(reply)

    @torch.no_grad()
    def _replies(self, prompts: list[list[int]], drawing: Drawing) -> list[str]:
        pad = self._tokenizer.eos_token_id
        width = max(map(len, prompts))
        rows = [[pad or 0] * (width - len(ids)) + ids for ids in prompts]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        ids_BS = torch.tensor(rows, device=self._model.device)
        sampled: dict[str, Any] = {"do_sample": False}
        if drawing.temperature:
            sampled |= {
                "do_sample": True,
                "temperature": drawing.temperature,
                "top_k": 0,
                "top_p": 1.0,
            }
        torch.manual_seed(drawing.number)
        written_BS = self._model.generate(
            ids_BS,
            attention_mask=torch.tensor(mask, device=ids_BS.device),
            max_new_tokens=drawing.max_new_tokens,
            pad_token_id=pad,
            **sampled,
        )
        replies: list[str] = self._tokenizer.batch_decode(written_BS[:, width:], skip_special_tokens=True)
        return replies

    @property
    def _has_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def _text(self, messages: Messages) -> str:
        if not self._has_template:
            return "\n\n".join(str(message["content"]) for message in messages) + "\n\n"
        text: str = self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False
        )
        return text


def _is_converted(source: str) -> bool:
    try:
        dsa_of(read_config(source)[1])
    except UnsupportedModelError:
        return False
    return True
