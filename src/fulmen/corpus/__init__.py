"""Text to calibrate, train and judge with: its sources, its split by file, and windows of tokens from it.

    corpus = load_corpus("demo")                               # or a path, or hf:name:config:split
    windows(corpus.calibration, tokenizer, length=2048, count=8)

It stands beside errors and config: training and evaluation both read it, and it imports only these two.
"""

from fulmen.corpus.documents import Corpus, Document, split_documents
from fulmen.corpus.sources import load_corpus
from fulmen.corpus.windows import Window, opening_ids, token_ids, window_stream, windows

__all__ = [
    "Corpus",
    "Document",
    "Window",
    "load_corpus",
    "opening_ids",
    "split_documents",
    "token_ids",
    "window_stream",
    "windows",
]
