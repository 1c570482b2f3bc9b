"""Streamed data sets: nothing lost or twice, no part in another, and any position can be returned to."""

import json
from itertools import islice

import pyarrow
import pyarrow.parquet
import pytest
import torch

from fulmen.data import SequenceStream, described, load_corpus, stream_of
from fulmen.data.rows import HUGE_CHARACTERS, part_of
from fulmen.errors import CorpusError
from tests.data.byte_tokenizer import byte_tokenizer
from tests.data.shards import text_of_row, write_jsonl, write_shards

LENGTH = 300


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return folder, write_shards(folder)


def texts_in(windows, tokenizer):
    """The documents in windows put together again."""
    ids = torch.cat([window.input_ids for window in windows])
    return tokenizer.decode(ids).split("<eos>")


def same(one, other):
    return (one.names, one.starts) == (other.names, other.starts) and torch.equal(
        one.input_ids, other.input_ids
    )


def test_every_row_of_the_part_once_and_in_order(shards):
    folder, texts = shards
    tokenizer = byte_tokenizer()
    stream = SequenceStream(stream_of(folder), tokenizer, LENGTH)
    windows = list(stream)
    wanted = [text for text in texts if part_of(text) == "training"]
    *whole, last = texts_in(windows, tokenizer)
    assert whole == wanted[: len(whole)]
    assert wanted[len(whole)].startswith(last)
    assert len(wanted) - len(whole) < 3
    for window in windows:
        ends = (window.input_ids[:-1] == tokenizer.eos_token_id).nonzero().flatten() + 1
        assert list(window.starts) == [0, *ends.tolist()]
        assert (window.position_ids == 0).nonzero().flatten().tolist() == list(window.starts)


def test_goes_on_from_any_window_and_into_the_next_pass(shards):
    folder, _ = shards
    stream = SequenceStream(stream_of(folder), byte_tokenizer("<bos>"), LENGTH)
    windows, states = [], []
    for _ in range(2):
        for window in stream:
            windows.append(window)
            states.append(json.dumps(stream.state_dict()))
    assert stream.passes == 2
    for at in range(0, len(windows), 25):
        again = SequenceStream(stream_of(folder), byte_tokenizer("<bos>"), LENGTH)
        again.load_state_dict(json.loads(states[at]))
        following = islice((window for _ in range(2) for window in again), 5)
        assert all(map(same, windows[at + 1 :], following))


def test_what_is_behind_the_position_is_not_read_again(tmp_path):
    write_shards(tmp_path)
    data_sets = stream_of(tmp_path)
    stream = SequenceStream(data_sets, byte_tokenizer(), LENGTH)
    windows = iter(stream)
    while stream.member < 1:
        next(windows)
    again = SequenceStream(data_sets, byte_tokenizer(), LENGTH)
    again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    (tmp_path / "0.jsonl").unlink()
    assert all(same(one, other) for one, other in zip(windows, again, strict=True))
    assert stream.passes == again.passes == 1


def test_parts_are_those_of_the_corpus_in_memory(shards):
    """What `fulmen eval` reads of a data set was never streamed to training."""
    folder, texts = shards
    corpus = load_corpus(folder)
    for part in ("training", "calibration", "heldout"):
        in_memory = {document.text for document in getattr(corpus, part)}
        assert in_memory == {text for text in texts if part_of(text) == part}
    seen = "".join(texts_in(SequenceStream(stream_of(folder), byte_tokenizer(), LENGTH), byte_tokenizer()))
    assert not any(document.text[:20] in seen for document in corpus.heldout + corpus.calibration)


UNFIT = [
    {"text": ""},
    {"text": " \n\t"},
    {"text": 7},
    {"text": None},
    {"text": ["a", "list"]},
    {"other": "x"},
]


def test_unfit_rows_are_counted_by_reason(tmp_path):
    good = [{"text": text_of_row(number)} for number in range(120)]
    talk = [{"role": "user", "content": "hello"}]
    rows = [*good[:50], *UNFIT, {"text": "x" * (HUGE_CHARACTERS + 1)}, {"text": talk}, *good[50:]]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    stream = SequenceStream(stream_of(file), byte_tokenizer(), LENGTH)
    for _ in range(2):
        assert list(stream)
        assert stream.skipped == {"empty": 2, "not text": 4, "over 5,000,000 characters": 1}
    assert described(stream.skipped) == "7 skipped: 2 empty, 4 not text, 1 over 5,000,000 characters"
    assert load_corpus(file).skipped == stream.skipped


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_nothing_left_says_why(tmp_path, suffix):
    file = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        write_jsonl(file, UNFIT)
        counts = "rows 6 skipped: 2 empty, 4 not text"
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": [b"\xff\0", None]}), file)
        counts = "rows 2 skipped: 2 not text"
    with pytest.raises(CorpusError, match=rf"rows\.{suffix} has no text to use \({counts}\)") as caught:
        stream_of(file)
    assert "\n" not in str(caught.value)


def test_what_is_streamed(shards, tmp_path):
    folder, _ = shards
    assert len(stream_of(folder).members) == 3
    assert len(stream_of(folder, folder).members) == 6
    assert stream_of(f"hf:{folder}") is not None
    assert stream_of() is None
    assert stream_of("demo") is None
    few = write_jsonl(tmp_path / "few.jsonl", [{"text": text_of_row(number)} for number in range(99)])
    assert stream_of(few) is None
    (tmp_path / "notes.txt").write_text("text")
    assert stream_of(tmp_path) is None
    assert stream_of(folder, tmp_path / "notes.txt") is None


def test_another_file_or_text_is_another_data_set(tmp_path):
    write_shards(tmp_path / "data")
    before = stream_of(tmp_path / "data").fingerprint
    assert stream_of(tmp_path / "data").fingerprint == before
    with open(tmp_path / "data" / "2.jsonl", "a") as file:
        file.write('\n{"text": "more"}')
    assert stream_of(tmp_path / "data").fingerprint != before
