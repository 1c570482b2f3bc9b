"""Converted models that read images where fulmen is not installed."""

import subprocess
import sys

import torch

from fulmen.modeling.bundle import bundle_name, bundle_source
from fulmen.modeling.checkpoint import save_converted
from fulmen.modeling.vision import import_vision
from fulmen.ops.dispatch import pin_backend
from tests.modeling.test_bundle import HIDE
from tests.modeling.test_checkpoint import CARD, tokenizer  # noqa: F401
from tests.modeling.whole.tiny_whole import WHOLE, convert_whole, make_whole, prompt

STRANGER = """
import sys
import torch
from transformers import AutoModelForImageTextToText
folder, names = sys.argv[1], sys.argv[2].split(",")
for name in names:
    model = AutoModelForImageTextToText.from_pretrained(f"{folder}/{name}", trust_remote_code=True).eval()
    inputs = torch.load(f"{folder}/{name}.inputs.pt")
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    torch.save(tokens, f"{folder}/{name}.tokens.pt")
    assert type(model).__module__.startswith("transformers_modules"), type(model)
assert not any(name.partition(".")[0] == "fulmen" for name in sys.modules)
"""


def test_it_runs_without_fulmen(tokenizer, tmp_path):  # noqa: F811
    names = ["idefics3", "qwen2_5_vl", "gemma3"]
    models = {name: convert_whole(make_whole(name), topk=6) for name in names}
    for name, model in models.items():
        save_converted(model, tokenizer, tmp_path / name, CARD)
        torch.save(prompt(name), tmp_path / f"{name}.inputs.pt")
    environment = {"HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-I", "-c", HIDE + STRANGER, str(tmp_path), ",".join(names)],
        check=True,
        env=environment,
        cwd=tmp_path,
    )
    for name, model in models.items():
        with pin_backend("torch"):
            expected = model.generate(**prompt(name), max_new_tokens=3, do_sample=False)
        assert torch.equal(torch.load(tmp_path / f"{name}.tokens.pt"), expected)


def test_every_file_is_whole():
    for name in WHOLE:
        family = import_vision(name)
        source = bundle_source(family)
        compile(source, bundle_name(family), "exec")
        assert "fulmen import" not in source
