"""Supervised fine-tuning: what is learned, what stays, and a run that is interrupted."""

import json
import math

import pytest
import torch

from fulmen.errors import ConfigError
from fulmen.modeling.families import accelerated
from fulmen.training.sft.rows import IGNORED, SftRow, batches, collate, labelled_replies, sft_row
from fulmen.training.sft.run import LOG_FILE, train_sft
from fulmen.training.sft.settings import SftSettings
from tests.modeling.gqa.tiny_gqa import make_dense, make_dsa
from tests.pipeline.tiny_runs import tiny_tokenizer

ROWS = [SftRow(tuple(range(2, 2 + length)), (10, 11, 1)) for length in range(3, 19)]


def tiny_model(dtype=torch.float32):
    return make_dsa(make_dense("llama", dtype), topk=6)


def test_batches_have_every_row_once_before_any_again():
    drawn = batches(ROWS, 4, 8, seed=3)
    assert [len(batch) for batch in drawn] == [4] * 8
    assert sorted(map(len, (row for batch in drawn[:8] for row in batch))) == sorted([*map(len, ROWS)] * 2)
    assert drawn == batches(ROWS, 4, 8, seed=3)
    assert drawn != batches(ROWS, 4, 8, seed=4)
    # Of like lengths.
    assert all(len(batch[-1]) - len(batch[0]) <= 6 for batch in drawn)


def test_only_replies_have_labels():
    inputs = collate([SftRow((5, 6, 7), (8, 1)), SftRow((5,), (9, 9, 1))], pad=0)
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 8, 1], [5, 9, 9, 1, 0]]
    assert inputs["labels"].tolist() == [[IGNORED] * 3 + [8, 1], [IGNORED, 9, 9, 1, IGNORED]]
    replies = labelled_replies(**inputs)
    assert replies.starts_B.tolist() == [3, 1]
    assert replies.tokens_BT[replies.counts_BT].tolist() == [8, 1, 9, 9, 1]
    assert replies.counts_BT.tolist() == [[True, True, False], [True] * 3]


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3-next", "gpt-oss"])
def test_the_loss_is_the_models_own(name, tmp_path):
    """The mean over the replies' tokens, whatever the rows begin with and the head does."""
    model = make_dsa(make_dense(name), topk=6)
    rows = [SftRow((*range(2, 14), *row.prompt), row.reply) for row in ROWS[:4]]
    batch = batches(rows, 4, 1, seed=0)[0]
    inputs = collate(batch, 0)
    mask = (torch.arange(inputs["labels"].shape[1]) < torch.tensor([[len(row)] for row in batch])).long()
    with torch.no_grad():
        expected = float(model(**inputs, attention_mask=mask).loss)
    result = train_sft(model, rows, 0, tmp_path / "run", SftSettings(1, batch=4))
    assert result.loss_first == pytest.approx(expected, rel=1e-5)


def test_a_row_ends_and_is_in_the_chat_template():
    tokenizer = tiny_tokenizer()
    messages = [{"role": "user", "content": "w5 w6"}]
    assert sft_row(tokenizer, messages, "w7") == SftRow((5, 6), (7, 1))
    tokenizer.chat_template = (
        "{% for m in messages %}w3 {{ m.content }} {% endfor %}{% if add_generation_prompt %}w4{% endif %}"
    )
    assert sft_row(tokenizer, messages, "w7 w8") == SftRow((3, 5, 6, 4), (7, 8, 1))
    with pytest.raises(ConfigError, match="has no tokens"):
        sft_row(tokenizer, messages, "")
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no reply would end"):
        sft_row(tokenizer, messages, "w7")


@pytest.mark.parametrize(("lora", "dtype"), [(None, torch.float32), (4, torch.float32), (4, torch.bfloat16)])
def test_replies_are_learned_and_indexers_stay(lora, dtype, tmp_path):
    model = tiny_model(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = SftSettings(20, batch=4, learning_rate=1e-2, lora=lora)
    with accelerated(model):
        result = train_sft(model, ROWS, 0, tmp_path / "run", settings)
    after = model.state_dict()
    assert result.loss_last < 0.7 * result.loss_first
    assert result.steps == 20
    assert after.keys() == before.keys()
    assert all(tensor.dtype == before[name].dtype for name, tensor in after.items())
    indexers = [name for name in after if ".indexer." in name]
    assert indexers
    assert all(torch.equal(after[name], before[name]) for name in indexers)
    assert any(not torch.equal(after[name], before[name]) for name in after)


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path):
    settings = SftSettings(6, batch=2, learning_rate=1e-3, lora=2, save_every=2)

    class Stop(Exception):
        pass

    def stop(step, steps, logs):
        if step == 5:
            raise Stop

    whole, parts = tiny_model(), tiny_model()
    train_sft(whole, ROWS, 0, tmp_path / "whole", settings)
    with pytest.raises(Stop):
        train_sft(parts, ROWS, 0, tmp_path / "parts", settings, stop)
    parts = tiny_model()
    train_sft(parts, ROWS, 0, tmp_path / "parts", settings)
    assert all(map(torch.equal, whole.state_dict().values(), parts.state_dict().values()))
    logs = [(tmp_path / name / LOG_FILE).read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert [json.loads(line)["step"] for line in logs[0].splitlines()] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(json.loads(line)["loss"]) for line in logs[0].splitlines())


def test_what_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match="no reply to learn"):
        train_sft(tiny_model(), [], 0, tmp_path, SftSettings(1))
    with pytest.raises(ConfigError, match=r"chat \d+ has \d+ tokens .* context \d+; shorten it"):
        train_sft(tiny_model(), [SftRow((2,) * 10**4, (1,))], 0, tmp_path, SftSettings(1))
    for wrong in ({"steps": 0}, {"steps": 1, "batch": 0}, {"steps": 1, "lora": -1}):
        with pytest.raises(ConfigError):
            SftSettings(**wrong)
    with pytest.raises(ConfigError, match="learning_rate"):
        SftSettings(1, learning_rate=0.0)
