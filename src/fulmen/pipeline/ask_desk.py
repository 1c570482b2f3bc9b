"""A folder whose documents a server answers questions about: what `fulmen serve --docs` gives the gateway."""

import contextlib
import sys
from pathlib import Path

from fulmen.agents.documents.index import DocumentIndex
from fulmen.pipeline.arguments import Place, place_argument
from fulmen.pipeline.ask import read_documents
from fulmen.pipeline.reporter import Reporter, reporter_of
from fulmen.serving.gateway.questions.desk import QuestionDesk

WORKER = "fulmen.pipeline.ask_worker"


def folder_desk(folder: Place, reporter: Reporter | None = None) -> QuestionDesk:
    """A desk for `fulmen.serving.server.serve`; the folder's index is up to date then.

    Args:
        folder: text, Markdown, source code, HTML, and PDF with the package pypdf. Nothing outside it is read.
        reporter: whom to tell what is passed over; None: nobody.

    Raises:
        DocumentError: a folder that is missing, has no document, or is too large.
        OutputError: the index cannot be written.
    """
    place = place_argument("folder", folder, "a folder of documents")
    with contextlib.closing(DocumentIndex(Path(place))) as index:
        documents = read_documents(index, reporter_of(reporter))
        return QuestionDesk(index.folder, len(documents), (sys.executable, "-m", WORKER))
