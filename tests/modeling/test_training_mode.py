"""Gradients: through sparse attention, under checkpointing, in the Trainer; to the indexer by its loss."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from fulmen import ConfigError
from fulmen.modeling.selectors import Selector, use_selector
from tests.modeling.gqa.tiny_gqa import FAMILIES, make_dense, make_dsa, random_ids

LENGTH, TIGHT, ROOMY = 20, 6, 64


def gradients(model, ids, **kwargs):
    model.zero_grad()
    model(ids, labels=ids, **kwargs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_below_topk_gradients_are_the_dense_models(name):
    dense = make_dense(name).train()
    dsa = make_dsa(make_dense(name), ROOMY).train()
    ids = random_ids(2, LENGTH)
    theirs, ours = gradients(dense, ids, use_cache=False), gradients(dsa, ids)
    assert set(ours) == set(theirs)
    for parameter_name, gradient in theirs.items():
        torch.testing.assert_close(ours[parameter_name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("topk", [TIGHT, ROOMY])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(topk, reentrant):
    model = make_dsa(make_dense("qwen2-mixed"), topk).train()
    ids = random_ids(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    expected = gradients(model, ids, attention_mask=mask)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for use_cache in (None, True):
        got = gradients(model, ids, attention_mask=mask, use_cache=use_cache)
        assert set(got) == set(expected)
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_language_model_loss_does_not_reach_the_indexer():
    model = make_dsa(make_dense("llama"), TIGHT).train()
    got = gradients(model, random_ids(1, LENGTH))
    assert not [name for name in got if "indexer" in name]
    assert "model.layers.0.self_attn.q_proj.weight" in got


class SumOfIndexInputs(Selector):
    """Stands for a loss on the indexer: collects a sum over everything the indexer computes."""

    def __init__(self):
        self.total = 0

    def is_needed(self, n_keys, topk):
        return True

    def select(self, inputs, topk):
        parts = (inputs.index_q_BTJE, inputs.index_k_BSIE, inputs.index_w_BTJ, inputs.index_b_BTJ)
        self.total = self.total + sum(part.square().sum() for part in parts)


def test_a_loss_on_the_index_inputs_reaches_the_indexer_alone():
    model, collector = make_dsa(make_dense("qwen3"), TIGHT).train(), SumOfIndexInputs()
    with use_selector(model, collector):
        model(random_ids(1, LENGTH))
    collector.total.backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {name for name, _ in model.named_parameters() if "indexer" in name}


def test_training_makes_no_cache_unless_asked():
    model = make_dsa(make_dense("llama"), TIGHT)
    ids = random_ids(1, LENGTH)
    assert model.train()(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values is not None
    with torch.no_grad():
        assert model.eval()(ids).past_key_values.get_seq_length() == LENGTH
        assert model(ids, use_cache=False).past_key_values is None
    model.gradient_checkpointing_enable()
    assert model.train()(ids, use_cache=True).past_key_values is None


def test_packed_documents_in_training():
    model = make_dsa(make_dense("llama"), TIGHT).train()
    documents = [random_ids(1, length, seed=length) for length in (12, 8)]
    position_ids = torch.cat((torch.arange(12), torch.arange(8)))[None]
    packed = model(torch.cat(documents, 1), position_ids=position_ids).logits
    alone = torch.cat([model(ids).logits for ids in documents], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=2e-5)


def test_attention_dropout_is_refused_in_training_only():
    model = make_dsa(make_dense("llama"), TIGHT)
    model.config.attention_dropout = 0.1
    model(random_ids(1, 8))
    with pytest.raises(ConfigError, match=r"attention_dropout=0\.1 is not supported in training"):
        model.train()(random_ids(1, 8))


def test_autocast_trains_float32_weights_in_bfloat16():
    model = make_dsa(make_dense("qwen2"), TIGHT).train()
    ids = random_ids(1, LENGTH)
    expected = cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:])
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_lowers_the_loss(tmp_path, checkpointing):
    torch.manual_seed(0)
    model = make_dsa(make_dense("llama3-rope"), TIGHT)
    rows = [{"input_ids": ids, "labels": ids} for ids in random_ids(4, LENGTH)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=checkpointing,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
