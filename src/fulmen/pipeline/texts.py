"""The texts of a run: how long they are, and which."""

import sys
from collections.abc import Callable, Sequence
from itertools import islice, pairwise
from typing import Any, NamedTuple, TypeVar

from transformers import PreTrainedConfig

from fulmen.data import (
    Corpus,
    DataSets,
    Document,
    TokenSequence,
    draw_sequences,
    iter_sequences,
    load_corpus,
    lookup_sequence,
    stream_of,
)
from fulmen.errors import ConfigError, CorpusError
from fulmen.modeling.lengths import context_of, default_length
from fulmen.pipeline.reporter import Reporter

CALIBRATION_SEQUENCES, CALIBRATION_TOKENS = 4, 32_768
TRAINING_SEQUENCES = 64
# Texts that ask, with which splits of k are tried, and their tokens at most: each is read four times.
ANSWERED_SEQUENCES, ANSWERED_TOKENS = 2, 4096
VALIDATION_SEQUENCES = 4
# Numbers of sequences are meant for this length; of longer ones fewer are read: it takes no more time.
COUNTED_LENGTH = 2048
# One for code and one for prose.
FEWEST_SEQUENCES = 2

Drawn = TypeVar("Drawn")


class ConversionTexts(NamedTuple):
    """What a conversion reads.

    length: tokens of a text to train on; those to calibrate on may be longer. answered: calibration texts
    with questions and answers; none where they cannot be made.
    """

    length: int
    calibration: list[TokenSequence]
    answered: list[TokenSequence]
    training: list[TokenSequence]
    validation: list[TokenSequence]


def read_corpus(data: Sequence[str], texts: Sequence[str]) -> Corpus:
    """The corpus of these places and texts in memory; without any, of the text that comes with Python.

    Raises CorpusError as `load_corpus`.
    """
    return load_corpus(*data, texts=texts)


def read_stream(data: Sequence[str], texts: Sequence[str]) -> DataSets | None:
    """The places as data sets to stream; None if they, or texts in memory, are to be read whole."""
    return None if texts else stream_of(*data)


def kinds_of(documents: Sequence[Document]) -> list[str]:
    """Kinds of text among the documents, sorted."""
    return sorted({document.kind for document in documents})


