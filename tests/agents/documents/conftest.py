"""A folder of small documents, and its index in a cache of the test's own."""

import pytest

from fulmen.agents.documents.index import DocumentIndex
from fulmen.agents.documents.tools import DocumentTools

GUIDE = "# Harbour\n\nThe lighthouse keeper counts forty-two ships.\nEach has a red sail.\n"
CODE = "def count_ships(harbour):\n    return len(harbour.ships)\n"
PAGE = (
    "<html><head><title>Sails &amp; masts</title><style>p {}</style></head><body><p>Nine  <b>white</b>\n"
    "sails.<script>alert(1)</script></p><pre>  a\n   b</pre></body></html>"
)


@pytest.fixture
def folder(tmp_path):
    """Three documents: Markdown, source code, HTML."""
    found = tmp_path / "documents"
    (found / "code").mkdir(parents=True)
    (found / "guide.md").write_text(GUIDE)
    (found / "code" / "ships.py").write_text(CODE)
    (found / "page.html").write_text(PAGE)
    return found


@pytest.fixture
def index(folder, tmp_path):
    """The folder's index, up to date."""
    found = DocumentIndex(folder, tmp_path / "cache")
    found.refresh()
    yield found
    found.close()


@pytest.fixture
def tools(index):
    return DocumentTools(index)
