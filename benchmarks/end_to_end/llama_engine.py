"""llama.cpp by the low-level interface of llama-cpp-python: an f16 cache, flash attention for prompts.

On the CPU its flash attention reads prompts faster and writes tokens slower than its ordinary attention: each
is timed with what is faster.

Imports nothing of fulmen's: the interpreter may be another. `bytes_of_state` knows how llama.cpp writes the
state of a sequence down; a version that writes another form is noticed.
"""

import ctypes
import math
import platform
import struct
import time
from typing import Any

import llama_cpp
import numpy as np

BATCH = 2048
TOKEN = 1000
# Between what a filled cache holds and what it has room for.
ROOM = 256


class Engine:
    """Settings: `model` (a GGUF file), `threads`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        llama_cpp.llama_backend_init()
        self.threads, self.context, self.position = settings["threads"], None, 0
        parameters = llama_cpp.llama_model_default_params()
        # Repacked for AMX, Q4_1 weights of SmolLM2-135M crash llama-cpp-python 0.3.36.
        parameters.use_extra_bufts = not settings["model"].endswith("Q4_1.gguf")
        self.model = llama_cpp.llama_model_load_from_file(settings["model"].encode(), parameters)
        assert self.model, f"llama.cpp cannot load {settings['model']}"
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.versions = {
            "llama-cpp-python": llama_cpp.__version__,
            "python": platform.python_version(),
            "built for": llama_cpp.llama_print_system_info().decode().strip(),
        }

    def answer(self, prompt: list[int], new_tokens: int) -> list[int]:
        """The greedy answer: the first token as prompts are timed, the others as tokens are."""
        self._open_for_prompt(len(prompt))
        tokens = [self._next(prompt)]
        self._open_for_tokens(len(prompt) + new_tokens, BATCH)
        self._next(prompt)
        while len(tokens) < new_tokens:
            tokens.append(self._next(tokens[-1:]))
        return tokens

    def prefill(self, prompt: list[int]) -> float:
        """Seconds until the first token of the answer."""
        self._open_for_prompt(len(prompt))
        begun = time.perf_counter()
        self._next(prompt)
        return time.perf_counter() - begun

    def fill(self, prompt: list[int]) -> None:
        """A state of random keys and values for as many tokens as the prompt has."""
        self._open_for_tokens(len(prompt) + ROOM, 1)
        self._next([TOKEN])
        size = llama_cpp.llama_state_seq_get_size(self.context, 0)
        one = (ctypes.c_uint8 * size)()
        llama_cpp.llama_state_seq_get_data(self.context, one, size, 0)
        state = bytes_of_state(bytes(one), len(prompt))
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        read = llama_cpp.llama_state_seq_set_data(self.context, pointer, state.nbytes, 0)
        last = llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(self.context), 0)
        assert (read, last) == (state.nbytes, len(prompt) - 1), "llama.cpp does not take the state"
        self.position = len(prompt)

    def decode(self, new_tokens: int) -> float:
        """Seconds of a token after the filled cache."""
        token = self._next([TOKEN])
        begun = time.perf_counter()
        for _ in range(new_tokens):
            token = self._next([token])
        seconds = time.perf_counter() - begun
        memory = llama_cpp.llama_get_memory(self.context)
        assert llama_cpp.llama_memory_seq_rm(memory, 0, self.position, -1)
        return seconds / new_tokens

    def release(self) -> None:
        """Give back the cache's memory."""
        if self.context is not None:
            llama_cpp.llama_free(self.context)
        self.context = None

    def _open_for_prompt(self, tokens: int) -> None:
        self._open(tokens, BATCH, llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED)

    def _open_for_tokens(self, tokens: int, batch: int) -> None:
        self._open(tokens, batch, llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED)

    def _open(self, tokens: int, batch: int, flash_attention: int) -> None:
        """An empty cache for so many tokens, so many of which are read at once."""
        self.release()
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch = tokens, batch
        parameters.n_threads = parameters.n_threads_batch = self.threads
        parameters.flash_attn_type = flash_attention
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        assert self.context, f"llama.cpp has no room for {tokens} tokens"

    def _next(self, tokens: list[int]) -> int:
        """The likeliest token after these."""
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            # A batch points to its tokens and does not keep them alive.
            ids = (llama_cpp.llama_token * len(part))(*part)
            code = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(ids, len(part)))
            assert code == 0, f"llama_decode: {code}"
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax())


def bytes_of_state(one: bytes, tokens: int) -> np.ndarray:
    """The state of a sequence of one token made into one of `tokens`, with random numbers.

    magic, sequence, streams, tokens; a triple (position, 1, sequence) for each token; whether values are
    transposed, layers; for the keys of each layer, then for the values: type, bytes of a row, the rows. Of
    transposed values, bytes of a number and numbers of a token stand in place of a row's.
    """
    sequence, count = struct.unpack_from("<4xi4xI", one)
    transposed, layers = struct.unpack_from("<II", one, 28)
    assert (count, transposed) == (1, 1), "another form of state"
    places = np.stack([np.arange(tokens), np.ones(tokens), np.full(tokens, sequence)], axis=1).astype("<i4")
    heads, offset = [], 36
    for place in range(2 * layers):
        sizes = struct.unpack_from("<4xQ" if place < layers else "<4xII", one, offset)
        heads.append((one[offset : offset + 12], math.prod(sizes)))
        offset += 12 + heads[-1][1]
    assert offset == len(one), "another form of state"
    state = np.empty(36 + 12 * (tokens - 1) + sum(12 + tokens * row for _, row in heads), np.uint8)
    position = put(state, 0, one[:12] + struct.pack("<I", tokens) + places.tobytes() + one[28:36])
    generator = np.random.default_rng(0)
    for head, row in heads:
        numbers = generator.standard_normal(tokens * row // 2, dtype=np.float32).astype("<f2")
        position = put(state, position, head + numbers.tobytes())
    return state


def put(state: np.ndarray, position: int, data: bytes) -> int:
    """Write `data` at `position`; where it ends."""
    state[position : position + len(data)] = np.frombuffer(data, np.uint8)
    return position + len(data)