def count_of_length(count: int, length: int) -> int:
    """`count`, or of sequences longer than 2,048 as many as hold no more tokens than `count` of these."""
    return max(min(FEWEST_SEQUENCES, count), min(count, count * COUNTED_LENGTH // length))


def lengths_to_try(
    wanted: int | None, config: PreTrainedConfig, topk: int, most: int = sys.maxsize
) -> list[int]:
    """Tokens of a text for training: as asked, within the context; else the default, and shorter ones.

    most: of the default.

    The shorter ones, each half of the last, are for text that does not fill the default.

    Raises ConfigError if k leaves nothing to learn, which a config says before anything is loaded.
    """
    context = context_of(config)
    default = min(default_length(config, topk), most)
    length = default if wanted is None else min(wanted, context or wanted)
    if topk >= length:
        whose = "the model's context" if length == context else "the sequence"
        more = "a smaller topk" + (" or a longer length" if length != context else "")
        raise ConfigError(
            f"topk={topk} is not below {whose} of {length} tokens, so there is nothing to select; use {more}",
            arguments=["topk", "length"],
        )
    lengths = [length]
    while wanted is None and lengths[-1] // 2 > topk:
        lengths.append(lengths[-1] // 2)
    return lengths


def draw_longest(lengths: Sequence[int], draw: Callable[[int], Drawn], reporter: Reporter) -> Drawn:
    """What `draw` gives for the first length that the text fills. Raises what it does for the last one."""
    for length, shorter in pairwise(lengths):
        try:
            return draw(length)
        except (CorpusError, ConfigError):
            reporter.note(f"There is too little text for sequences of {length:,} tokens; trying {shorter:,}")
    return draw(lengths[-1])


def conversion_texts(
    corpus: Corpus,
    tokenizer: Any,
    length: int,
    context: int | None,
    seed: int,
    reporter: Reporter,
    *,
    trains: bool,
    calibration_tokens: int = sys.maxsize,
) -> ConversionTexts:
    """The texts of a conversion; without those to train on unless it `trains`.

    calibration_tokens: of all calibration texts at most, as far as `calibration_shape` can.

    Raises:
        CorpusError: there is not even one text to calibrate on (`DocumentTooShortError`).
        ConfigError: there is but one to train on.
    """
    calibration = calibration_texts(corpus.calibration, tokenizer, length, context, seed, calibration_tokens)
    shorter = up_to(corpus.calibration, tokenizer, min(length, ANSWERED_TOKENS), ANSWERED_SEQUENCES, seed)
    asked = Asker(tokenizer, seed, reporter, every=1).all(shorter)
    answered = [sequence for sequence in asked if sequence.answers]
    if not trains:
        return ConversionTexts(length, calibration, answered, [], [])
    n_held_out = count_of_length(VALIDATION_SEQUENCES, length)
    drawn = up_to(corpus.training, tokenizer, length, TRAINING_SEQUENCES + n_held_out, seed)
    return ConversionTexts(length, calibration, answered, *split_off(drawn, n_held_out, "warm-up"))


def calibration_texts(
    documents: Sequence[Document],
    tokenizer: Any,
    length: int,
    context: int | None,
    seed: int,
    most: int = sys.maxsize,
) -> list[TokenSequence]:
    """Twice as long as the training texts where the text allows: thresholds must hold far out too."""
    count, longer = calibration_shape(length, context, most)
    drawn = list(islice(iter_sequences(documents, tokenizer, longer, seed=seed), count))
    return drawn if len(drawn) == count else up_to(documents, tokenizer, length, count, seed)


def calibration_shape(length: int, context: int | None, most: int = sys.maxsize) -> tuple[int, int]:
    """Calibration texts, and tokens of each, where training texts have `length` and the text allows.

    most: tokens of all; two texts of `length` are the least.
    """
    longer = min(2 * length, context or length)
    if FEWEST_SEQUENCES * longer > most:
        longer = length
    # All of them are in memory at once, layer by layer.
    within = min(CALIBRATION_TOKENS, most) // longer
    return max(FEWEST_SEQUENCES, min(CALIBRATION_SEQUENCES, within)), longer


def calibration_sizes(length: int, context: int | None) -> list[int]:
    """Tokens of all calibration texts: as many as are wished for, and what less memory leaves of them."""
    count, longer = calibration_shape(length, context)
    return sorted({count * longer, FEWEST_SEQUENCES * longer, FEWEST_SEQUENCES * length}, reverse=True)


class Asker:
    """Makes every second sequence a text that asks and looks up, of the same length.

    One stays as it is if it is too short, or if the chat template cannot write a question; the first time,
    the reporter is told why.
    """

    def __init__(self, tokenizer: Any, seed: int, reporter: Reporter, every: int = 2) -> None:
        self.tokenizer, self.seed, self.reporter, self.every = tokenizer, seed, reporter, every
        self.told = False

    def __call__(self, sequence: TokenSequence, number: int) -> TokenSequence:
        """The sequence of this number, changed or not."""
        if number % self.every:
            return sequence
        try:
            return lookup_sequence(sequence, self.tokenizer, number, seed=self.seed)
        except ConfigError as error:
            if not self.told:
                self.reporter.note(f"Texts without questions and answers stay as they are: {error}")
            self.told = True
            return sequence

    def all(self, sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
        """All of them, numbered from 0."""
        return [self(sequence, number) for number, sequence in enumerate(sequences)]


def up_to(
    documents: Sequence[Document], tokenizer: Any, length: int, count: int, seed: int
) -> list[TokenSequence]:
    """`count` sequences, or fewer where the text ends. Raises CorpusError if there is not even one."""
    drawn = list(islice(iter_sequences(documents, tokenizer, length, seed=seed), count))
    return drawn or draw_sequences(documents, tokenizer, length, 1, seed=seed)


def split_off(
    drawn: Sequence[TokenSequence], n_held_out: int, stage: str
) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """What a stage trains on, and the first sequences, held out: `n_held_out`, or half of a few.

    Raises ConfigError if there is but one.
    """
    n_held_out = min(n_held_out, len(drawn) // 2)
    if not n_held_out:
        length = len(drawn[0].input_ids)
        raise ConfigError(
            f"the training text fills one sequence of {length} tokens; {stage} needs 2: add text"
        )
    return list(drawn[n_held_out:]), list(drawn[:n_held_out])
