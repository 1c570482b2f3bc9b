"""`fulmen chat` on a tiny random model: what it prints, what it reads, what it refuses."""

import json
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from fulmen.cli.chat import read_document
from fulmen.cli.main import app
from fulmen.errors import CheckpointError, ConfigError, CorpusError, UnsupportedModelError
from fulmen.pipeline import chat
from fulmen.pipeline.chat import ChatSession
from tests.cli.said import lines_that_stay

DOCUMENT = "The lighthouse keeper counts forty-two ships. " * 8


def call(*arguments, **options):
    return CliRunner().invoke(app, ["chat", *map(str, arguments)], **options)


@pytest.fixture
def session(dsa_dir):
    return ChatSession(dsa_dir)


def ask(session, question, max_new_tokens=6):
    pieces = []
    turn = session.ask(question, max_new_tokens, pieces.append)
    return "".join(pieces), turn


def test_one_question_brings_an_answer_and_one_line_about_it(start, dsa_dir):
    running = start("chat", dsa_dir, "--prompt", "Who are you?", "--max-new-tokens", 6)
    answer, said = running.communicate(timeout=120)
    assert running.returncode == 0
    assert answer.strip()
    (summary,) = lines_that_stay(said)
    pattern = (
        r"\[(\d+) tokens in context; 16 of \1 read per step; cache [\d.]+ MB, [\d.]+ MB of it index keys; "
        r"first token after [\d.]+ s, then [\d.]+ tokens/s\]"
    )
    assert re.fullmatch(pattern, summary), summary


def test_the_answer_is_what_the_model_generates(session, dsa_dir, tokenizer):
    answer, turn = ask(session, "Who are you?", 12)
    model = AutoModelForCausalLM.from_pretrained(dsa_dir)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who are you?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    new = model.generate(**prompt, max_new_tokens=12)[0, prompt["input_ids"].shape[1] :]
    assert answer == tokenizer.decode(new, skip_special_tokens=True)
    assert turn.new_tokens == 12
    assert turn.context == prompt["input_ids"].shape[1] + 11


def test_counts(session):
    _, turn = ask(session, "Who are you?", 1)
    token = 3 * torch.tensor([2 * 2 * 8 * 4, 2 * (4 + 2)])  # float32; 8-bit index keys and their scales
    assert turn.cache == tuple((turn.context * token).tolist())
    assert turn.read_per_step == 16
    assert turn.reused == 0
    assert turn.tokens_per_s is None


def test_topk_changes_what_is_read(dsa_dir):
    assert ask(ChatSession(dsa_dir, topk=7), "Who are you?")[1].read_per_step == 7
    _, turn = ask(ChatSession(dsa_dir, topk=400), "Who are you?")
    assert turn.read_per_step == turn.context


def test_the_document_is_read_once(dsa_dir):
    session = ChatSession(dsa_dir, document=DOCUMENT)
    _, first = ask(session, "How many ships?")
    _, second = ask(session, "Are you sure?")
    assert first.context > 80
    # The tokens of the first answer may be written otherwise once they are text; all before them is the same.
    assert second.reused >= first.context - 6
    assert second.context > first.context


def test_a_second_answer_is_that_of_a_model_without_memory(dsa_dir, tokenizer):
    session = ChatSession(dsa_dir, document=DOCUMENT)
    first, _ = ask(session, "How many ships?")
    second, _ = ask(session, "Are you sure?", 12)
    messages = [
        {"role": "user", "content": f"{DOCUMENT}\n\nHow many ships?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Are you sure?"},
    ]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = AutoModelForCausalLM.from_pretrained(dsa_dir)
    new = model.generate(**prompt, max_new_tokens=12)[0, prompt["input_ids"].shape[1] :]
    assert second == tokenizer.decode(new, skip_special_tokens=True)


def test_a_conversation_ends_with_an_empty_line_or_the_end_of_input(dsa_dir):
    for lines in ("one\ntwo\n\nnever read\n", "one\ntwo\n"):
        result = call(dsa_dir, "--max-new-tokens", 3, input=lines)
        assert result.exit_code == 0
        assert len(lines_that_stay(result.stderr)) == 2


