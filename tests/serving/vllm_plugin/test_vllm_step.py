"""What a step tells the layers lies where the caches are: on tensors that are not on the CPU."""

from types import SimpleNamespace

import pytest
import torch

BLOCK, PER_BLOCK = 16, (16, 24)


@pytest.fixture
def vllm_step():
    """The module, imported here: every test process would import vLLM to find the tests of this file."""
    return pytest.importorskip("fulmen.serving.vllm_plugin.step", reason="needs the extra serve-cpu")


def step_of(vllm_step, starts, lengths, device):
    n_tokens, n_blocks = starts[-1], -(-max(lengths) // BLOCK)
    common = SimpleNamespace(
        query_start_loc_cpu=torch.tensor(starts),
        seq_lens=torch.tensor(lengths),
        block_table_tensor=torch.zeros(len(lengths), n_blocks, dtype=torch.int32, device=device),
        slot_mapping=torch.zeros(n_tokens, dtype=torch.int64, device=device),
    )
    return vllm_step.Step(common, BLOCK)


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value if isinstance(value, list | tuple) else getattr(value, "__dict__", {}).values()
    return [tensor for part in parts for tensor in tensors_in(part)]


@pytest.mark.parametrize(
    ("starts", "lengths"),
    [([0, 1, 2], [4000, 5000]), ([0, 7], [300]), ([0, 1, 2, 9, 10], [40, 50, 60, 70])],
    ids=["decodes", "prompt", "both"],
)
def test_nothing_of_a_step_lies_elsewhere_than_its_caches(vllm_step, starts, lengths):
    step = step_of(vllm_step, starts, lengths, "meta")
    rotary = SimpleNamespace(cos_sin_cache=torch.zeros(8192, 64, device="meta"))
    position_T = torch.zeros(starts[-1], dtype=torch.int64, device="meta")
    layout = step.layout((step, step), (*PER_BLOCK, 48), rotary, position_T, torch.bfloat16)
    found = tensors_in(layout) + [span.stop_BT for span in step.spans]
    assert len(found) >= 5 + 4 * len(step.spans)
    assert {tensor.device.type for tensor in found} == {"meta"}
