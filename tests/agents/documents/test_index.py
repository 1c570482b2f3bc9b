"""The index: what it reads, what it passes over, what it reads again, and that it stays in its folder."""

import os
import sqlite3
import time
from importlib.util import find_spec

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fulmen.agents.documents import index as index_module
from fulmen.agents.documents.folder import walk
from fulmen.agents.documents.index import DocumentIndex
from fulmen.agents.documents.passages import passages_of, span_of
from fulmen.agents.documents.reader import TextReader, Unreadable
from fulmen.agents.documents.store import cache_folder
from fulmen.errors import DocumentError, OutputError
from tests.agents.documents.conftest import CODE, GUIDE

SECRET = "the secret of the neighbour"


def reasons(index):
    return {one.path: one.reason for one in index.passed_over()}


def paths(index):
    return [one.path for one in index.documents()]


def test_text_code_and_pages_are_read(index):
    assert paths(index) == ["code/ships.py", "guide.md", "page.html"]
    assert index.text("guide.md") == GUIDE
    assert index.text("page.html") == "Sails & masts\nNine white sails.\n  a\n   b\n"
    assert [one.lines for one in index.documents()] == [2, 4, 4]
    assert reasons(index) == {}
    assert [one.path for one in index.documents("code/*")] == ["code/ships.py"]


def test_a_search_ranks_by_words_and_tells_where(index):
    (best,) = index.search("How many ships does the KEEPER count?", "*.md")
    assert best.path == "guide.md"
    assert index.text("guide.md")[best.span.first_character : best.span.end_character] == best.text
    assert index.search("count_ships")[0].path == "code/ships.py"
    assert index.search("unheard-of") == []
    # None of these is the search's own language.
    assert index.search('sail" OR NEAR(a b) -x* {y}:')[0].path in ("guide.md", "page.html")
    for query in ("", "*!?", "word " * 400):
        with pytest.raises(DocumentError, match="query="):
            index.search(query)


