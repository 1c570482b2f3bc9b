"""Text of HTML and PDF, in a process of its own: a file that makes a parser slow ends this process.

Run as a script by `reader`, which writes a line of JSON ({"kind", "size"}) and the bytes; for each a line of
JSON comes back, {"text"} or {"reason"}. Standard library, and pypdf if it is there; nothing of fulmen.
"""

import io
import json
import logging
import re
import resource
import sys
from html.parser import HTMLParser
from typing import Any

MEMORY_BYTES = 2 * 2**30
MAX_PAGES = 5000
MAX_TEXT = 16 * 2**20
SILENT = frozenset({"script", "style", "template", "noscript", "svg"})
BLOCK = re.compile(
    "address|article|aside|blockquote|body|br|caption|d[dlt]|details|div|fieldset|figcaption|figure|footer|form|"
    "h[1-6r]|head|header|html|legend|li|main|nav|ol|option|p|pre|section|select|summary|table|tbody|t[dhr]|"
    "textarea|tfoot|thead|title|ul"
)


class HtmlText(HTMLParser):
    """A page's words: a line for each block, white space as shown, scripts and styles left out."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._lines: list[str] = []
        self._line: list[str] = []
        self._silent, self._preformatted = 0, 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        """A block begins a line."""
        self._silent += tag in SILENT
        if BLOCK.fullmatch(tag):
            self._end_line()
        self._preformatted += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        """And ends one."""
        self._silent = max(0, self._silent - (tag in SILENT))
        if BLOCK.fullmatch(tag):
            self._end_line()
        self._preformatted = max(0, self._preformatted - (tag == "pre"))

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        """As an element that holds nothing."""
        if BLOCK.fullmatch(tag):
            self._end_line()

    def handle_data(self, data: str) -> None:
        """Words."""
        if not self._silent:
            self._line.append(data)

    def text(self) -> str:
        """All lines, after `close`."""
        self._end_line()
        return "".join(f"{line}\n" for line in self._lines)

    def _end_line(self) -> None:
        words, self._line = "".join(self._line), []
        if self._preformatted:
            self._lines += [line.rstrip() for line in words.strip("\n").split("\n") if words.strip()]
        elif shown := " ".join(words.split()):
            self._lines.append(shown)


def html_text(text: str) -> str:
    """The words of a page."""
    parser = HtmlText()
    parser.feed(text)
    parser.close()
    return parser.text()


def pdf_text(content: bytes) -> str:
    """A PDF's pages, each behind a line with its number. Raises ValueError with a reason in a few words."""
    import pypdf

    reader = pypdf.PdfReader(io.BytesIO(content))
    if reader.is_encrypted and not reader.decrypt(""):
        raise ValueError("an encrypted PDF")
    if len(reader.pages) > MAX_PAGES:
        raise ValueError(f"a PDF of more than {MAX_PAGES:,} pages")
    parts, size = [], 0
    for number, page in enumerate(reader.pages, 1):
        words = page.extract_text().strip()
        parts.append(f"[page {number}]\n{words}\n" if words else f"[page {number}]\n")
        size += len(words)
        if size > MAX_TEXT:
            raise ValueError(f"a PDF with more than {MAX_TEXT:,} characters")
    if not size:
        raise ValueError("a PDF without text (scanned pages?)")
    return "".join(parts)


def answer(kind: str, content: bytes) -> dict[str, str]:
    """The text of one file, or why it has none."""
    try:
        text = html_text(content.decode()) if kind == "html" else pdf_text(content)
        # Half a surrogate pair, which PDFs have, is no text.
        return {"text": text.encode("utf-8", "replace").decode()}
    except ModuleNotFoundError as error:
        return {"reason": f"needs the package {error.name} (pip install 'fulmen[docs]')"}
    except ValueError as error:
        return {"reason": " ".join(str(error).split())[:200]}
    except MemoryError:
        return {"reason": "needs too much memory to read"}
    except Exception as error:  # a parser on a damaged file raises whatever it likes
        return {"reason": f"cannot be read as {kind.upper()} ({type(error).__name__})"}


def main() -> None:
    """Answer until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.CRITICAL)
    while line := sys.stdin.buffer.readline():
        asked = json.loads(line)
        content = sys.stdin.buffer.read(asked["size"])
        sys.stdout.write(json.dumps(answer(asked["kind"], content)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
