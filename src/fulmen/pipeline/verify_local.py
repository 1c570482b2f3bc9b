"""A model that is loaded here and writes replies, one at a time."""

import threading
from typing import Any

import torch

from fulmen.errors import UnsupportedModelError
from fulmen.modeling.checkpoint import load_dense
from fulmen.modeling.families import accelerate_model, dsa_of
from fulmen.pipeline.devices import device_of, move
from fulmen.pipeline.fingerprint import weights_fingerprint
from fulmen.pipeline.load import load_converted
from fulmen.pipeline.model_config import read_config
from fulmen.pipeline.verify_writers import Drawing, Messages


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

    @torch.no_grad()
    def write(self, messages: Messages, drawing: Drawing) -> str:
        """As `Writer.write`."""
        text = self._text(messages)
        encoded = self._tokenizer(text, return_tensors="pt", add_special_tokens=not self._has_template)
        ids_1S = encoded["input_ids"].to(self._model.device)
        sampled: dict[str, Any] = {"do_sample": False}
        if drawing.temperature:
            sampled |= {
                "do_sample": True,
                "temperature": drawing.temperature,
                "top_k": 0,
                "top_p": 1.0,
            }
        with self._lock:
            torch.manual_seed(drawing.number)
            written_1S = self._model.generate(
                ids_1S,
                attention_mask=torch.ones_like(ids_1S),
                max_new_tokens=drawing.max_new_tokens,
                pad_token_id=self._tokenizer.eos_token_id,
                **sampled,
            )
        reply: str = self._tokenizer.decode(written_1S[0, ids_1S.shape[1] :], skip_special_tokens=True)
        return reply

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
