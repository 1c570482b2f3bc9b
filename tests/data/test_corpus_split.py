"""The split: disjoint, complete, decided by the names, every kind in every part."""

import random

import pytest

from fulmen.data import Document, split_documents
from fulmen.errors import CorpusError


def made(count, kind="prose", size=1000):
    return [Document(f"{kind}{n}", kind, f"{kind} {n} " + chr(97 + n % 26) * size) for n in range(count)]


def parts_of(corpus):
    return corpus.calibration, corpus.training, corpus.heldout


@pytest.mark.parametrize("count", [3, 4, 7, 50])
def test_every_kind_is_in_every_part_once(count):
    documents = [*made(count, size=3000), *made(count, "code", size=9000)]
    corpus = split_documents(documents)
    assert sorted(sum(parts_of(corpus), ())) == sorted(documents)
    assert all({d.kind for d in part} == {"prose", "code"} for part in parts_of(corpus))


def test_shares_are_about_60_15_25_of_each_kind():
    corpus = split_documents([*made(200), *made(100, "code")])
    for kind, count in (("prose", 200), ("code", 100)):
        shares = [sum(d.kind == kind for d in part) / count for part in parts_of(corpus)]
        assert shares == pytest.approx([0.10, 0.60, 0.30], abs=0.02)


def test_order_does_not_matter():
    documents = made(40)
    shuffled = random.Random(0).sample(documents, len(documents))
    assert split_documents(shuffled) == split_documents(documents)


def test_a_new_document_moves_few_of_the_others():
    before, after = split_documents(made(100)), split_documents(made(101))
    for one, other in zip(parts_of(before), parts_of(after), strict=True):
        assert len(set(one) - set(other)) <= 2


def test_copies_are_kept_once():
    documents = made(8)
    copies = [Document(f"z{one.name}", one.kind, one.text) for one in documents]
    assert split_documents(documents + copies) == split_documents(documents)


@pytest.mark.parametrize("count", [1, 2])
def test_few_documents_are_cut_and_nothing_is_lost(count):
    corpus = split_documents(made(count, size=20_000))
    assert sum(len(d.text) for part in parts_of(corpus) for d in part) == sum(
        len(d.text) for d in made(count, size=20_000)
    )
    assert [len(part) for part in parts_of(corpus)] == [count] * 3


def test_a_tiny_kind_is_trained_on_only():
    corpus = split_documents([*made(6, size=3000), Document("setup.py", "code", "import this")])
    assert "setup.py" in {d.name for d in corpus.training}
    assert all(d.kind == "prose" for d in corpus.heldout)


def test_too_small_names_sizes_and_minimum():
    with pytest.raises(
        CorpusError, match="has 11 characters of code, 5 characters of prose; a split needs 6000"
    ):
        split_documents([Document("a", "code", "import this"), Document("b", "prose", "short")])
    with pytest.raises(CorpusError, match="has no text"):
        split_documents([])


def test_fingerprint_sees_names_texts_and_split():
    documents = made(9)
    prints = {
        split_documents(documents).fingerprint,
        split_documents([*documents[1:], documents[0]._replace(text="other")]).fingerprint,
        split_documents([*documents[1:], documents[0]._replace(name="other")]).fingerprint,
        split_documents(documents[1:]).fingerprint,
    }
    assert len(prints) == 4
    assert split_documents(documents).fingerprint in prints