def test_without_a_chat_template_the_text_goes_in_as_it_is(session, tokenizer):
    session.tokenizer.chat_template = None
    _, turn = ask(session, "Once upon a time", 3)
    assert turn.context == len(tokenizer("Once upon a time").input_ids) + 2


def test_a_document_beyond_the_context_is_refused_with_both_numbers(dsa_dir, tmp_path):
    (tmp_path / "long.txt").write_text(DOCUMENT * 8)
    result = call(dsa_dir, "--document", tmp_path / "long.txt", "--prompt", "How many?")
    assert result.exit_code == 2
    assert re.search(r"error: [\d]{3} tokens of document .* exceed the model's context of 512", result.stderr)
    session = ChatSession(dsa_dir)
    with pytest.raises(ConfigError, match="and 500 for the answer, exceed the model's context of 512"):
        session.ask("Hello", 500, print)


def test_documents_that_cannot_be_read(tmp_path):
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"abc\xff\x00")
    for name, words in (("none", "cannot be read"), ("empty", "is empty"), ("binary", "is no UTF-8 text")):
        with pytest.raises(CorpusError, match=words):
            read_document(tmp_path / name)


def test_models_that_cannot_chat(dense_dir, tmp_path, dsa_dir):
    with pytest.raises(
        UnsupportedModelError, match="'qwen2' is not a DSA model; convert it with fulmen first"
    ):
        ChatSession(dense_dir)
    with pytest.raises(CheckpointError, match="does not exist"):
        ChatSession(tmp_path / "no" / "such")
    (tmp_path / "config.json").write_text((dsa_dir / "config.json").read_text())
    with pytest.raises(CheckpointError, match="has no readable tokenizer"):
        ChatSession(tmp_path)
    with pytest.raises(ConfigError, match="topk=0"):
        ChatSession(dsa_dir, topk=0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a model directory, or a server with --url"),
        (["somewhere", "--url", "http://127.0.0.1:1"], "one of the two"),
        (["--url", "http://127.0.0.1:1", "--topk", "4"], "topk=4 is the server's"),
        (["--url", "127.0.0.1:8000"], "is no address"),
        (["--url", "http://127.0.0.1:1"], "cannot be reached"),
    ],
)
def test_a_server_is_named_alone_and_must_be_there(arguments, said):
    result = call(*arguments, "--prompt", "Hello")
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(lines_that_stay(result.stderr)) == 1


ROPE_BY_LENGTH = {
    "longrope": {
        "original_max_position_embeddings": 60,
        "factor": 8.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 3.0, 5.0, 7.0],
    },
    "dynamic": {"factor": 2.0},
}


@pytest.mark.parametrize("rope", ROPE_BY_LENGTH)
def test_a_conversation_that_outgrows_its_rope_is_read_anew(rope, dsa_dir, tokenizer, tmp_path, monkeypatch):
    """What lies in the cache was rotated for a shorter text; each answer is that of a fresh model."""
    monkeypatch.setattr(chat, "PREFILL_CHUNK", 16)
    folder = shutil.copytree(dsa_dir, tmp_path / "dsa")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": rope, **ROPE_BY_LENGTH[rope]}
    config["max_position_embeddings"] = 60 if rope == "dynamic" else 480
    (folder / "config.json").write_text(json.dumps(config))
    session, messages, reused = ChatSession(folder), [], []
    monkeypatch.setattr(session, "_require_fit", lambda *lengths: None)
    for question in ("Who are you?", "Are you sure?", "How many ships are there?", "And why so?"):
        answer, turn = ask(session, question, 8)
        messages.append({"role": "user", "content": question})
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        new = AutoModelForCausalLM.from_pretrained(folder).generate(**prompt, max_new_tokens=8)
        assert answer == tokenizer.decode(new[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        reused.append(turn.reused)
    assert 0 in reused[1:]
    # LongRoPE has two tables; dynamic NTK a new one with every token.
    assert (reused[3] > 0) == (rope == "longrope")
