"""A served index of other levels than the config says is refused, whatever vLLM lets pass."""

import pytest
import torch
from torch import nn

from fulmen.config import CoarseShape
from fulmen.errors import CheckpointError
from fulmen.modeling.gqa.coarse import CoarseIndexer, ModelWidths
from fulmen.serving.vllm_plugin.coarse_weights import of_coarse_shape, require_coarse_weights

SHAPE = CoarseShape(heads=4, width=6)
NAME = "model.layers.3.self_attn.indexer.coarse"


def weights(shape=SHAPE):
    coarse = CoarseIndexer(shape, ModelWidths(32, 16, 24, 4)).state_dict()
    return [("model.norm.weight", torch.ones(24)), *((f"{NAME}.{part}", x) for part, x in coarse.items())]


def test_weights_that_fit_pass_as_they_are():
    given = weights()
    passed = list(of_coarse_shape(iter(given), SHAPE))
    assert [name for name, _ in passed] == [name for name, _ in given]
    assert all(one is other for (_, one), (_, other) in zip(given, passed, strict=True))
    assert len(list(of_coarse_shape(given[:1], CoarseShape(0, 0)))) == 1


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (CoarseShape(0, 0), f"weights have {NAME}.wq, where the config says one level; let 'dsa' in"),
        (
            CoarseShape(4, 8),
            f"{NAME}.wq has 30 rows, where coarse_head_dim=8 and coarse_n_heads=4 ask for 40",
        ),
        (
            CoarseShape(2, 10),
            f"{NAME}.wk has 6 rows, where coarse_head_dim=10 and coarse_n_heads=2 ask for 10",
        ),
    ],
)
def test_weights_of_other_levels_are_refused(asked, message):
    with pytest.raises(CheckpointError, match=message):
        list(of_coarse_shape(weights(), asked))


def test_a_coarse_level_without_weights_is_refused():
    model = nn.ModuleDict(
        {"indexer": nn.ModuleDict({"coarse": CoarseIndexer(SHAPE, ModelWidths(32, 16, 24, 4))})}
    )
    with pytest.raises(
        CheckpointError, match=r"weights lack indexer.coarse.wk, where coarse_head_dim=6 asks"
    ):
        require_coarse_weights(model)
    model["indexer"]["coarse"].wk.fill_(0.1)
    require_coarse_weights(model)
