"""The measurement: what it feeds the operations, that it notices a wrong one, and its fitted lines."""

import pytest
import torch
from transformers import DeepseekV32Config, LlamaConfig

from fulmen.config import DsaConfig
from fulmen.errors import BackendError, ConfigError
from fulmen.evaluation.price import speed
from fulmen.evaluation.price.prices import KINDS, ModelShape
from fulmen.evaluation.price.speed import (
    FEWEST_ROUNDS,
    check_operations,
    fit_line,
    layer_case,
    measure_speed,
    measured_positions,
)
from fulmen.modeling.cost import PREFILL_BLOCK
from fulmen.modeling.families import dsa_of

GQA = ModelShape(
    LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2),
    DsaConfig(16, 4, 2, 8, (0, 1)),
    torch.float32,
)
V32 = DeepseekV32Config(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    kv_lora_rank=32,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=12,
    index_n_heads=4,
    index_head_dim=16,
    index_topk=16,
)
MLA = ModelShape(V32, dsa_of(V32), torch.bfloat16)
SHAPES = pytest.mark.parametrize("shape", [GQA, MLA], ids=["gqa", "mla"])


@pytest.fixture(autouse=True)
def _few_weights(monkeypatch):
    monkeypatch.setattr(speed, "WEIGHT_BYTES", 2**16)


@SHAPES
def test_everything_is_timed_and_right(shape):
    told = []
    found = measure_speed(shape, [200, 300, 400], 0.0, lambda done, total, what: told.append((done, total)))
    assert told[0] == (0, 7)
    assert told[-1] == (7, 7)
    parts = {(sample.kind, sample.part) for sample in found.samples}
    assert parts == {(kind, part) for kind in KINDS for part in ("dense", "select", "sparse")}
    assert all(len(sample.seconds) == FEWEST_ROUNDS for sample in found.samples)
    assert {sample.position for sample in found.samples if sample.kind == "decode"} == {200, 300, 400}
    assert found.last_position == 400
    assert found.machine.flops > 0
    assert found.machine.bandwidth > 0
    assert len(found.errors) == 6
    assert max(found.errors.values()) < 2e-2


@SHAPES
@pytest.mark.parametrize("kind", KINDS)
def test_every_query_leaves_something_out(shape, kind):
    case = layer_case(shape, kind, 4, 2 * 16 + 4)
    topk_BTK = case.select()
    assert topk_BTK.shape == (1, 4, 16)
    assert topk_BTK.min() >= 0
    assert case.stop_BT.tolist() == [[33, 34, 35, 36]]
    if case.qkv is case.dense_qkv:
        assert (case.attend(topk_BTK) - case.attend_densely()).abs().max() > 0.1


def test_prompts_are_read_expanded_by_dense_mla_and_absorbed_by_dsa():
    reading, decoding = (layer_case(MLA, kind, 4, 100) for kind in KINDS)
    assert [x.shape[2:] for x in reading.dense_qkv] == [(4, 24), (4, 24), (4, 12)]
    assert [x.shape[2:] for x in reading.qkv] == [(4, 40), (1, 40), (1, 32)]
    assert decoding.dense_qkv is decoding.qkv


def test_index_keys_are_packed_as_caches_keep_them():
    assert layer_case(GQA, "decode", 1, 100).index_keys.shape == (1, 100, 2, 8 + 2)
    assert layer_case(GQA, "decode", 1, 100).index_keys.dtype == torch.int8
    assert layer_case(MLA, "decode", 1, 100).index_keys.dtype == torch.bfloat16


def first_keys(q, k, w, b, start, stop, topk):
    return torch.arange(topk, dtype=torch.int32).expand(*q.shape[:2], topk)


def fewer_keys(*arguments):
    return speed.WHOLE(*arguments).index_fill(-1, torch.tensor([0]), -1)


@pytest.mark.parametrize(
    ("operation", "broken"),
    [
        ("index_topk", first_keys),
        ("index_topk", fewer_keys),
        ("sparse_attention", lambda q, k, v, topk, scale: speed.RIGHT(q, k, v, topk[..., 1:], scale)),
        ("dense_attention", lambda q, k, v, start, stop, scale: speed.DENSE(q, k, v, start + 1, stop, scale)),
    ],
)
def test_a_wrong_operation_is_not_timed(operation, broken, monkeypatch):
    """Wrong by the default backend alone: the specification stays as it is."""
    right = getattr(speed, operation)
    for name in ("WHOLE", "RIGHT", "DENSE"):
        monkeypatch.setattr(speed, name, right, raising=False)

    def call(*arguments):
        pinned = speed.resolve(operation, "cpu", torch.float32) == "reference"
        return (right if pinned else broken)(*arguments)

    monkeypatch.setattr(speed, operation, call)
    with pytest.raises(BackendError, match=rf"{operation} by '\w+' is .* off its specification"):
        check_operations(GQA)


def test_positions_begin_well_above_k():
    assert measured_positions(256, 131_072) == [1024, 2048, 4096, 8192]
    assert measured_positions(2048, 131_072) == [4096, 8192, 16_384, 32_768]
    assert measured_positions(2048, 16_384) == [4096, 8192, 16_384]
    assert measured_positions(2048, 131_072)[0] - PREFILL_BLOCK >= 2048
    with pytest.raises(
        ConfigError, match=r"length=8192 has too few positions well above k = 2048.*use 16384"
    ):
        measured_positions(2048, 8192)


class TestLine:
    def test_through_points_on_one(self):
        line = fit_line([100, 200, 400], [1.5, 2.0, 3.0])
        assert line == pytest.approx((1.0, 0.005, 0.0), abs=1e-9)
        assert line.at(1000) == pytest.approx(6.0)

    def test_error_is_the_largest_relative_distance(self):
        positions, seconds = [100, 200, 300], [1.0, 1.2, 1.0]
        line = fit_line(positions, seconds)
        distances = [abs(line.at(x) / y - 1) for x, y in zip(positions, seconds, strict=True)]
        assert line.error == pytest.approx(max(distances))
        assert line.error > 0.05

    @pytest.mark.parametrize(
        ("seconds", "fixed", "slope"), [([3.0, 2.0, 1.0], True, False), ([0.5, 2.0, 5.0], False, True)]
    )
    def test_no_number_is_negative(self, seconds, fixed, slope):
        line = fit_line([100, 200, 300], seconds)
        assert (line.fixed > 0, line.per_token > 0) == (fixed, slope)
        assert min(line[:2]) == 0
        x, y = torch.tensor([100.0, 200, 300]), torch.tensor(seconds)

        def loss(fixed, per_token):
            return ((fixed + per_token * x) / y - 1).square().sum()

        for step in (0.99, 1.01):
            assert loss(*line[:2]) < loss(step * line.fixed, step * line.per_token)