def test_what_is_no_document_is_counted_and_named(folder, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.md").write_text(SECRET)
    (folder / "link.md").symlink_to(tmp_path / "outside" / "secret.md")
    (folder / "linked").symlink_to(tmp_path / "outside")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.md")
    (folder / ".hidden.md").write_text(SECRET)
    (folder / "empty.md").write_text(" \n")
    (folder / "photo.png").write_bytes(b"\x89PNG\0\0\0")
    (folder / "large.txt").write_bytes(b"a" * (16 * 2**20 + 1))
    (folder / "noise.txt").write_bytes(bytes(range(128, 256)) * 9)
    (folder / "latin.txt").write_bytes("Das Wetter ist sehr schön heute\r\nund morgen".encode("latin-1"))
    (folder / "wide.txt").write_bytes("Größe\n".encode("utf-16"))
    os.close(os.open(os.fsencode(folder) + b"/bad\xff.md", os.O_CREAT))
    (folder / "new\nline.md").write_text("text")
    index = DocumentIndex(folder, tmp_path / "cache")
    index.refresh()
    assert reasons(index) == {
        "link.md": "a symbolic link",
        "linked": "a symbolic link",
        "loop": "a symbolic link",
        "pipe.md": "no regular file",
        ".hidden.md": "hidden (the name begins with a dot)",
        "empty.md": "empty",
        "photo.png": "binary",
        "large.txt": "larger than 16 MiB",
        "noise.txt": "no text in UTF-8",
        "bad�.md": "a name that cannot be written",
        "new�line.md": "a name that cannot be written",
    }
    (latin,) = index.documents("latin.txt")
    assert latin.remark == "bad UTF-8: 1 places shown as �"
    assert index.text("latin.txt") == "Das Wetter ist sehr sch�n heute\nund morgen"
    assert index.text("wide.txt") == "Größe\n"
    assert index.search("secret neighbour") == []


@pytest.mark.parametrize(
    "path", ["../outside.md", "/etc/passwd", "code/../../outside.md", "~/x", "./guide.md", "code"]
)
def test_only_indexed_paths_are_opened(index, folder, path):
    (folder.parent / "outside.md").write_text(SECRET)
    with pytest.raises(DocumentError, match="list names all documents"):
        index.text(path)


def test_a_file_swapped_for_a_link_is_not_followed(folder, tmp_path):
    (tmp_path / "secret.md").write_text(SECRET)
    for file in walk(folder):
        if file.path == "guide.md":
            (folder / "guide.md").unlink()
            (folder / "guide.md").symlink_to(tmp_path / "secret.md")
            with pytest.raises(OSError, match="symbolic"), file.opened():
                pass


def settle(*files):
    """Make files old enough for their times to be trusted."""
    for file in files:
        long_ago = time.time() - 3600
        os.utime(file, (long_ago, long_ago))


def test_only_what_changed_is_read_again(folder, tmp_path, monkeypatch):
    settle(*(path for path in folder.rglob("*") if path.is_file()))
    index = DocumentIndex(folder, tmp_path / "cache")
    opened, taken_apart = [], []
    contents, read = index_module.contents, TextReader.read
    monkeypatch.setattr(index_module, "contents", lambda file: opened.append(file.path) or contents(file))
    monkeypatch.setattr(
        TextReader, "read", lambda self, path, content: taken_apart.append(path) or read(self, path, content)
    )
    index.refresh()
    assert sorted(opened) == sorted(taken_apart) == ["code/ships.py", "guide.md", "page.html"]
    opened.clear()
    taken_apart.clear()
    index.refresh()
    DocumentIndex(folder, tmp_path / "cache").refresh()
    assert opened == []
    os.utime(folder / "guide.md", (1e9, 1e9))
    index.refresh()
    assert (opened, taken_apart) == (["guide.md"], [])
    (folder / "guide.md").write_text("Nothing but gulls.\n")
    (folder / "page.html").unlink()
    (folder / "new.txt").write_text("A new dock.\n")
    index.refresh()
    assert taken_apart == ["guide.md", "new.txt"]
    assert paths(index) == ["code/ships.py", "guide.md", "new.txt"]
    assert index.search("lighthouse") == []
    assert index.search("gulls")[0].text == "Nothing but gulls.\n"


def test_an_edit_of_the_same_size_at_the_same_time_is_seen(folder, index):
    times = os.stat(folder / "guide.md")
    (folder / "guide.md").write_text(GUIDE.replace("forty-two", "forty-one"))
    os.utime(folder / "guide.md", ns=(times.st_atime_ns, times.st_mtime_ns))
    index.refresh()
    assert "forty-one" in index.text("guide.md")


def test_a_damaged_index_is_made_anew(folder, tmp_path):
    index = DocumentIndex(folder, tmp_path / "cache")
    index.close()
    index.path.write_bytes(b"no database" * 500)
    again = DocumentIndex(folder, tmp_path / "cache")
    again.refresh()
    assert again.text("code/ships.py") == CODE


def test_two_at_a_time_share_the_index(folder, index, tmp_path):
    other = DocumentIndex(folder, tmp_path / "cache")
    (folder / "new.txt").write_text("A new dock.\n")
    other.refresh()
    index.refresh()
    assert paths(index) == paths(other)


def test_the_index_lies_in_the_cache_and_never_in_the_folder(folder, tmp_path, monkeypatch):
    before = sorted(folder.rglob("*"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("FULMEN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder(None) == tmp_path / "home" / ".cache" / "fulmen"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder(None) == tmp_path / "home" / ".cache" / "fulmen"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(None) == tmp_path / "xdg" / "fulmen"
    monkeypatch.setenv("FULMEN_CACHE", str(tmp_path / "own"))
    index = DocumentIndex(folder)
    index.refresh()
    assert index.path.is_relative_to(tmp_path / "own")
    assert index.path.parent.stat().st_mode & 0o077 == 0
    assert sorted(folder.rglob("*")) == before
    with pytest.raises(DocumentError, match="inside the folder"):
        DocumentIndex(folder, folder / "cache")
    with pytest.raises(OutputError, match="cannot be written"):
        DocumentIndex(folder, "/proc/nowhere")


def test_folders_that_cannot_be(folder, tmp_path, monkeypatch):
    for name in ("none", "documents/guide.md"):
        with pytest.raises(DocumentError, match="name a folder"):
            DocumentIndex(tmp_path / name, tmp_path / "cache")
    index = DocumentIndex(folder, tmp_path / "cache")
    monkeypatch.setattr(index_module, "MAX_FILES", 2)
    with pytest.raises(DocumentError, match="more than 2 files"):
        index.refresh()
    monkeypatch.setattr(index_module, "MAX_FILES", 3)
    monkeypatch.setattr(index_module, "MAX_CHARACTERS", 50)
    with pytest.raises(DocumentError, match="characters of text"):
        index.refresh()
    assert paths(index) == [], "half a refresh is none"
    folder.rename(tmp_path / "moved")
    with pytest.raises(DocumentError, match="cannot be read any more"):
        index.refresh()


def test_a_page_that_takes_too_long_is_named_and_the_next_one_read():
    reader = TextReader(time_limit_s=0.5)
    # Quadratic in Python's parser.
    with pytest.raises(Unreadable, match="not read within"):
        reader.read("slow.html", b"<!--" * 200_000)
    assert TextReader().read("page.html", b"<p>after</p>").text == "after\n"
    reader.close()


def test_pdf_without_its_package_says_so():
    if find_spec("pypdf"):
        pytest.skip("pypdf is installed")
    with pytest.raises(Unreadable, match="needs the package pypdf"):
        TextReader().read("paper.pdf", b"%PDF-1.4")


def test_pdf_pages_have_their_numbers():
    pypdf = pytest.importorskip("pypdf", reason="needs the package pypdf")
    from io import BytesIO

    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = pypdf.PdfWriter()
    font = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
    font = DictionaryObject({NameObject(key): NameObject(value) for key, value in font.items()})
    for words in ("Nine sails", "Two masts"):
        page = writer.add_blank_page(200, 200)
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 10 100 Td ({words}) Tj ET".encode())
        page[NameObject("/Contents")] = writer._add_object(stream)
        fonts = DictionaryObject({NameObject("/F1"): font})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
    file = BytesIO()
    writer.write(file)
    assert TextReader().read("a.pdf", file.getvalue()).text == "[page 1]\nNine sails\n[page 2]\nTwo masts\n"
    with pytest.raises(Unreadable, match="PDF"):
        TextReader().read("a.pdf", file.getvalue()[:200])


@settings(max_examples=60)
@given(st.lists(st.sampled_from(["word ", "\n", "\n\n", "x" * 700, "é" * 1300]), max_size=40))
def test_passages_are_the_text_with_true_spans(pieces):
    text = "".join(pieces)
    found = list(passages_of(text))
    assert "".join(body for body, _ in found) == text
    for body, span in found:
        assert text[span.first_character : span.end_character] == body
        assert span == span_of(text, span.first_character, span.end_character)
        lines = text.split("\n")[span.first_line - 1 : span.last_line]
        assert body.removesuffix("\n") in "\n".join(lines)


def test_the_index_is_an_ordinary_database(index):
    (count,) = sqlite3.connect(index.path).execute("SELECT count(*) FROM documents").fetchone()
    assert count == 3
