"""The GQA indexer against its formula, head by head and pair by pair."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from fulmen.config import DsaConfig
from fulmen.modeling.gqa.indexer import GqaIndexer
from fulmen.ops.common.rope import apply_rope

J, I, E, H, G, D, C, T = 4, 2, 6, 4, 2, 8, 32, 5  # noqa: E741
CONFIG = LlamaConfig(
    hidden_size=C, num_attention_heads=H, num_key_value_heads=G, head_dim=D, num_hidden_layers=1
)


@pytest.fixture
def parts():
    torch.manual_seed(0)
    indexer = GqaIndexer(CONFIG, DsaConfig(4, J, I, E, (0,)))
    x, q, k = torch.randn(2, T, C), torch.randn(2, T, H, D), torch.randn(2, T, G, D)
    cos, sin = LlamaRotaryEmbedding(CONFIG)(x, torch.arange(3, 3 + T)[None])
    return indexer, x, q, k, cos, sin


def turn(vector, pairs, cos, sin):
    """One index head of one token, pair by pair."""
    turned = vector.clone()
    for p, pair in enumerate(pairs):
        a, b = vector[p], vector[p + E // 2]
        c, s = (cos[pair], sin[pair]) if pair < D // 2 else (1.0, 0.0)
        turned[p], turned[p + E // 2] = a * c - b * s, b * c + a * s
    return turned


def test_every_head_turns_by_the_rotary_pairs_of_its_key_group(parts):
    indexer, x, q, k, cos, sin = parts
    indexer.rope_pairs.copy_(torch.tensor([[3, 0, 4], [1, 4, 2]]))  # 4: does not turn
    with torch.no_grad():
        inputs = indexer(x, q, k, cos, sin)
        for b, t in [(0, 0), (1, T - 1)]:
            bare_q = (indexer.wq.weight @ q[b, t].flatten()).view(J, E)
            bare_k = (indexer.wk.weight @ k[b, t].flatten()).view(I, E)
            for j in range(J):
                expected = turn(bare_q[j], indexer.rope_pairs[j // (J // I)].tolist(), cos[0, t], sin[0, t])
                torch.testing.assert_close(inputs.q_BTJE[b, t, j], expected)
            for i in range(I):
                expected = turn(bare_k[i], indexer.rope_pairs[i].tolist(), cos[0, t], sin[0, t])
                torch.testing.assert_close(inputs.k_BTIE[b, t, i], expected)
            weights = indexer.weights_proj.weight @ x[b, t] + indexer.weights_proj.bias
            shifts = indexer.shift_proj.weight @ x[b, t] + indexer.shift_proj.bias
            torch.testing.assert_close(inputs.w_BTJ[b, t], weights)
            torch.testing.assert_close(inputs.b_BTJ[b, t], shifts)


def test_a_copied_pair_scores_as_the_model_itself(parts):
    """wq and wk that pick one rotary pair of head 0 make q.k of that pair after the model's own RoPE."""
    indexer, x, q, k, cos, sin = parts
    with torch.no_grad():
        indexer.wq.weight.zero_()
        indexer.wk.weight.zero_()
        for weight in (indexer.wq.weight, indexer.wk.weight):
            weight[0, 2] = weight[E // 2, 2 + D // 2] = 1.0
        indexer.rope_pairs[0] = torch.tensor([2, 4, 4])
        inputs = indexer(x, q, k, cos, sin)
        model_q, model_k = apply_rope(q, cos, sin)[:, :, 0], apply_rope(k, cos, sin)[:, :, 0]
        dims = [2, 2 + D // 2]
        expected = torch.einsum("btd,bsd->bts", model_q[..., dims], model_k[..., dims])
        scores = torch.einsum("bte,bse->bts", inputs.q_BTJE[:, :, 0], inputs.k_BTIE[:, :, 0])
    torch.testing.assert_close(scores, expected)


def test_apply_rope_is_the_stock_rotation_bit_for_bit(parts):
    _, _, q, k, cos, sin = parts
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [tensor.to(dtype) for tensor in (q, k, cos, sin)]
        stock_q, stock_k = apply_rotary_pos_emb(*tensors, unsqueeze_dim=2)
        assert torch.equal(apply_rope(tensors[0], *tensors[2:]), stock_q)
        assert torch.equal(apply_rope(tensors[1], *tensors[2:]), stock_k)


def test_partial_rope_leaves_the_further_dims(parts):
    _, _, q, _, cos, sin = parts
    pairs = torch.tensor([0, 1])
    narrow_cos, narrow_sin = (table[..., torch.cat((pairs, pairs))] for table in (cos, sin))
    turned = apply_rope(q, narrow_cos, narrow_sin)
    assert torch.equal(turned[..., 4:], q[..., 4:])
    assert torch.equal(turned[..., :4], apply_rope(q[..., :4], narrow_cos, narrow_sin))


def test_partial_rope_indexer_treats_the_number_of_rotary_pairs_as_no_rotation(parts):
    indexer, x, q, k, cos, sin = parts
    pairs = torch.tensor([0, 1])
    narrow_cos, narrow_sin = (table[..., torch.cat((pairs, pairs))] for table in (cos, sin))
    indexer.rope_pairs.fill_(2)
    with torch.no_grad():
        inputs = indexer(x, q, k, narrow_cos, narrow_sin)
        torch.testing.assert_close(inputs.k_BTIE.flatten(2), indexer.wk(k.flatten(2)))
