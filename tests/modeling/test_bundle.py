"""The bundled modeling file: loads and computes the same where fulmen is not installed."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from fulmen.modeling.bundle import bundle_name, bundle_source
from fulmen.modeling.checkpoint import save_converted
from fulmen.modeling.families import all_families
from fulmen.modeling.gqa.family import GqaFamily
from fulmen.ops.dispatch import pin_backend
from tests.modeling.gqa.tiny_gqa import make_dense, make_dsa, random_ids
from tests.modeling.test_checkpoint import CARD, logits, tokenizer  # noqa: F401

HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "fulmen":
            raise ModuleNotFoundError("hidden", name=name)
sys.meta_path.insert(0, Hide())
"""
STRANGER = """
import sys
import torch
from transformers import AutoModelForCausalLM
folder, names = sys.argv[1], sys.argv[2].split(",")
ids = torch.load(f"{folder}/ids.pt")
for name in names:
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", trust_remote_code=True).eval()
    with torch.no_grad():
        torch.save(model(ids).logits, f"{folder}/{name}.logits.pt")
        torch.save(model.generate(ids, max_new_tokens=5, do_sample=False), f"{folder}/{name}.tokens.pt")
    model.save_pretrained(f"{folder}/{name}.again")
    assert type(model).__module__.startswith("transformers_modules"), type(model)
try:
    import fulmen
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("fulmen was importable")
"""


def test_a_checkpoint_works_without_fulmen(tokenizer, tmp_path):  # noqa: F811
    names = [
        "llama3-rope",
        "qwen2-mixed",
        "qwen3",
        "gemma3",
        "qwen3-moe",
        "phi3",
        "smollm3",
        "glm4",
        "qwen3-next",
    ]
    models = {name: make_dsa(make_dense(name), topk=6) for name in names}
    for name, model in models.items():
        save_converted(model, tokenizer, tmp_path / name, CARD)
    ids = random_ids(2, 20)
    torch.save(ids, tmp_path / "ids.pt")
    environment = {"HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # -I ignores PYTHONPATH; HIDE makes an installed fulmen invisible.
    subprocess.run(
        [sys.executable, "-I", "-c", HIDE + STRANGER, str(tmp_path), ",".join(names)],
        check=True,
        env=environment,
        cwd=tmp_path,
    )
    for name, model in models.items():
        # The bundle has no C++ kernels with it; their last bits may differ.
        with pin_backend("torch"):
            assert torch.equal(torch.load(tmp_path / f"{name}.logits.pt"), logits(model, ids))
            tokens = model.generate(ids, max_new_tokens=5, do_sample=False)
        assert torch.equal(torch.load(tmp_path / f"{name}.tokens.pt"), tokens)
        # Saved again by the stranger, it still carries its code.
        assert (tmp_path / f"{name}.again" / f"modeling_{model.config.model_type}.py").is_file()


def test_installed_classes_win_over_the_bundle(tokenizer, tmp_path):  # noqa: F811
    model = make_dsa(make_dense("llama"), topk=6)
    folder = save_converted(model, tokenizer, tmp_path / "out", CARD)
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(loaded) is type(model)


@pytest.mark.parametrize(
    "family", [f for f in all_families() if isinstance(f, GqaFamily)], ids=lambda f: f.source_types[0]
)
def test_the_file_is_whole_and_stable(family):
    source = bundle_source(family)
    assert source == bundle_source(family)
    compile(source, bundle_name(family), "exec")
    assert "from fulmen" not in source
    assert "import fulmen" not in source
