"""One conversation with a DSA model; its cache lives as long, so that a document is read once."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TextStreamer

from fulmen.errors import ConfigError
from fulmen.modeling.cache import CacheBytes, has_states
from fulmen.modeling.config_checks import require_sound_templates
from fulmen.modeling.families import accelerate_model, dsa_of, empty_cache, set_topk
from fulmen.modeling.lengths import PREFILL_CHUNK, context_of
from fulmen.modeling.rope_tables import restored_rope, rope_angles, rope_for_length
from fulmen.pipeline.load import load_converted_model, load_converted_tokenizer
from fulmen.pipeline.model_config import read_config
from fulmen.pipeline.reporter import Reporter, SilentReporter, reporter_of


class Turn(NamedTuple):
    """What one answer took.

    context: tokens in the cache at the end. read_per_step: tokens that attention read for the last one.
    reused: tokens that lay in the cache already. cache: bytes. first_token_s: seconds until the first token.
    tokens_per_s: of those after the first; None if there were none.
    """

    context: int
    read_per_step: int
    reused: int
    cache: CacheBytes
    first_token_s: float
    new_tokens: int
    tokens_per_s: float | None


class ChatSession:
    """Asks a model one question after the other and streams the answers.

    Args:
        model_dir: a converted model's directory.
        topk: tokens that each query keeps; None: the model's own.
        document: text before the first question.
        reporter: whom to tell of loading and reading; None: nobody.

    Raises:
        CheckpointError: no such model, or one that cannot be read.
        UnsupportedModelError: the model has no DSA.
        ConfigError: a topk that cannot be.
    """

    def __init__(
        self,
        model_dir: str | Path,
        topk: int | None = None,
        document: str = "",
        reporter: Reporter | None = None,
    ) -> None:
        self._reporter = reporter_of(reporter)
        self.tokenizer: Any = load_converted_tokenizer(model_dir)
        require_sound_templates(self.tokenizer, str(model_dir))
        self._context = context_of(read_config(model_dir)[1])
        self._messages: list[dict[str, str]] = []
        self._document = document
        if document:
            self._require_fit(len(self._encode([{"role": "user", "content": document}])), 1)
        with self._reporter.stage("Load"):
            self.model: Any = load_converted_model(model_dir)
        if topk is not None:
            set_topk(self.model, topk)
        self.topk = dsa_of(self.model.config).topk
        self._cached_ids = torch.empty(0, dtype=torch.long)
        self._cached_angles: Tensor | None = None
        accelerate_model(self.model)
        self._cache = empty_cache(self.model.config)

    @torch.no_grad()
    def ask(self, question: str, max_new_tokens: int, on_text: Callable[[str], None]) -> Turn:
        """Generate the answer; `on_text` gets it in pieces.

        Raises ConfigError if the conversation and the answer do not fit the model's context.
        """
        started = time.perf_counter()
        first = f"{self._document}\n\n" if self._document and not self._messages else ""
        messages = [*self._messages, {"role": "user", "content": first + question}]
        ids_S = self._encode(messages)
        self._require_fit(len(ids_S), max_new_tokens)
        reused = self._keep_common_start(ids_S)
        streamer = _TimedStreamer(self.tokenizer, on_text)
        with restored_rope(self.model):
            with rope_for_length(self.model, len(ids_S)):
                self._read(ids_S[reused:-1])
            all_ids_1S = self.model.generate(
                ids_S[None],
                attention_mask=torch.ones_like(ids_S[None]),
                past_key_values=self._cache,
                max_new_tokens=max_new_tokens,
                streamer=streamer,
            )
        # The last token was generated but never read.
        self._cached_ids = all_ids_1S[0, : self._cache.get_seq_length()]
        answer = self.tokenizer.decode(all_ids_1S[0, len(ids_S) :], skip_special_tokens=True)
        self._messages = [*messages, {"role": "assistant", "content": answer}]
        return self._turn(reused, started, streamer.token_times)

    def _encode(self, messages: list[dict[str, str]]) -> Tensor:
        if self.tokenizer.chat_template:
            encoded = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            text = "\n\n".join(message["content"] for message in messages)
            encoded = self.tokenizer(text, return_tensors="pt")
        ids_S: Tensor = encoded["input_ids"][0]
        return ids_S

    def _require_fit(self, n_tokens: int, max_new_tokens: int) -> None:
        if self._context and n_tokens + max_new_tokens > self._context:
            raise ConfigError(
                f"{n_tokens:,} tokens of document and conversation, and {max_new_tokens:,} for the answer, "
                f"exceed the model's context of {self._context:,}; shorten the document or lower "
                "max_new_tokens",
                arguments=["max_new_tokens"],
            )

    def _keep_common_start(self, ids_S: Tensor) -> int:
        """Drop from the cache what the new text does not begin with; return how many tokens stay."""
        # The last token is always read anew: its logits are wanted.
        n = min(len(ids_S) - 1, len(self._cached_ids))
        if not self._is_rotated_as_cached(len(ids_S)):
            n = 0
        differs = (ids_S[:n] != self._cached_ids[:n]).nonzero()
        kept = int(differs[0]) if len(differs) else n
        dropped = len(self._cached_ids) - kept
        if dropped and has_states(self._cache):
            self._cache.reset()
            kept = 0
        elif dropped:
            self._cache.crop(-dropped)
        self._cached_ids = self._cached_ids[:kept]
        return kept

    def _is_rotated_as_cached(self, length: int) -> bool:
        """Whether keys in the cache are those of a text of `length` tokens, where RoPE goes by the length."""
        angles, cached = rope_angles(self.model, length), self._cached_angles
        self._cached_angles = angles
        return angles is None or (cached is not None and torch.equal(angles, cached))

    def _read(self, new_ids_T: Tensor) -> None:
        """Fill the cache chunk by chunk; `generate` cannot do so behind a cache that is not empty."""
        is_long = len(new_ids_T) > PREFILL_CHUNK
        reporter: Reporter = self._reporter if is_long else SilentReporter()
        with reporter.stage("Read", counted=False):
            reporter.advance(0, len(new_ids_T))
            for place, chunk_T in enumerate(new_ids_T.split(PREFILL_CHUNK) if len(new_ids_T) else ()):
                self.model(chunk_T[None], past_key_values=self._cache, use_cache=True, logits_to_keep=1)
                # Known even if the user interrupts here.
                self._cached_ids = torch.cat((self._cached_ids, chunk_T))
                reporter.advance(place * PREFILL_CHUNK + len(chunk_T), len(new_ids_T))

    def _turn(self, reused: int, started: float, token_times: list[float]) -> Turn:
        context, n_new = self._cache.get_seq_length(), len(token_times)
        seconds = token_times[-1] - token_times[0]
        return Turn(
            context=context,
            read_per_step=min(self.topk, context),
            reused=reused,
            cache=self._cache.nbytes,
            first_token_s=token_times[0] - started,
            new_tokens=n_new,
            tokens_per_s=(n_new - 1) / seconds if n_new > 1 and seconds else None,
        )


class _TimedStreamer(TextStreamer):
    """Hands on text as soon as it is final, and notes when each token came."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.token_times: list[float] = []
        self._on_text = on_text

    def put(self, value: Tensor) -> None:
        """A token, or at first the prompt."""
        if not self.next_tokens_are_prompt:
            self.token_times.append(time.perf_counter())
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Text that no later token can change."""
        if text:
            self._on_text(text)
