"""How calibration texts are read: every second one spread over the model's context."""

import pytest
import torch

from fulmen.errors import ConfigError
from fulmen.modeling.gqa.calibration import asked_queries, read_densely, spread_positions
from tests.modeling.gqa.tiny_gqa import make_dense, make_dsa, random_ids

LENGTH, CONTEXT = 64, 200


def seen_positions(model, ids_BT):
    seen = []
    read_densely(model, ids_BT, lambda attention, kwargs, position_BT: seen.append((position_BT, kwargs)))
    return seen


def test_every_second_text_stands_in_four_pieces_up_to_the_end_of_the_context():
    position_BT = spread_positions(3, LENGTH, CONTEXT)
    assert torch.equal(position_BT[0], torch.arange(LENGTH))
    assert torch.equal(position_BT[0], position_BT[2])
    steps = position_BT[1].diff()
    assert sorted(steps.unique().tolist()) == [1, 46]
    assert (steps == 46).nonzero()[:, 0].tolist() == [15, 31, 47]
    assert CONTEXT - 4 < position_BT[1, -1] < CONTEXT
    assert torch.equal(spread_positions(2, LENGTH, LENGTH), torch.arange(LENGTH).repeat(2, 1))
    assert 4 * LENGTH - 4 < spread_positions(2, LENGTH, 100 * LENGTH)[1, -1] < 4 * LENGTH


def test_a_spread_text_is_asked_in_its_last_piece_and_keeps_the_share_that_the_context_keeps():
    near_T, far_T = spread_positions(2, LENGTH, CONTEXT)
    k, rows_R = asked_queries(16, near_T)
    assert (k, int(rows_R[0]), int(rows_R[-1])) == (16, 16, LENGTH - 1)
    k, rows_R = asked_queries(16, far_T)
    assert (k, int(rows_R[0]), int(rows_R[-1])) == (5, 48, LENGTH - 1)
    assert asked_queries(40, near_T)[0] == LENGTH // 4
    assert asked_queries(0.1, far_T)[0] == 1


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3-next"])
def test_a_gap_is_no_border_between_documents(name):
    """What stands behind it depends on what stands before it, in layers with a window too."""
    model = make_dsa(make_dense(name))
    states = []
    for first in (5, 6):
        ids_BT = random_ids(2, LENGTH)
        ids_BT[:, LENGTH // 2 - 1] = first
        (_, last) = seen_positions(model, ids_BT)[-1]
        states.append(last["hidden_states"][:, LENGTH // 2])
    assert ((states[0] - states[1]).abs().amax(-1) > 1e-4).all()


def test_the_model_reads_the_positions_that_are_told():
    model = make_dsa(make_dense(max_position_embeddings=CONTEXT))
    ids_BT = random_ids(2, LENGTH)
    position_BT, kwargs = seen_positions(model, ids_BT)[0]
    assert torch.equal(position_BT, spread_positions(2, LENGTH, CONTEXT))
    cos_BTR, _ = kwargs["position_embeddings"]
    torch.testing.assert_close(cos_BTR[:, :, 0], position_BT.float().cos())


def test_texts_stay_together_where_the_rotation_depends_on_their_length():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = make_dsa(make_dense(max_position_embeddings=LENGTH, rope_parameters=rope))
    model.config.max_position_embeddings = CONTEXT
    (position_BT, _), *_ = seen_positions(model, random_ids(2, LENGTH))
    assert torch.equal(position_BT, spread_positions(2, LENGTH, LENGTH))


def test_too_short_a_text_is_refused_before_it_is_read():
    with pytest.raises(ConfigError, match="calibration length 8 is too short"):
        seen_positions(make_dsa(make_dense()), random_ids(1, 8))
