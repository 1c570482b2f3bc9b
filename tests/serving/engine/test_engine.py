"""The engine's flags for kinds of models, and its life as a process: crash, restart, end.

Its life is shown on a small server of the standard library: what is watched is a process and an address.
"""

import asyncio
import os
import signal
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'fulmen[serve]'")

import psutil
from transformers import DeepseekV3Config, LlamaConfig

from fulmen.config import DsaConfig
from fulmen.errors import ConfigError, EngineError
from fulmen.serving.engine import process as engine_module
from fulmen.serving.engine.process import Engine
from fulmen.serving.engine.served_model import ServedModel
from fulmen.serving.engine.settings import GIB, EngineSettings, kv_gib, parser_flags
from tests.fork_server import Forked
from tests.processes import WAIT_S, family_of, runs, until
from tests.serving.engine.programs import CHILD, SERVER, Program


def served(template="", tokens=(), context=2048, **config):
    made = LlamaConfig(**config)
    return ServedModel(Path("nowhere"), "m", made, None, context, template, frozenset(tokens))


def deepseek(template="", tokens=()):
    config = DeepseekV3Config(num_hidden_layers=1)
    config.model_type = "deepseek_v32"
    return ServedModel(Path("nowhere"), "m", config, None, 2048, template, frozenset(tokens))


@pytest.mark.parametrize(
    ("model", "tool", "reasoning", "tokenizer"),
    [
        (served(), "hermes", None, None),
        (served("{% if tools %}<tool_call>{% endif %}"), "hermes", None, None),
        (served("<tool_call> <think> enable_thinking"), "hermes", "qwen3", None),
        (served("<tool_call><function=f> <think>"), "qwen3_coder", "deepseek_r1", None),
        (served("[TOOL_CALLS]"), "mistral", None, None),
        (served("<|python_tag|>"), "llama3_json", None, None),
        (deepseek(tokens=["<｜User｜>"]), "deepseek_v32", "deepseek_v3", "deepseek_v32"),
        (deepseek("<｜tool▁calls▁begin｜>", ["<｜User｜>"]), "deepseek_v3", "deepseek_v3", "hf"),
    ],
)
def test_parsers_fit_the_way_the_model_writes(model, tool, reasoning, tokenizer):
    flags = parser_flags(model)
    chosen = dict(zip(flags[1::2], flags[2::2], strict=True))
    assert chosen.get("--tool-call-parser") == tool
    assert chosen.get("--reasoning-parser") == reasoning
    assert chosen.get("--tokenizer-mode") == tokenizer


@pytest.mark.skipif("not __import__('importlib.util').util.find_spec('vllm')", reason="vLLM is not installed")
def test_vllm_knows_every_parser_that_is_chosen():
    tool_parsers = Path(sys.prefix).glob("lib/python*/site-packages/vllm/tool_parsers/__init__.py")
    names = next(tool_parsers).read_text() + (
        next(Path(sys.prefix).glob("lib/python*/site-packages/vllm/reasoning/__init__.py")).read_text()
    )
    models = [served(), served("<function=f> <think>"), served("[TOOL_CALLS] <think> enable_thinking")]
    for model in [
        *models,
        served("<|python_tag|>"),
        deepseek(tokens=["<｜User｜>"]),
        deepseek("<｜tool▁calls▁begin｜>"),
    ]:
        flags = parser_flags(model)
        assert f'"{flags[2]}":' in names
        if "--reasoning-parser" in flags:
            assert f'"{flags[-1]}":' in names


