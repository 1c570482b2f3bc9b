"""Texts and a dense model that many runs begin with."""

from pathlib import Path

import pytest
import torch
from transformers.utils.logging import disable_progress_bar

from fulmen.pipeline.evaluate_lookups import QUICK
from tests.modeling.gqa.tiny_gqa import make_dense
from tests.pipeline.tiny_runs import VOCAB, save_tiny

# The program says so before it imports Transformers; here that has happened already.
disable_progress_bar()


@pytest.fixture(autouse=True, scope="session")
def few_questions():
    """A tiny model answers none, and never stops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fulmen.pipeline.evaluate_lookups.QUICK", QUICK._replace(texts=1, n_keys=2))
        yield


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory) -> Path:
    """Words w2 to w96 in an order with repetitions, some of it as code and some as prose."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = torch.Generator().manual_seed(0)
    for number in range(12):
        words = torch.randint(2, VOCAB, (700,), generator=generator).tolist()
        text = " ".join(f"w{word}" for word in words + words[:200])
        (folder / f"text{number}.{'py' if number % 2 else 'txt'}").write_text(text)
    return folder


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory) -> Path:
    return save_tiny(make_dense("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def whole_quick_look(monkeypatch):
    """A quick look asks all of its questions again."""
    monkeypatch.setattr("fulmen.pipeline.evaluate_lookups.QUICK", QUICK)
