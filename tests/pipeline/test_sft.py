"""`fulmen.sft` and its command: from a file of chats to a model directory."""

import json

import pytest
from typer.testing import CliRunner

import fulmen
from fulmen.cli.main import app
from fulmen.errors import ConfigError, CorpusError, ResumeError
from fulmen.pipeline.lessons import Lesson, read_lessons
from fulmen.pipeline.verify import write_proofs
from tests.modeling.gqa.tiny_gqa import make_dense
from tests.pipeline.tiny_runs import convert, save_tiny, settings, tiny_tokenizer
from tests.tiny_source import save_tiny_source

TINY = {"steps": 4, "batch": 2, "lora": 4, "learning_rate": 1e-2, "device": "cpu"}


def chat(*contents, roles=("user", "assistant") * 3):
    return {
        "messages": [
            {"role": role, "content": content} for role, content in zip(roles, contents, strict=False)
        ]
    }


def write(path, *rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_a_converted_model_learns_chats_under_sparse_attention(tmp_path, corpus_dir):
    source = save_tiny(make_dense("llama3-rope"), tmp_path / "dense")
    converted = convert(settings(source, tmp_path / "dsa", corpus_dir, stages=("inherit",), steps=None))
    data = write(tmp_path / "chats.jsonl", *(chat("w5 w6 w7 " * 20, f"w{n} w9") for n in range(10, 14)))
    done = fulmen.sft(converted, data=data, out=tmp_path / "sft", **{**TINY, "steps": 20})
    assert done.record["stages"] == ["inherit", "sft"]
    assert done.record["sft"]["replies"] == 4
    assert done.record["stages_done"]["sft"]["loss_last"] < done.record["stages_done"]["sft"]["loss_first"]
    assert len((tmp_path / "sft" / "stages" / "sft.jsonl").read_text().splitlines()) == 20
    model, _ = fulmen.load(done)
    assert type(model).__name__ == "LlamaDsaForCausalLM"


def test_the_command_takes_what_verify_make_writes(tmp_path):
    source = save_tiny_source(tmp_path / "tiny", max_position_embeddings=4096)
    write_proofs(tmp_path / "chats.jsonl", n=2, kind="words", chat=True)
    asked = ["sft", source, "--data", tmp_path / "chats.jsonl", "--steps", 1, "--batch", 1, "--full"]
    done = CliRunner().invoke(app, [*map(str, asked), "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "1 steps" in done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_last_reply_is_learned(tmp_path):
    path = write(tmp_path / "chats.jsonl", {"id": 3, **chat("a", "b", "c", "d")})
    asked = [{"role": role, "content": word} for role, word in zip(("user", "assistant", "user"), "abc")]  # noqa: B905
    assert read_lessons(path) == [Lesson(asked, "d")]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([], r"row 2 has no chat; it needs messages"),
        ({"text": "a"}, r"row 2 has no chat"),
        ({"messages": "a"}, r"row 2 has no chat"),
        (chat("a"), r"row 2 has no chat; it needs messages, a list of two or more"),
        (chat("a", " "), r"row 2 has no chat"),
        (chat("a", None), r"row 2 has no chat"),
        (chat("a", "b", roles=("user", "robot")), r"a role \(system, user, assistant\)"),
        (chat("a", "b", "c"), r"row 2 ends with no reply to learn; its last message must be the assistant's"),
    ],
)
def test_rows_that_are_no_chats(row, said, tmp_path):
    with pytest.raises(CorpusError, match=said):
        read_lessons(write(tmp_path / "chats.jsonl", chat("a", "b"), row))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": 10**9}, "steps=1000000000 of batch=2 cannot be listed"),
        ({"learning_rate": True}, "learning_rate=True cannot be"),
        ({"data": None}, "data=None cannot be; name a file"),
        ({"lora": 4, "full": True}, "give one of them"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"seed": -1}, "seed=-1"),
        ({"bf16": "yes"}, "bf16='yes'"),
        ({"source": ""}, "source=''"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(changed, said, tmp_path):
    asked = {"source": "none", "data": tmp_path / "none.jsonl", "out": tmp_path / "out", **TINY, **changed}
    with pytest.raises(ConfigError, match=said):
        fulmen.sft(asked.pop("source"), **asked)
    assert list(tmp_path.iterdir()) == []


def test_a_chat_that_the_template_refuses_is_told_in_one_line(tmp_path):
    source = save_tiny(make_dense(), tmp_path / "dense")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('only users\nmay speak') }}"
    tokenizer.save_pretrained(source)
    data = write(tmp_path / "chats.jsonl", chat("w5", "w6"))
    with pytest.raises(ConfigError, match=r"refuses .*w5.* \(only users may speak\); change that chat"):
        fulmen.sft(source, data=data, out=tmp_path / "out", **TINY)


def test_other_chats_do_not_go_on_with_an_unfinished_run(tmp_path, monkeypatch):
    source, data = save_tiny(make_dense(), tmp_path / "dense"), tmp_path / "chats.jsonl"
    write(data, chat("w5", "w6"), chat("w7", "w8"))

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fulmen.pipeline.sft.train_sft", stop)
        with pytest.raises(KeyboardInterrupt):
            fulmen.sft(source, data=data, out=tmp_path / "out", **TINY)
    write(data, chat("w5", "w6"), chat("w7", "w9"))
    with pytest.raises(ResumeError, match="rows_digest"):
        fulmen.sft(source, data=data, out=tmp_path / "out", **TINY)
    done = fulmen.sft(source, data=data, out=tmp_path / "out", overwrite=True, **TINY)
    assert done.record["stages"] == ["sft"]
