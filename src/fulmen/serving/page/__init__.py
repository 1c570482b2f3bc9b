"""The page: its files and the headers to serve them with. It asks nothing but the server it came from.

It needs `GET fulmen/info` and `POST v1/chat/completions` beside it, `POST fulmen/ask` where the info names
documents, and works under any prefix of the path.
"""

from pathlib import Path
from typing import NamedTuple


class PageFile(NamedTuple):
    """A file of the page and its Content-Type."""

    path: Path
    media_type: str


_FOLDER = Path(__file__).parent
_SCRIPTS = ("page.js", "documents.js", "figures.js", "server.js", "text.js", "view.js")
_STYLES = ("page.css", "documents.css")

# By path of the URL. A server gives out exactly these.
FILES = {
    "/": PageFile(_FOLDER / "index.html", "text/html; charset=utf-8"),
    **{f"/{name}": PageFile(_FOLDER / name, "text/css; charset=utf-8") for name in _STYLES},
    **{f"/{name}": PageFile(_FOLDER / name, "text/javascript; charset=utf-8") for name in _SCRIPTS},
}

# Nothing inline, nothing from elsewhere: a model's output has no way to run, load or send anything.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
