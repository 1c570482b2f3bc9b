"""Intervals against the definition: causal, same document, not padding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fulmen.errors import ConfigError
from fulmen.modeling.intervals import intervals_with_images, narrowed_intervals, visible_intervals

CPU = torch.device("cpu")


def as_mask(visible):
    keys = torch.arange(visible.n_keys)
    return (keys >= visible.start_BT[..., None]) & (keys < visible.stop_BT[..., None])


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=3))
def test_padding_hides_padded_keys_and_empties_padded_queries(rows):
    n_keys = max(sum(row) for row in rows) or 1
    mask = torch.zeros(len(rows), n_keys, dtype=torch.long)
    for row, (left, real, _) in enumerate(rows):
        mask[row, left : left + real] = 1
    for n_past in range(n_keys):
        visible = visible_intervals(mask, None, len(rows), n_keys - n_past, n_past, CPU)
        causal = torch.ones(n_keys, n_keys, dtype=torch.bool).tril()
        expected = (causal & (mask[:, None, :] == 1) & (mask[:, :, None] == 1))[:, n_past:]
        assert torch.equal(as_mask(visible), expected)
        assert visible.plain == bool((mask == 1).all())


def test_packed_documents_see_only_themselves():
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])
    visible = visible_intervals(None, position_ids, 2, 8, 0, CPU)
    assert visible.start_BT.tolist() == [[0, 0, 0, 3, 3, 5, 5, 5]] * 2
    assert visible.stop_BT.tolist() == [list(range(1, 9))] * 2
    assert not visible.plain


def test_one_document_is_plain_wherever_it_starts():
    visible = visible_intervals(None, torch.arange(5, 9)[None], 1, 4, 0, CPU)
    assert visible.plain
    assert visible.start_BT.tolist() == [[0] * 4]


def test_decode_sees_the_past():
    visible = visible_intervals(None, None, 2, 1, 6, CPU)
    assert (visible.start_BT.tolist(), visible.stop_BT.tolist()) == ([[0], [0]], [[7], [7]])


@given(st.integers(1, 9), st.integers(0, 3), st.integers(1, 6))
def test_window_keeps_the_last_keys_in_shifted_coordinates(window, dropped, n_queries):
    n_past = dropped + 2
    visible = visible_intervals(None, None, 1, n_queries, n_past, CPU)
    if window > n_past + 1 - dropped:  # a cache drops no key that a query may still see
        dropped = 0
    narrow = narrowed_intervals(visible, window, visible.n_keys - dropped)
    for t in range(n_queries):
        own = n_past + t
        seen = set(range(int(narrow.start_BT[0, t]), int(narrow.stop_BT[0, t])))
        assert seen == {key - dropped for key in range(own - window + 1, own + 1) if key >= dropped}


def test_wide_window_changes_nothing():
    visible = visible_intervals(None, None, 1, 4, 0, CPU)
    assert narrowed_intervals(visible, 4, 4) is visible
    assert narrowed_intervals(visible, None, 4) is visible


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.tensor([[1, 1, 1], [1, 0, 1]]), "row 1 has zeros between its ones"),
        (torch.ones(2, 2), r"shape \(2, 2\); pass \(2, 3\)"),
        (torch.ones(2, 1, 3, 3), r"shape \(2, 1, 3, 3\); pass \(2, 3\)"),
        ({"full_attention": None}, r"pass \(2, 3\)"),
    ],
)
def test_mask_that_cannot_be_intervals_is_refused(mask, words):
    with pytest.raises(ConfigError, match=words):
        visible_intervals(mask, None, 2, 3, 0, CPU)


def test_a_token_of_an_image_sees_all_of_it():
    """Two texts of 7, the second behind one of padding; images are tokens 2 to 4, and in the first 6 too."""
    mask = torch.tensor([[1] * 7, [0] + [1] * 6])
    images = torch.tensor([[0, 0, 1, 1, 1, 0, 1], [0, 0, 1, 1, 1, 0, 0]]).bool()
    seen = intervals_with_images(visible_intervals(mask, None, 2, 7, 0, mask.device), images)
    assert seen.stop_BT.tolist() == [[1, 2, 5, 5, 5, 6, 7], [1, 2, 5, 5, 5, 6, 7]]
    assert seen.start_BT[0].tolist() == [0] * 7
    assert not seen.plain
    near = narrowed_intervals(seen, 2, 7)
    assert near.start_BT[0].tolist() == [0, 0, 1, 2, 3, 4, 5]
    assert near.stop_BT.tolist() == seen.stop_BT.tolist()
