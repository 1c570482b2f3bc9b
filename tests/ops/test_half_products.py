"""Products of 16-bit matrices where a CPU has no instructions for them: right; no others are changed."""

import subprocess
import sys

import pytest
import torch

from fulmen.ops import half_products
from fulmen.ops.half_products import has_half_products, hasten_half_products

# In a process of its own: torch's kernels are replaced for good.
EXACT = """
import sys
import torch
from torch.nn.functional import linear
from fulmen.ops import half_products

half_products.NUMBERS_AT_ONCE, half_products.ROWS_AT_ONCE = map(int, sys.argv[1:])
half_products._put_before_torch()
torch.manual_seed(0)
f64 = torch.float64
for dtype, tolerance in ((torch.bfloat16, 4e-3), (torch.float16, 5e-4), (torch.float32, 1e-5), (f64, 1e-12)):
    for n in (0, 1, 3, 4, 65):
        x, w, b, c = (torch.randn(shape).to(dtype) for shape in ((n, 33), (129, 33), (129,), (n, 129)))
        whole = x.to(f64) @ w.to(f64).t()
        many = x.expand(5, n, 33), w.t().expand(5, 33, 129)
        pairs = [
            (x @ w.t(), whole),
            (linear(x, w, b), whole + b.to(f64)),
            (torch.addmm(c, x, w.t(), beta=0.5, alpha=2), 0.5 * c.to(f64) + 2 * whole),
            (torch.bmm(*many), whole.expand(5, n, 129)),
            (torch.baddbmm(c, *many, beta=0.5), 0.5 * c.to(f64) + whole.expand(5, n, 129)),
            (torch.baddbmm(c[:1, :1], *many), c[:1, :1].to(f64) + whole.expand(5, n, 129)),
            (torch.mm(x, w.t(), out=torch.empty(n, 129, dtype=dtype)), whole),
            (torch.bmm(*many, out=torch.empty(5, n, 129, dtype=dtype)), whole.expand(5, n, 129)),
        ]
        for number, (found, expected) in enumerate(pairs):
            assert found.dtype == dtype and found.shape == expected.shape, (dtype, n, number)
            torch.testing.assert_close(found.to(f64), expected, rtol=tolerance, atol=tolerance * 8)
    out = torch.full((65, 129), torch.nan, dtype=dtype)
    assert torch.mm(x, w.t(), out=out) is out and out.isfinite().all()

# Gradients, and what torch refuses.
x, w = (torch.randn(64, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
linear(x, w).sum().backward()
torch.testing.assert_close(x.grad.double(), w.double().sum(0).expand(64, 64), rtol=4e-3, atol=4e-3)
with torch.autocast("cpu", torch.bfloat16):
    assert linear(torch.randn(9, 4), torch.randn(5, 4)).dtype == torch.bfloat16
b, m = torch.randn(3, 8, 9).bfloat16(), torch.randn(8, 8).bfloat16()
for refused in (
    lambda: torch.bmm(b[:2], b.mT),
    lambda: torch.addmm(m.float(), m, m),
    lambda: torch.mm(m, m, out=m.float()),
):
    try:
        refused()
        raise AssertionError(refused)
    except RuntimeError:
        pass
for left, right in (((8, 3), (4, 5)), ((8, 3), (3, 5))):
    other = torch.float32 if left[1] == right[0] else torch.bfloat16
    try:
        torch.randn(left).bfloat16() @ torch.randn(right, dtype=other)
        raise AssertionError(left)
    except RuntimeError:
        pass
"""


# In one piece, in pieces of rows and columns, and several products at once.
@pytest.mark.parametrize(("numbers", "rows"), [(16 << 20, 4096), (700, 16), (30_000, 4096)])
def test_products_are_those_of_float64_rounded(numbers, rows):
    command = [sys.executable, "-W", "error", "-c", EXACT, str(numbers), str(rows)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_only_16_bits_that_the_cpu_cannot_multiply_are_changed(monkeypatch):
    put = []
    monkeypatch.setattr(half_products, "_put_before_torch", lambda: put.append(True))
    for dtype in (torch.float32, torch.float64, torch.int8):
        assert has_half_products(dtype)
        hasten_half_products(dtype)
    for dtype in (torch.bfloat16, torch.float16):
        hasten_half_products(dtype)
        assert bool(put) == (not has_half_products(dtype))
        put.clear()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    hasten_half_products(torch.bfloat16)
    assert put
