"""Windows: exact length, apart from one another, spread over files, the same every time."""

import warnings

import pytest
import torch

from fulmen.data import Document, draw_sequences, iter_sequences, opening_ids, token_ids
from fulmen.errors import ConfigError, CorpusError, DocumentTooShortError
from tests.data.byte_tokenizer import byte_tokenizer


def numbered(name, count, kind="prose", first=0):
    """A document of `count` numbers of five digits and a blank, none of them twice in a test."""
    return Document(name, kind, "".join(f"{first + n:05d} " for n in range(count)))


def numbers_in(window, tokenizer):
    text = tokenizer.decode(window.input_ids).replace("<eos>", "|").replace("<bos>", "")
    return {word for part in text.split("|") for word in part.split()[1:-1]}


FILES = [numbered(f"file{n}", 200 + 40 * n, first=1000 * n) for n in range(12)]
CODE = [numbered(f"code{n}", 300, "code", first=50_000 + 1000 * n) for n in range(5)]


@pytest.mark.parametrize("bos", [None, "<bos>"])
@pytest.mark.parametrize("length", [60, 700, 1500, 5000])
def test_exact_length_and_no_overlap(length, bos):
    tokenizer = byte_tokenizer(bos)
    drawn = draw_sequences(FILES, tokenizer, length, 6)
    seen = set()
    for window in drawn:
        assert window.input_ids.shape == (length,)
        assert window.input_ids.dtype == torch.int64
        found = numbers_in(window, tokenizer)
        assert found
        assert not found & seen
        seen |= found


def test_same_every_time_and_a_larger_count_goes_on():
    tokenizer = byte_tokenizer()
    few = draw_sequences(FILES, tokenizer, 300, 5, seed=3)
    many = draw_sequences(reversed(FILES), tokenizer, 300, 40, seed=3)
    assert all(torch.equal(one.input_ids, other.input_ids) for one, other in zip(few, many, strict=False))
    other_seed = draw_sequences(FILES, tokenizer, 300, 5, seed=4)
    assert [window.name for window in few] != [window.name for window in other_seed]


def test_every_file_before_any_twice():
    drawn = draw_sequences(FILES, byte_tokenizer(), 300, len(FILES))
    assert {window.names for window in drawn} == {(file.name,) for file in FILES}


def test_kinds_take_turns_until_one_is_used_up():
    drawn = draw_sequences([*FILES, *CODE], byte_tokenizer(), 1500, 10)
    assert [window.kind for window in drawn] == ["code", "prose"] * 5
    drawn = draw_sequences([*FILES, numbered("script", 300, "code", 90_000)], byte_tokenizer(), 1500, 6)
    assert [window.kind for window in drawn] == ["code"] + ["prose"] * 5


def test_one_kind_only():
    assert {w.kind for w in draw_sequences([*FILES, *CODE], byte_tokenizer(), 200, 9, kind="code")} == {
        "code"
    }
    with pytest.raises(
        CorpusError, match="no documents of chat kind: this part of the corpus has code and prose"
    ):
        draw_sequences([*FILES, *CODE], byte_tokenizer(), 200, 1, kind="chat")
    with pytest.raises(CorpusError, match="no documents of any kind: this part of the corpus is empty"):
        draw_sequences([], byte_tokenizer(), 200, 1)


@pytest.mark.parametrize("bos", [None, "<bos>"])
def test_short_documents_are_packed_between_eos(bos):
    tokenizer = byte_tokenizer(bos)
    short = [numbered(f"note{n}", 20, first=100 * n) for n in range(30)]
    for window in draw_sequences(short, tokenizer, 500, 5):
        ends = (window.input_ids == tokenizer.eos_token_id).nonzero().flatten()
        assert list(window.starts[1:]) == [end + 1 for end in ends.tolist() if end + 1 < 500]
        assert len(window.names) == len(window.starts) > 3
        assert window.name == " + ".join(window.names)
        for name, start in list(zip(window.names, window.starts, strict=True))[1:]:
            text = next(document.text for document in short if document.name == name)
            assert tokenizer.decode(window.input_ids[start : start + 6]) == text[: min(6, 500 - start)]


def test_packing_needs_eos():
    short = [numbered(f"note{n}", 20, first=100 * n) for n in range(30)]
    with pytest.raises(CorpusError, match=r"no EOS to pack documents with; set tokenizer\.eos_token"):
        draw_sequences(short, byte_tokenizer(eos=None), 500, 1)
    assert len(draw_sequences(short, byte_tokenizer(eos=None), 100, 5)) == 5


def test_too_few_tokens_are_counted():
    tokenizer = byte_tokenizer()
    with pytest.raises(
        DocumentTooShortError, match="the prose documents have 600 tokens, a sequence needs 2000"
    ):
        draw_sequences([numbered("a", 50), numbered("b", 50, first=50)], tokenizer, 2000, 1)
    with pytest.raises(
        CorpusError, match=r"have 600 tokens, which fill 2 sequences of 250; 3 are needed \(750"
    ) as it:
        draw_sequences([numbered("a", 50), numbered("b", 50, first=50)], tokenizer, 250, 3)
    assert not isinstance(it.value, DocumentTooShortError)


def test_all_of_a_corpus_can_be_used():
    total = sum(len(document.text) for document in FILES)
    drawn = draw_sequences(FILES, byte_tokenizer(), 6, total // 6)
    assert len({tuple(window.input_ids.tolist()) for window in drawn}) == total // 6
    assert len(list(iter_sequences(FILES, byte_tokenizer(), 6))) == total // 6


@pytest.mark.parametrize("arguments", [(0, 1), (8, 0), (-3, 1), (1.5, 2)])
def test_sizes_must_be_positive(arguments):
    with pytest.raises(ConfigError, match="use an integer of at least 1"):
        draw_sequences(FILES, byte_tokenizer(), *arguments)


def test_a_window_needs_room_beside_bos():
    with pytest.raises(ConfigError, match="length=1 holds BOS and no text"):
        draw_sequences(FILES, byte_tokenizer("<bos>"), 1, 1)


def test_bos_is_written_only_by_tokenizers_that_write_it():
    with_bos = byte_tokenizer("<bos>")
    assert opening_ids(with_bos) == [with_bos.bos_token_id]
    assert opening_ids(byte_tokenizer()) == []
    assert all(w.input_ids[0] == with_bos.bos_token_id for w in draw_sequences(FILES, with_bos, 100, 20))


def test_long_texts_are_silent(caplog, capsys):
    with warnings.catch_warnings(action="error"):
        assert len(token_ids(byte_tokenizer("<bos>"), "x" * 5000)) == 5000
    assert not caplog.records
    assert capsys.readouterr() == ("", "")


def test_a_huge_document_is_tokenized_in_part_only():
    tokenizer, given = byte_tokenizer(), []

    def counting(text, **options):
        given.append(len(text))
        return tokenizer(text, **options)

    counting.eos_token_id = counting.bos_token_id = tokenizer.eos_token_id
    huge = Document("huge", "prose", "word " * 400_000)
    assert len(draw_sequences([huge], counting, 64, 3)) == 3
    assert sum(given) < len(huge.text) / 4
