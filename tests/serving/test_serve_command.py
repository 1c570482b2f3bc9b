"""`fulmen serve` refuses what cannot be, before an engine is started."""

import asyncio
import socket
from importlib.util import find_spec

import pytest

if not find_spec("vllm"):
    pytest.skip("vLLM is not installed: pip install 'fulmen[serve-cpu]'", allow_module_level=True)

from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from fulmen.cli.main import app
from fulmen.cli.serve import longrope_note
from fulmen.serving.server import listen


@pytest.fixture
def model(tmp_path):
    """A model's directory without weights, which nothing here reads."""
    folder = tmp_path / "model"
    LlamaConfig(num_hidden_layers=2).save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"added_tokens": []}')
    return folder


@pytest.fixture
def refused(tmp_path):
    """The one line that `fulmen serve` says before it ends with code 2."""

    def run(*arguments):
        result = CliRunner().invoke(app, ["serve", *map(str, arguments), "--state", str(tmp_path / "state")])
        assert result.exit_code == 2, result.output
        assert not (tmp_path / "state" / "engine.log").exists()
        return result.stderr.strip()

    return run


def test_a_model_must_be_there_with_its_tokenizer(refused, model, tmp_path):
    assert "nowhere" in refused(tmp_path / "nowhere")
    (model / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refused(model)
    (model / "tokenizer.json").write_text("{")
    assert "tokenizer.json is no JSON" in refused(model)


def test_documents_to_ask_about_must_be_there(refused, model, tmp_path):
    assert "nowhere' cannot be read" in refused(model, "--docs", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no document (it is empty)" in refused(model, "--docs", tmp_path / "empty")


def test_an_address_for_others_needs_keys(refused, model):
    assert refused(model, "--host", "0.0.0.0", "--port", "0").startswith(
        "error: --host=0.0.0.0 lets others in, and there is no key; make one"
    )


def test_an_address_that_is_taken_is_said(refused, model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port} cannot be served at" in refused(model, "--port", port)


def test_flags_that_are_the_gateways_are_refused(tmp_path, model):
    arguments = ["serve", str(model), "--state", str(tmp_path / "state"), "--", "--uds", "/x"]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, "--uds is the gateway's to set" in result.stderr) == (2, True)


def test_a_first_token_does_not_wait_until_the_headers_are_acknowledged():
    """Fails where the listener's protocol is 0: asyncio then leaves Nagle's algorithm on."""

    async def connect():
        seen = asyncio.get_running_loop().create_future()

        async def answer(_, writer):
            seen.set_result(
                writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            )
            writer.close()

        with listen("127.0.0.1", 0) as listener:
            async with await asyncio.start_server(answer, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname())
                writer.close()
                return await seen

    assert asyncio.run(connect())


def test_longrope_is_said_where_vllm_takes_other_factors():
    factors = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 4096, **factors}
    config = LlamaConfig(max_position_embeddings=131072, rope_parameters=rope)
    (note,) = longrope_note(config, 131072)
    assert "texts up to 4,096 tokens" in note
    assert "--max-model-len 4096" in note
    assert longrope_note(config, 4096) == longrope_note(LlamaConfig(), 4096) == []


@pytest.fixture
def tiny_weights(model):
    """The directory's weights, small ones."""
    config = LlamaConfig(num_hidden_layers=2, hidden_size=8, intermediate_size=8, num_attention_heads=2)
    config.update({"vocab_size": 16, "tie_word_embeddings": True})
    LlamaForCausalLM(config).save_pretrained(model)
    return model / "model.safetensors"


def test_weights_that_are_no_good_are_said_before_the_engine_starts(refused, model, tiny_weights):
    whole = tiny_weights.read_bytes()
    tiny_weights.write_bytes(whole[:-1])
    assert "unreadable weights (model.safetensors" in refused(model)
    tiny_weights.rename(model / "pytorch_model.bin")
    assert "pickles only, as pytorch_model.bin" in refused(model)
