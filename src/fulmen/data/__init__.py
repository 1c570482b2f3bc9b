"""Text to calibrate, train and judge with: its sources, its split by file, and windows of tokens from it.

    corpus = load_corpus("demo")                               # or a path, or hf:name:config:split
    windows(corpus.calibration, tokenizer, length=2048, count=8)
    WindowStream(stream_of("hf:name"), tokenizer, 2048)        # of a data set that is too large to hold

It stands beside errors and config: training and evaluation both read it, and it imports only these two.
"""

from fulmen.data.data_sets import DataSets
from fulmen.data.documents import Corpus, Document, split_documents
from fulmen.data.rows import described
from fulmen.data.sources import load_corpus, stream_of
from fulmen.data.stream import WindowStream
from fulmen.data.windows import Window, opening_ids, token_ids, window_stream, windows

__all__ = [
    "Corpus",
    "DataSets",
    "Document",
    "Window",
    "WindowStream",
    "described",
    "load_corpus",
    "opening_ids",
    "split_documents",
    "stream_of",
    "token_ids",
    "window_stream",
    "windows",
]
