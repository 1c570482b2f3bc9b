"""RoPE that goes by the length of the text: a prompt in pieces has the table of the whole."""

import copy

import pytest
import torch
from transformers import GenerationConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fulmen.modeling.gqa import model as model_module
from fulmen.modeling.rope_tables import are_rotated_alike, restored_rope, rope_angles, rope_for_length
from tests.modeling.gqa.tiny_gqa import make_dense, make_dsa, random_ids

ORIGINAL, ROOMY, NEW = 32, 256, 5
# Shorter, longer, with an answer that goes across, and as long as it was made for.
LENGTHS = (20, 50, 30, ORIGINAL)
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0]}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "longrope": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL, **FACTORS},
    "llama3": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL, **LLAMA3},
    "proportional": {"factor": 2.0, "partial_rotary_factor": 0.5},
}
BY_LENGTH = {"dynamic", "longrope"}


def make_pair(rope, family="llama", topk=ROOMY):
    """Dense and converted models of a context of ORIGINAL tokens, of tables of their own."""
    rope_parameters = {"rope_type": rope, "rope_theta": 10000.0, **ROPES[rope]}
    # Dynamic NTK goes by this; LongRoPE and the others by `original_max_position_embeddings`.
    context = ORIGINAL if rope == "dynamic" else 4 * ORIGINAL
    if family == "gemma3":
        own = {"rope_type": "default", "rope_theta": 100.0}
        rope_parameters = {"full_attention": rope_parameters, "sliding_attention": own}
    changes = {"rope_parameters": rope_parameters, "max_position_embeddings": context}
    dense = make_dense(family, **({"head_dim": 16} if family in ("qwen3", "gemma3") else {}), **changes)
    return dense, make_dsa(dense, topk=topk)


def written(model, ids, **settings):
    """Logits [B, NEW, V] of a greedy answer."""
    settings = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": NEW, **settings}
    output = model.generate(ids, return_dict_in_generate=True, output_logits=True, **settings)
    return torch.stack(output.logits, 1)


def test_every_rope_of_transformers_is_tried():
    assert set(ROPES) == set(ROPE_INIT_FUNCTIONS) | {"default"}


@pytest.mark.parametrize("rope", ROPES)
def test_prompts_in_chunks_are_the_dense_models(rope):
    dense, dsa = make_pair(rope)
    for number, length in enumerate(LENGTHS):
        ids = random_ids(2, length, seed=number)
        expected = written(dense, ids)
        torch.testing.assert_close(written(dsa, ids, prefill_chunk_size=8), expected, **CLOSE)


# Transformers' LongRoPE fails at the second long text where kinds of layers have tables of their own.
OTHERS = [(rope, family) for rope in sorted(BY_LENGTH) for family in ("qwen2", "qwen3", "mistral")]


@pytest.mark.parametrize(("rope", "family"), [*OTHERS, ("dynamic", "gemma3")])
def test_so_are_those_of_other_families(rope, family):
    dense, dsa = make_pair(rope, family)
    ids = random_ids(1, 50)
    torch.testing.assert_close(written(dsa, ids, prefill_chunk_size=16), written(dense, ids), **CLOSE)


@pytest.mark.parametrize("rope", sorted(BY_LENGTH))
def test_padding_does_not_count(rope):
    """The longest row has 30 tokens: below what the model was made for, though the batch is 40 wide."""
    dense, dsa = make_pair(rope)
    ids, mask = random_ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[0, :10], mask[1, :25] = 0, 0
    expected = written(dense, ids, attention_mask=mask)
    torch.testing.assert_close(
        written(dsa, ids, attention_mask=mask, prefill_chunk_size=16), expected, **CLOSE
    )


@pytest.mark.parametrize("rope", sorted(BY_LENGTH))
@pytest.mark.parametrize(
    "settings", [{}, {"generation_config": GenerationConfig(do_sample=False, max_new_tokens=NEW)}]
)
def test_chunks_that_generate_chooses(rope, settings, monkeypatch):
    monkeypatch.setattr(model_module, "PREFILL_CHUNK", 16)
    dense, dsa = make_pair(rope)
    ids = random_ids(1, 50)
    torch.testing.assert_close(written(dsa, ids, **settings), written(dense, ids), **CLOSE)


@pytest.mark.parametrize("rope", sorted(BY_LENGTH))
def test_above_topk_pieces_select_what_the_whole_selects(rope):
    """Index keys are rotated by the same table as keys: the selection does not go by the pieces either."""
    _, dsa = make_pair(rope, topk=6)
    ids = random_ids(1, 50)
    with restored_rope(dsa):
        whole = written(dsa, ids)
    torch.testing.assert_close(written(dsa, ids, prefill_chunk_size=8), whole, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("rope", ROPES)
def test_angles_tell_which_lengths_are_rotated_alike(rope, family):
    dense, _ = make_pair(rope, family)
    before = copy.deepcopy(dense.model.rotary_emb.__dict__)
    assert are_rotated_alike(dense, 10, ORIGINAL)
    assert are_rotated_alike(dense, 10, ORIGINAL + 8) == (rope not in BY_LENGTH)
    assert are_rotated_alike(dense, ORIGINAL + 8, ORIGINAL + 30) == (rope != "dynamic")
    after = dense.model.rotary_emb.__dict__
    assert after.keys() == before.keys()
    assert all(map(torch.equal, after["_buffers"].values(), before["_buffers"].values()))


def test_no_text_leaves_a_trace():
    _, dsa = make_pair("dynamic")
    ids, longer = random_ids(1, 40), random_ids(1, 90)
    with restored_rope(dsa):
        fresh = written(dsa, ids)
    with restored_rope(dsa):
        written(dsa, longer)
    torch.testing.assert_close(written(dsa, ids), fresh, rtol=0, atol=0)


def test_a_model_without_tables_has_no_angles():
    assert rope_angles(torch.nn.Linear(2, 2), 5) is None
    with rope_for_length(torch.nn.Linear(2, 2), 5), restored_rope(torch.nn.Linear(2, 2)):
        pass
