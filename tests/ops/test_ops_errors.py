"""Inputs that cannot be: one line that names the tensor and the value."""

import pytest
import torch

from fulmen.errors import BackendError, ConfigError
from fulmen.ops.attention.dense import dense_attention
from fulmen.ops.attention.sparse import sparse_attention
from fulmen.ops.losses.indexer import indexer_loss, indexer_loss_selected
from fulmen.ops.losses.selection import selection_loss
from fulmen.ops.scores import index_scores
from fulmen.ops.topk import index_topk, select_topk
from tests.ops.ops_cases import op_inputs

B, T, S, H, G, D, J, E, K = 2, 3, 5, 4, 2, 4, 4, 6, 2
INDEX_KEYS = 2


WRONG = [
    (dense_attention, "k_BSGD", torch.ones(B, S, G, D + 1), r"k_BSGD has D=5, .* D=4"),
    (dense_attention, "v_BSGV", torch.ones(B, S + 1, G, D), r"v_BSGV has S=6"),
    (dense_attention, "q_BTHD", torch.ones(B, T, H), r"q_BTHD has shape \(2, 3, 4\); .* 4 axes BTHD"),
    (dense_attention, "q_BTHD", torch.ones(B, T, 5, D), r"H=5 heads cannot share G=2"),
    (dense_attention, "k_BSGD", torch.ones(B, S, G, D).half(), r"k_BSGD has dtype torch.float16"),
    (dense_attention, "start_BT", torch.zeros(B, T), r"start_BT has dtype torch.float32"),
    (dense_attention, "stop_BT", torch.zeros(B, T + 1, dtype=torch.int64), r"stop_BT has T=4"),
    (dense_attention, "v_BSGV", torch.ones(B, S, G, D, device="meta"), r"v_BSGV is on meta"),
    (sparse_attention, "topk_BTK", torch.full((B, T, K), S), r"index 5; there are only S=5"),
    (sparse_attention, "topk_BTK", torch.zeros(B, T, K), r"topk_BTK has dtype torch.float32"),
    (
        sparse_attention,
        "topk_BTK",
        torch.zeros(B, T, K, dtype=torch.uint8),
        r"topk_BTK has dtype torch.uint8",
    ),
    (dense_attention, "stop_BT", torch.ones(B, T, dtype=torch.int16), r"stop_BT has dtype torch.int16"),
    (dense_attention, "q_BTHD", torch.ones(B, T, 0, D), r"q_BTHD has H=0; it needs at least 1"),
    (dense_attention, "k_BSGD", torch.ones(B, S, G, D).to_sparse(), r"k_BSGD has layout torch.sparse_coo"),
    (sparse_attention, "q_BTHD", torch.ones(B, T, H, D, dtype=torch.int64), r"q_BTHD has dtype torch.int64"),
    (dense_attention, "softcap", 0.0, r"softcap=0.0 cannot be; use a finite number above 0"),
    (sparse_attention, "sinks_H", torch.ones(H + 1), r"sinks_H has H=5, a tensor before it H=4"),
    (sparse_attention, "sinks_H", torch.ones(H).int(), r"sinks_H has dtype torch.int32"),
    (indexer_loss, "softcap", float("inf"), r"softcap=inf cannot be"),
    (indexer_loss_selected, "sinks_H", torch.ones(1, H), r"sinks_H has shape \(1, 4\)"),
    (selection_loss, "sinks_H", torch.ones(H, device="meta"), r"sinks_H is on meta"),
    (index_scores, "k_BSIE", torch.ones(B, S, 3, E), r"J=4 heads cannot share I=3"),
    (index_scores, "k_BSIE", torch.ones(B, S, INDEX_KEYS, E).char(), r"k_BSIE has E=4, .* E=6"),
    (index_topk, "k_BSIE", torch.ones(B, S, E + 2).char(), r"k_BSIE has shape \(2, 5, 8\)"),
    (indexer_loss, "k_BSIE", torch.ones(B, S, INDEX_KEYS, E + 2).char(), r"k_BSIE has dtype torch.int8"),
    (index_scores, "w_BTJ", torch.ones(B, T, J + 1), r"w_BTJ has J=5"),
    (index_scores, "b_BTJ", torch.ones(B, T, J, dtype=torch.int32), r"b_BTJ has dtype torch.int32"),
    (index_topk, "k_BSIE", torch.ones(B, S, INDEX_KEYS, E).double(), r"k_BSIE has dtype torch.float64"),
    (index_topk, "q_BTJE", torch.ones(B, T, 0, E), r"q_BTJE has J=0; it needs at least 1"),
    (index_topk, "q_BTJE", torch.ones(B, T, J, 0), r"q_BTJE has E=0; it needs at least 1"),
    (index_topk, "topk", 0, r"topk=0 cannot be"),
    (select_topk, "topk", -3, r"topk=-3 cannot be"),
    (select_topk, "topk", 2.0, r"topk=2.0 cannot be"),
    (select_topk, "scores_BTS", torch.ones(B, T, S, dtype=torch.int64), r"scores_BTS has dtype torch.int64"),
    (indexer_loss, "attn_k_BSGD", torch.ones(B, S + 1, G, D), r"attn_k_BSGD has S=6"),
    (indexer_loss, "attn_q_BTHD", torch.ones(B, T + 1, H, D), r"attn_q_BTHD has T=4|has T=3"),
    (indexer_loss, "attn_q_BTHD", torch.ones(B, T, 3, D), r"H=3 heads cannot share G=2"),
    (indexer_loss_selected, "topk_BTK", torch.full((B, T, K), 99), r"index 99"),
    (selection_loss, "topk", 0, r"topk=0 cannot be"),
    (selection_loss, "attn_v_BSGV", torch.ones(B, S + 1, G, D), r"attn_v_BSGV has S=6"),
    (selection_loss, "out_gate_BTN", torch.ones(B, T, H * D + 1), r"out_gate_BTN has N=17"),
    (selection_loss, "out_gate_BTN", torch.ones(B, T, H * D).int(), r"out_gate_BTN has dtype torch.int32"),
    (selection_loss, "out_weight_CN", torch.ones(3, H * D + 1), r"out_weight_CN has N=17, .* values 16"),
]


@pytest.mark.parametrize(("operation", "name", "value", "message"), WRONG)
def test_a_wrong_input_raises_and_is_named(operation, name, value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        operation(**{**op_inputs()[operation], name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("operation", op_inputs(), ids=lambda operation: operation.__name__)
def test_the_same_inputs_left_right_are_fine(operation):
    operation(**op_inputs()[operation])


@pytest.mark.parametrize("operation", op_inputs(), ids=lambda operation: operation.__name__)
def test_more_keys_than_int32_can_number_are_refused_before_any_work(operation):
    def stretched(name, value):
        axes = name.rpartition("_")[2]
        if not isinstance(value, torch.Tensor) or "S" not in axes:
            return value
        # One key, visible everywhere: no memory behind it.
        first = value.narrow(axes.index("S"), 0, 1)
        return first.expand([2**31 if axis == "S" else -1 for axis in axes])

    inputs = {name: stretched(name, value) for name, value in op_inputs()[operation].items()}
    with pytest.raises(ConfigError, match="S=2147483648 keys cannot be numbered; use at most 2147418112"):
        operation(**inputs)


@pytest.mark.parametrize("operation", op_inputs(), ids=lambda operation: operation.__name__)
def test_tensors_without_values_raise(operation):
    inputs = op_inputs()[operation]
    hollow = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    with pytest.raises(BackendError, match="hold no values"):
        operation(**hollow)
