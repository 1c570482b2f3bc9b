"""Every second sequence of a run asks and looks up, from lists and from streams."""

import json

import pytest

from fulmen.data import SequenceStream, TokenSequence, iter_sequences, load_corpus, stream_of
from fulmen.modeling.checkpoint import find_source, load_tokenizer
from fulmen.pipeline.reporter import SilentReporter
from fulmen.pipeline.texts import Asker

LENGTH = 512
PROSE = "The mill by the river ground wheat for the whole valley until the dam upstream was closed. " * 900


class Notes(SilentReporter):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def sequences(smollm2) -> list[TokenSequence]:
    corpus = load_corpus(texts=[PROSE])
    return list(iter_sequences(corpus.training, smollm2, LENGTH))[:5]


def test_every_second_one_has_answers_that_are_in_the_text(smollm2, sequences):
    asked = Asker(smollm2, 0, SilentReporter()).all(sequences)
    assert [bool(one.answers) for one in asked] == [True, False, True, False, True]
    assert [len(one.input_ids) for one in asked] == [LENGTH] * 5
    assert asked[1] is sequences[1]
    for one in asked[::2]:
        for start, stop in one.answers:
            answer = smollm2.decode(one.input_ids[start:stop], skip_special_tokens=True).strip()
            before = smollm2.decode(one.input_ids[:start])
            assert answer in before


def test_what_cannot_ask_stays_and_is_said_once(smollm2, sequences):
    told = Notes()
    short = [TokenSequence(one.names, one.kind, one.input_ids[:64], (0,)) for one in sequences]
    assert Asker(smollm2, 0, told).all(short) == short
    assert len(told.notes) == 1
    assert "length=64 cannot hold" in told.notes[0]


def test_a_template_that_cannot_write_a_question(smollm2, sequences):
    told = Notes()
    refusing = load_tokenizer(find_source("smollm2-135m"))
    refusing.chat_template = "{{ raise_exception('tools are needed') }}"
    assert Asker(refusing, 0, told).all(sequences) == sequences
    assert len(told.notes) == 1
    assert "tools are needed" in told.notes[0]


def test_a_stream_goes_on_with_the_same_texts(tmp_path, smollm2):
    rows = [json.dumps({"text": f"{number}. {PROSE[:3000]}"}) for number in range(120)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))

    def stream() -> SequenceStream:
        made = SequenceStream(stream_of(str(tmp_path / "rows.jsonl")), smollm2, LENGTH)
        made.change = Asker(smollm2, 0, SilentReporter())
        return made

    whole, first = stream(), stream()
    expected = [one for one, _ in zip(whole, range(5), strict=False)]
    read = iter(first)
    for _ in range(3):
        next(read)
    again = stream()
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for one, other in zip(again, expected[3:], strict=False):
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.answers == other.answers
    assert [bool(one.answers) for one in expected] == [True, False, True, False, True]
