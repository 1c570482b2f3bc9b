"""Feed-forward layers in blocks of tokens give every token the same, and are as before afterwards."""

import pytest
import torch

from fulmen.modeling import token_blocks
from fulmen.modeling.token_blocks import feed_forward_in_blocks
from tests.modeling.gqa.tiny_gqa import CONFIGS, make_dense, make_dsa, random_ids

FIRST_MATRICES = ("gate_proj", "gate_up_proj", "c_fc")
# All layers of these are mixtures of experts, which are left alone.
ONLY_EXPERTS = {"mixtral", "granite-moe", "gpt-oss"}


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - ONLY_EXPERTS))
def test_the_model_computes_the_same_in_blocks(name, monkeypatch):
    monkeypatch.setattr(token_blocks, "TOKENS_PER_BLOCK", 7)
    model, ids = make_dsa(make_dense(name)), random_ids(2, 30)
    seen = []
    hooks = [
        module.register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
        for path, module in model.named_modules()
        if path.endswith(FIRST_MATRICES)
    ]
    with torch.no_grad():
        expected = model.base_model(ids, use_cache=False)[0]
        seen.clear()
        with feed_forward_in_blocks(model):
            found = model.base_model(ids, use_cache=False)[0]
    assert seen
    assert {shape[-2] for shape in seen} == {7, 60 % 7}
    assert not any("forward" in vars(module) for module in model.modules())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for hook in hooks:
        hook.remove()
