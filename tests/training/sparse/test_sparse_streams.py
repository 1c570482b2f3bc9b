"""The sparse stage on streamed texts: killed or shared among processes, the losses stay the same."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fulmen.data import SequenceStream, stream_of
from fulmen.errors import ConfigError
from fulmen.training.sparse.streamed import StreamedRows
from fulmen.training.sparse.trainer import POSITION_FILE
from tests.training.forks import die, run_killed, run_two_processes
from tests.training.sparse.sparse_setup import LENGTH, log_rows, run

VOCAB = 97


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", unk_token="w2")


def write_words(folder: Path) -> Path:
    """Two files of 70 rows, some longer than a window and some without text."""
    generator = torch.Generator().manual_seed(0)
    for shard in range(2):
        rows = []
        for number in range(70):
            words = torch.randint(2, VOCAB, (5 + number * 29 % 150,), generator=generator).tolist()
            rows.append({"text": " ".join(f"w{word}" for word in words)})
        rows[::9] = [{"text": None}] * len(rows[::9])
        text = "\n".join(map(json.dumps, rows))
        (folder / f"{shard}.jsonl").write_text(text, encoding="utf-8")
    return folder


def stream(folder: Path, part: str = "training") -> SequenceStream:
    return SequenceStream(stream_of(folder), word_tokenizer(), LENGTH, part)


def run_streamed(out: Path, data: Path, on_step=lambda *_: None, **changes):
    held_out = list(islice(stream(data, "calibration"), 2))
    train = stream(data)
    own = {"steps": 6, "save_every": 2, "n_rows": 1000, **changes}
    return train, *run(out, train=train, held_out=held_out, on_step=on_step, **own)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_words(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("whole")
    train, model, result = run_streamed(folder, data, accumulate=2)
    return folder, train, model, result


KILLED = (1, 5)


def run_until(folder: str, data: str, when: int) -> None:
    """The run of `whole_run`, which dies in a step."""

    def on_step(step, steps, logs):
        if step == when and "kl" in logs:
            die()

    run_streamed(Path(folder), Path(data), on_step, accumulate=2)


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory, data):
    """Folder by step."""
    folders = {when: tmp_path_factory.mktemp("killed") for when in KILLED}
    run_killed(run_until, [(str(folder), str(data), when) for when, folder in folders.items()])
    return folders


@pytest.mark.parametrize("when", KILLED)
def test_killed_and_resumed_equals_uninterrupted(killed_runs, data, whole_run, when):
    folder, train, model, result = whole_run
    assert len(log_rows(killed_runs[when])) == when
    train_again, resumed, again = run_streamed(killed_runs[when], data, accumulate=2)
    assert log_rows(killed_runs[when]) == log_rows(folder)
    ours, theirs = model.state_dict(), resumed.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (again.loss_after, again.best_step) == (result.loss_after, result.best_step)
    assert train_again.state_dict() == train.state_dict()


def test_a_checkpoint_has_the_position_of_its_step(data, whole_run):
    folder, *_ = whole_run
    position = json.loads((folder / "checkpoint-4" / POSITION_FILE).read_text())
    assert position["number"] == 8
    windows = list(islice(stream(data), 9))
    again = stream(data)
    again.load_state_dict(position["stream"])
    assert torch.equal(next(iter(again)).input_ids, windows[8].input_ids)


def test_rows_go_round(data):
    n_windows = len(list(stream(data)))
    rows = StreamedRows(stream(data), 3 * n_windows, ahead=2)
    assert [len(rows[number]["input_ids"]) for number in range(3 * n_windows)] == [LENGTH] * 3 * n_windows
    assert rows.stream.passes == 2
    assert len(rows.positions) == 3


def test_answers_of_a_stream_are_not_kept(tmp_path, data):
    with pytest.raises(
        ConfigError, match="teacher_place='disk' keeps answers about sequences that come again"
    ):
        run_streamed(tmp_path, data, teacher_place="disk")


def run_process(out: str, data: str) -> None:
    run_streamed(Path(out), Path(data))


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_two_processes_read_what_one_would(tmp_path, data, whole_run):
    run_two_processes(run_process, (str(tmp_path / "two"), str(data)), "--multi_gpu")
    one, two = log_rows(whole_run[0]), log_rows(tmp_path / "two")
    assert len(one) == len(two) == 6
    for ours, theirs in zip(one, two, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        for name in ("loss", "lm", "kl", "indexer"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-3), name
    positions = [
        json.loads((folder / "checkpoint-6" / POSITION_FILE).read_text())
        for folder in (whole_run[0], tmp_path / "two")
    ]
    assert positions[0] == positions[1]
