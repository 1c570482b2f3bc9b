"""`fulmen train`, and the stage sparse of `fulmen convert`: the same stage, in one run or two."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fulmen.errors import CheckpointError, ConfigError, ResumeError
from fulmen.modeling.lengths import short_text_topk
from fulmen.modeling.selectors import use_selector
from fulmen.pipeline.coarse_stage import fit_coarse
from fulmen.pipeline.load import load_converted
from fulmen.pipeline.reporter import LineReporter, SilentReporter
from fulmen.pipeline.run_dir import RunDir
from fulmen.pipeline.texts import lengths_to_try
from fulmen.pipeline.train import DEFAULT_LENGTH
from fulmen.pipeline.train_settings import TrainSettings
from fulmen.training.sparse import run
from fulmen.training.sparse.settings import SparseSettings
from tests.modeling.gqa.test_coarse import RecallOfCandidates
from tests.modeling.gqa.tiny_gqa import make_dense, random_ids
from tests.pipeline.tiny_runs import convert, save_tiny, settings, train

STEPS = 4


@pytest.fixture(scope="module")
def converted(tmp_path_factory, corpus_dir, llama_dir) -> Path:
    return convert(settings(llama_dir, tmp_path_factory.mktemp("converted") / "out", corpus_dir))


def train_settings(model_dir: Path, out: Path, data: Path, *, options=(), **changes) -> TrainSettings:
    own = {"steps": STEPS, **dict(options)}
    return TrainSettings(model_dir, out, data=(str(data),), length=64, options=own, **changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_three_stages_in_one_run_or_two_give_the_same(tmp_path, corpus_dir, llama_dir, converted):
    stages = ("inherit", "warmup", "sparse")
    at_once = convert(settings(llama_dir, tmp_path / "once", corpus_dir, stages=stages, sparse_steps=STEPS))
    in_two = train(train_settings(converted, tmp_path / "two", corpus_dir))
    once, two = weights(at_once), weights(in_two)
    assert once.keys() == two.keys()
    assert all(torch.equal(once[name], two[name]) for name in once)
    record = json.loads((in_two / "conversion.json").read_text())
    assert record["stages"] == list(stages)
    assert record["stages_done"]["sparse"]["last_step"] == STEPS
    for folder in (at_once, in_two):
        log = (folder / "stages" / "sparse.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in log] == list(range(1, STEPS + 1))
        assert (folder / "stages" / "inherit.safetensors").exists()
        assert "All weights were trained" in (folder / "README.md").read_text()
        assert not RunDir(folder).path.exists()


def test_after_training_the_coarse_level_is_fitted_to_the_trained_model(tmp_path, corpus_dir, llama_dir):
    asked = {"stages": ("inherit",), "steps": None, "index": "two-level"}
    two = convert(settings(llama_dir, tmp_path / "two", corpus_dir, **asked))
    fast = {"learning_rate": 0.01}
    out = train(train_settings(two, tmp_path / "out", corpus_dir, options=fast))
    before, after = weights(two), weights(out)
    coarse = [name for name in after if ".indexer.coarse.w" in name]
    assert coarse
    assert not any(torch.equal(before[name], after[name]) for name in coarse)
    # What fitted the model that was does not fit this one, which a fit to other texts fits no better.
    model, _ = load_converted(out)
    fitted = candidate_recall(model)
    model.load_state_dict({name: before[name] for name in coarse}, strict=False)
    assert fitted > candidate_recall(model)
    fit_coarse(model, random_ids(4, 128, seed=4), SilentReporter())
    assert fitted > candidate_recall(model) - 0.05


def candidate_recall(model):
    """By 3 k candidates of texts that the model has not seen."""
    seen = RecallOfCandidates(3)
    model.config.dsa = {**model.config.dsa, "candidate_factor": 1}  # it is asked in short texts, too
    with torch.no_grad(), use_selector(model, seen):
        model.base_model(random_ids(2, 160, seed=9), use_cache=False)
    return sum(seen.recalls) / len(seen.recalls)


def test_resume_says_what_differs(tmp_path, corpus_dir, converted, monkeypatch):
    """Interrupted after the plan; another rate, other text, other weights are named."""
    out = tmp_path / "out"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "_target_source", stop)
        with pytest.raises(KeyboardInterrupt):
            train(train_settings(converted, out, corpus_dir))
    with pytest.raises(ResumeError, match=r"learning_rate was None, is 0\.5"):
        train(train_settings(converted, out, corpus_dir, options={"learning_rate": 0.5}))
    (tmp_path / "texts").mkdir()
    for file in corpus_dir.iterdir():
        (tmp_path / "texts" / file.name).write_text(file.read_text() + " w5")
    with pytest.raises(ResumeError, match="corpus was "):
        train(train_settings(converted, out, tmp_path / "texts"))
    model = AutoModelForCausalLM.from_pretrained(converted)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    original = (converted / "model.safetensors").read_bytes()
    try:
        model.save_pretrained(converted)
        with pytest.raises(ResumeError, match="model_weights was "):
            train(train_settings(converted, out, corpus_dir))
    finally:
        (converted / "model.safetensors").write_bytes(original)


def write_rows(folder: Path, text: str = "") -> Path:
    """A data set of two files; the first three rows of each have no text."""
    folder.mkdir()
    for shard in range(2):
        rows = [{"text": " ".join(f"w{2 + (n * k + shard) % 95}" for k in range(40))} for n in range(1, 90)]
        rows[:3] = [{"text": 3}, {"text": " "}, {"text": None}]
        (folder / f"{shard}.jsonl").write_text("\n".join(map(json.dumps, rows)) + text)
    return folder


def test_a_streamed_data_set(tmp_path, converted, monkeypatch, capsys):
    """What is left out is reported; a run interrupted at a step is not continued with other rows."""
    data, out = write_rows(tmp_path / "rows"), tmp_path / "out"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "_target_source", stop)
        with pytest.raises(KeyboardInterrupt):
            train(train_settings(converted, out, data))
    other = write_rows(tmp_path / "other", text='\n{"text": "w7"}')
    with pytest.raises(ResumeError, match=r"corpus was .*, data was \['.*rows'\], is \['.*other'\]"):
        train(train_settings(converted, out, other))
    train(train_settings(converted, out, data), LineReporter())
    said = " ".join(capsys.readouterr().err.split())
    assert "Of the data's rows and files 3 skipped: 1 empty, 2 not text" in said
    done = json.loads((out / "conversion.json").read_text())["stages_done"]["sparse"]
    assert done["last_step"] == STEPS
    assert done["skipped"] == {"not text": 2, "empty": 1}


def test_a_teacher_of_its_own_and_one_with_other_tokens(tmp_path, corpus_dir, converted, llama_dir):
    out = train(train_settings(converted, tmp_path / "out", corpus_dir, teacher=str(llama_dir)))
    same = train(train_settings(converted, tmp_path / "same", corpus_dir))
    ours, theirs = weights(out), weights(same)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)
    other = save_tiny(make_dense("llama"), tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["brandnew"])
    tokenizer.save_pretrained(other)
    with pytest.raises(
        ConfigError, match=r"dense model's tokenizer differs .token 'brandnew' is None here and 97"
    ):
        train(train_settings(converted, tmp_path / "no", corpus_dir, teacher=str(other)))


def test_tensorboard_has_the_losses_of_every_step(tmp_path, corpus_dir, converted, monkeypatch):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    # Set and deleted, so that what the run sets is gone after the test.
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "x")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")
    options = {"report_to": "tensorboard"}
    out = train(train_settings(converted, tmp_path / "out", corpus_dir, options=options))
    events = event_accumulator.EventAccumulator(str(out / "stages" / "tensorboard")).Reload()
    rows = [json.loads(line) for line in (out / "stages" / "sparse.jsonl").read_text().splitlines()]
    for name in ("loss", "lm", "kl", "indexer"):
        scalars = events.Scalars(f"train/{name}")
        assert [scalar.step for scalar in scalars] == [row["step"] for row in rows]
        assert [scalar.value for scalar in scalars] == pytest.approx([row[name] for row in rows], rel=1e-4)
    # Three evaluations are asked for; of four steps they are every second.
    assert [scalar.step for scalar in events.Scalars("eval/loss")] == [2, STEPS]


@pytest.mark.parametrize("report", ["tensorboard", "wandb"])
def test_a_report_without_its_package_is_refused(tmp_path, corpus_dir, report, monkeypatch):
    monkeypatch.setitem(sys.modules, report, None)
    with pytest.raises(ConfigError, match=f"needs a package: pip install {report}, or use none"):
        train_settings(tmp_path, tmp_path / "out", corpus_dir, options={"report_to": report})


def test_bad_requests(tmp_path, corpus_dir, llama_dir, converted):
    def refused(words, **options):
        with pytest.raises(ConfigError, match=words):
            train_settings(converted, tmp_path / "out", corpus_dir, options=options)

    refused("exclude each other", budget_s=3.0)
    refused("lora=0 cannot be", lora=0)
    refused("learning_rate=-1 cannot be", learning_rate=-1)
    refused("indexer_learning_rate=None cannot be", indexer_learning_rate=None)
    with pytest.raises(ConfigError, match="alpha=0 learns from no teacher"):
        train_settings(converted, tmp_path / "out", corpus_dir, teacher="x", options={"alpha": 0})
    with pytest.raises(ConfigError, match="sparse_steps do not apply"):
        settings(llama_dir, tmp_path / "out", corpus_dir, sparse_steps=3)
    (converted / "conversion.json").rename(converted / "aside")
    try:
        with pytest.raises(CheckpointError, match=r"conversion\.json cannot be read"):
            train(train_settings(converted, tmp_path / "out", corpus_dir))
    finally:
        (converted / "aside").rename(converted / "conversion.json")


@pytest.fixture(scope="module")
def inherited(tmp_path_factory, corpus_dir, llama_dir) -> Path:
    asked = settings(
        llama_dir, tmp_path_factory.mktemp("inherited") / "out", corpus_dir, stages=("inherit",), steps=None
    )
    return convert(asked)


def test_a_model_that_was_only_inherited_is_warmed_up_later(tmp_path, corpus_dir, inherited):
    """The indexers alone change; both stages in a row are what one after the other makes."""
    warm = train(train_settings(inherited, tmp_path / "warm", corpus_dir, stages=("warmup",)))
    before, after = weights(inherited), weights(warm)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(".indexer." in name for name in changed)
    record = json.loads((warm / "conversion.json").read_text())
    assert record["stages"] == ["inherit", "warmup"]
    assert record["stages_done"]["warmup"]["last_step"] == STEPS
    assert (warm / "stages" / "warmup-layers.jsonl").exists()
    trained = train(train_settings(inherited, tmp_path / "trained", corpus_dir))
    assert json.loads((trained / "conversion.json").read_text())["stages"] == ["inherit", "sparse"]


@pytest.mark.parametrize("stages", [(), ("inherit",), ("sparse", "warmup"), ("inherit", "warmup")])
def test_stages_that_cannot_be_trained(tmp_path, corpus_dir, stages):
    with pytest.raises(ConfigError, match=r"cannot be trained; use warmup, sparse or warmup,sparse"):
        train_settings(tmp_path, tmp_path / "out", corpus_dir, stages=stages)


@pytest.mark.parametrize(("topk", "length", "expected"), [(512, 4096, 256), (128, 4096, 128), (8, 8, 1)])
def test_k_of_the_stage_is_a_16th_of_the_text_at_most(topk, length, expected):
    assert short_text_topk(topk, length) == expected


@pytest.mark.parametrize(
    ("topk", "context", "lengths"),
    [(2048, 32768, [4096]), (512, 8192, [2048, 1024]), (3000, 131072, [6000]), (1024, 8192, [4096, 2048])],
)
def test_default_length_is_4096_where_k_is_less_than_half_of_it(topk, context, lengths):
    model = make_dense("qwen2", max_position_embeddings=context).config
    assert lengths_to_try(None, model, topk, most=max(DEFAULT_LENGTH, 2 * topk)) == lengths


@pytest.mark.parametrize(
    ("options", "rate"), [({}, 3e-5), ({"lora": 16}, 1e-4), ({"lora": 16, "learning_rate": 2e-5}, 2e-5)]
)
def test_the_rate_goes_with_lora(options, rate):
    assert SparseSettings(**options).backbone_rate == rate
