"""Text to calibrate, train and judge with: its sources, its split by file, and sequences of tokens from it.

    corpus = load_corpus("demo")                               # or a path, or hf:name:config:split
    draw_sequences(corpus.calibration, tokenizer, length=2048, count=8)
    SequenceStream(stream_of("hf:name"), tokenizer, 2048)        # of a data set that is too large to hold
    lookup_texts(corpus.heldout, tokenizer, length=8192, count=8) # texts that ask and look up

It stands beside errors and config: training and evaluation both read it, and it imports only these two.
"""

from fulmen.data.data_sets import DataSets
from fulmen.data.documents import Corpus, Document, split_documents
from fulmen.data.lookup_training import lookup_sequence, lookup_sequences
from fulmen.data.lookups import Lookup, LookupText, lookup_texts
from fulmen.data.rows import described
from fulmen.data.sequences import TokenSequence, draw_sequences, iter_sequences, opening_ids, token_ids
from fulmen.data.sources import load_corpus, stream_of
from fulmen.data.stream import SequenceStream

__all__ = [
    "Corpus",
    "DataSets",
    "Document",
    "Lookup",
    "LookupText",
    "SequenceStream",
    "TokenSequence",
    "described",
    "draw_sequences",
    "iter_sequences",
    "load_corpus",
    "lookup_sequence",
    "lookup_sequences",
    "lookup_texts",
    "opening_ids",
    "split_documents",
    "stream_of",
    "token_ids",
]
