"""What is compared, and the process of each."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gguf import GGMLQuantizationType as Type

from benchmarks.end_to_end.weights import write_gguf
from fulmen.errors import UnsupportedModelError
from fulmen.serving.engine.settings import LARGE_PAGES

LLAMA_FORMS = {"bf16": (Type.BF16, Type.BF16), "Q4_1": (Type.Q4_1, Type.Q8_0)}
"""As llama.cpp's own converter and quantiser choose them: matrices, embeddings."""


ENGINES = ["vllm", "llama.cpp", "transformers"]


class EngineError(RuntimeError):
    """An engine's process ended."""


class EngineSetup(NamedTuple):
    """An engine with a model.

    Attributes:
        name: engine and "dsa", "dense" or the form of the weights.
        engine: of `worker.ENGINES`.
        model: what the engine loads.
        dtype: of the weights.
        python: the interpreter of its process.
        overrides: of the model's config, in vLLM.
    """

    name: str
    engine: str
    model: Path
    dtype: str = "bfloat16"
    python: str = sys.executable
    overrides: dict[str, Any] = {}  # noqa: RUF012  never changed

    @property
    def sparse(self) -> bool:
        return self.name.endswith("dsa")


class Worker:
    """The process of an engine. What its libraries print goes to `log`.

    Raises:
        EngineError: when the process has ended, with the last line that it printed.
    """

    def __init__(self, setup: EngineSetup, settings: dict[str, Any], log: Path) -> None:
        self.name, self.log = setup.name, log
        given = {"engine": setup.engine, "model": str(setup.model), "dtype": setup.dtype}
        given |= {"overrides": setup.overrides, **settings}
        command = [setup.python, str(Path(__file__).with_name("worker.py")), json.dumps(given)]
        with log.open("w") as printed:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=printed, text=True, bufsize=1
            )
        self.versions = self._reply()

    def ask(self, method: str, *arguments: Any) -> Any:
        """What the engine's method returns."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps([method, *arguments]) + "\n")
        return self._reply()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _reply(self) -> Any:
        assert self.process.stdout
        if line := self.process.stdout.readline():
            return json.loads(line)
        printed = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        code, last = self.process.wait(), printed[-1] if printed else "nothing printed"
        raise EngineError(f"{self.name} ended with code {code} ({self.log}): {last}")


def set_environment(threads: int, cache_bytes: float) -> None:
    """For the processes of all engines; vLLM takes its room for the cache in whole GiB.

    All get memory in pages of 2 MiB, as `fulmen serve` sets for its engine.
    """
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE=str(int(cache_bytes // 2**30) + 1),
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_ALLOW_LONG_MAX_MODEL_LEN="1",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
        OMP_NUM_THREADS=str(threads),
        **LARGE_PAGES,
    )


def bytes_per_token(model: Path, setup: EngineSetup) -> int:
    """Bytes that an engine takes for a token of a filled cache, keys and values in 16 bits."""
    config = json.loads((model / "config.json").read_text())
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    keys_and_values = config["num_hidden_layers"] * config["num_key_value_heads"] * width * 2 * 2
    if setup.engine == "llama.cpp":  # it copies a state into its cache
        return 2 * keys_and_values
    dsa = config["dsa"]
    index_keys = len(dsa["layers"]) * dsa["index_n_kv_heads"] * (dsa["index_head_dim"] + 2)
    return keys_and_values + index_keys * setup.sparse


def all_engines(
    model: Path, dense: Path, folder: Path, llama_python: str, engines: list[str]
) -> Iterator[EngineSetup]:
    """In the order in which they get memory at long contexts: what the headline needs comes first."""
    if "vllm" in engines:
        yield EngineSetup("vllm dsa", "vllm", model)
        yield EngineSetup("vllm dense", "vllm", dense)
    if "llama.cpp" in engines:
        yield from llama_engines(dense, folder, llama_python)
    if "transformers" in engines:
        yield EngineSetup("transformers dense", "transformers", dense)
        yield EngineSetup("transformers dsa", "transformers", model)


def llama_engines(dense: Path, folder: Path, python: str) -> Iterator[EngineSetup]:
    """llama.cpp's; prints why and yields none where there is no llama.cpp, or the model is not for it."""
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode:
        print(f"llama.cpp: not measured: {python} has no llama_cpp; name one that has with --llama-python")
        return
    try:
        for form, types in LLAMA_FORMS.items():
            file = write_gguf(dense, folder / f"{form}.gguf", *types)
            yield EngineSetup(f"llama.cpp {form}", "llama.cpp", file, form, python)
    except UnsupportedModelError as error:
        print(f"llama.cpp: not measured: {error}")