def test_the_cache_holds_the_requests_that_memory_allows(monkeypatch):
    memory = psutil.virtual_memory()  # which other programs change meanwhile
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    one = served(
        context=8192, hidden_size=576, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=30
    )
    assert kv_gib(one) == -(-16 * 8192 * 23040 // GIB) == 3
    huge = served(context=10**9, num_hidden_layers=100)
    assert 1 <= kv_gib(huge) <= max(1, psutil.virtual_memory().total / 2 / GIB)
    assert EngineSettings(huge).context * sum(huge.token_bytes) <= kv_gib(huge) * GIB


@pytest.mark.skipif("not __import__('importlib.util').util.find_spec('vllm')", reason="vLLM is not installed")
@pytest.mark.parametrize(("dtype", "is_dsa"), [("float16", True), ("float16", False), ("bfloat16", True)])
def test_float16_weights_run_in_bfloat16_under_sparse_attention(dtype, is_dsa):
    model = served(dtype=dtype)
    model = replace(model, dsa=DsaConfig(64, 2, 1, 8, (0,))) if is_dsa else model
    command = EngineSettings(model, ("--dtype", "float32")).command(Path("s"))
    chosen = [command[place + 1] for place, flag in enumerate(command) if flag == "--dtype"]
    # The user's comes last, and wins.
    assert chosen == [*["bfloat16"] * (is_dsa and dtype == "float16"), "float32"]


def test_the_engines_key_is_not_on_its_command_line_nor_shown():
    settings = EngineSettings(served())
    assert settings.environment(Path("f"))["VLLM_API_KEY"] == settings.key
    assert settings.key not in repr(settings)
    assert EngineSettings(served()).key != settings.key


def test_a_flag_that_opens_another_door_is_refused_at_once():
    with pytest.raises(ConfigError, match="--port is the gateway's to set"):
        EngineSettings(served(), ("--max-num-seqs", "4", "--port=1"))


def test_variables_of_the_user_win_but_open_no_door(monkeypatch):
    wanted = {"VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_API_KEY": "mine", "VLLM_SERVER_DEV_MODE": "1"}
    for name, value in {**wanted, "VLLM_HOST_IP": "0.0.0.0", "GLOO_SOCKET_IFNAME": "eth0"}.items():
        monkeypatch.setenv(name, value)
    settings = EngineSettings(served())
    chosen = settings.environment(Path("f"))
    assert (chosen["VLLM_LOGGING_LEVEL"], chosen["VLLM_SERVER_DEV_MODE"]) == ("DEBUG", "0")
    assert (chosen["VLLM_API_KEY"], chosen["VLLM_RPC_BASE_PATH"]) == (settings.key, "f")
    assert chosen["VLLM_HOST_IP"] == "127.0.0.1"
    addresses = psutil.net_if_addrs()[chosen["GLOO_SOCKET_IFNAME"]]
    assert "127.0.0.1" in [address.address for address in addresses]
    spread = EngineSettings(served(), ("--distributed-executor-backend", "ray")).environment(Path("f"))
    assert (spread["VLLM_HOST_IP"], spread["GLOO_SOCKET_IFNAME"]) == ("0.0.0.0", "eth0")


@pytest.mark.parametrize(
    ("flags", "disabled"),
    [((), True), (("--max-num-seqs", "4"), True), (("--no-enforce-eager",), False), (("--no_enf",), False)],
)
def test_nothing_is_compiled_while_others_wait_unless_asked_for(flags, disabled, monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    monkeypatch.setattr("fulmen.serving.engine.settings._has_gpu", lambda: False)
    chosen = EngineSettings(served(), flags).environment(Path("f"))
    assert (chosen.get("TORCHDYNAMO_DISABLE") == "1") is disabled


def test_a_file_of_flags_may_ask_for_the_compiler(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    file = tmp_path / "flags.yaml"
    file.write_text("no-enforce-eager: true\n")
    settings = EngineSettings(served(), ("--config", str(file)))
    assert "TORCHDYNAMO_DISABLE" not in settings.environment(tmp_path)


async def soon(condition):
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.02)


@pytest.fixture
def fast(monkeypatch):
    """The same life, with shorter waits."""
    for name, seconds in {"POLL_S": 0.02, "CHECK_S": 0.02, "FIRST_BACKOFF_S": 0.05, "STOP_S": 5.0}.items():
        monkeypatch.setattr(engine_module, name, seconds)


@pytest.mark.parametrize("killed", [0, 1], ids=["keeper", "engine"])
def test_a_killed_engine_comes_back_and_a_stopped_one_does_not(fast, tmp_path, killed):
    said = []

    async def live():
        engine = Engine(Program(SERVER), tmp_path / "state" / "log", said.append)
        await engine.start()
        first = family_of(engine.pid)
        assert engine.ready
        assert len(first) == 2
        assert stat.S_IMODE(engine.folder.stat().st_mode) == 0o700
        os.kill(first[killed].pid, signal.SIGKILL)
        await soon(lambda: not engine.ready)
        await soon(lambda: engine.ready)
        assert not any(map(runs, first))
        assert engine.restarts == 1
        last = family_of(engine.pid)
        await engine.stop()
        assert not engine.ready
        assert not any(map(runs, last))
        assert not engine.folder.exists()

    asyncio.run(live())
    assert ["lost" in line for line in said] == [True, False]
    assert str(tmp_path / "state" / "log") in said[0]
    starts = [line for line in (tmp_path / "state" / "log").read_text().splitlines() if "GET" not in line]
    assert [line.partition(",")[0] for line in starts] == 2 * ["--- an engine is started", "hello"]


def test_an_engine_that_does_not_start_says_why(fast, tmp_path):
    engine = Engine(Program("raise OSError('no weights here')"), tmp_path / "log", print)
    with pytest.raises(EngineError, match=r"ended with code 1: OSError: no weights here; see .*log"):
        asyncio.run(engine.start())


def test_all_of_an_engines_processes_end_with_it(fast, tmp_path):
    engine, found = Engine(Program(CHILD + SERVER), tmp_path / "log", print), []

    async def live():
        await engine.start()
        found.extend(family_of(engine.pid))
        assert len(found) == 4
        await engine.stop()

    asyncio.run(live())
    assert not any(map(runs, found))


# A gateway without its HTTP.
GATEWAY = """
import asyncio, pathlib, sys
from fulmen.serving.engine.process import Engine
from tests.serving.engine.programs import CHILD, SERVER, Program

log, place = map(pathlib.Path, sys.argv[1:])
engine = Engine(Program(CHILD + SERVER), log, print)
async def live():
    place.write_text(str(engine.folder))
    await engine.start()
    await asyncio.sleep(600)

asyncio.run(live())
"""


@pytest.mark.parametrize("ready", [False, True], ids=["starting", "running"])
def test_a_killed_gateway_leaves_nothing(tmp_path, ready):
    log, place = tmp_path / "log", tmp_path / "place"
    gateway = Forked(GATEWAY, log, place)
    folder = Path(until(lambda: place.exists() and place.read_text()))
    until(lambda: len(family_of(gateway.pid)) > 1)
    if ready:
        until(lambda: log.exists() and "hello" in log.read_text())
    _, *below = family_of(gateway.pid)
    os.kill(gateway.pid, signal.SIGKILL)
    gateway.wait(WAIT_S)
    until(lambda: not any(map(runs, below)) and not folder.exists())
    assert len(below) == 4 or not ready
