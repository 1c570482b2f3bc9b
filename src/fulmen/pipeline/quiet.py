"""Libraries that print nothing while fulmen works, and are as before when it is done."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from fulmen.pipeline.reporter import Reporter


@contextmanager
def quiet(reporter: Reporter) -> Iterator[None]:
    """Within the block bars and warnings of libraries are off; what fulmen itself warns of is a note."""
    with ExitStack() as silent:
        silent.enter_context(_notes_of_warnings(reporter))
        silent.enter_context(warnings.catch_warnings())
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        silent.enter_context(_quiet_transformers())
        silent.enter_context(_quiet_datasets())
        # Of a hub that cannot be reached each attempt would be told; the last one is an error anyway. TRL
        # imports vLLM, which then says what the machine has not.
        for library in ("huggingface_hub", "vllm"):
            silent.enter_context(_quiet_logger(library))
        yield


class _Notes(logging.Handler):
    """Hands records on to a reporter."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__(logging.WARNING)
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        """One note a record."""
        self._reporter.note(record.getMessage())


@contextmanager
def _notes_of_warnings(reporter: Reporter) -> Iterator[None]:
    logger, notes = logging.getLogger("fulmen"), _Notes(reporter)
    # Of two blocks, one in the other, the outer one has the reporter already.
    if any(isinstance(handler, _Notes) for handler in logger.handlers):
        yield
        return
    logger.addHandler(notes)
    try:
        yield
    finally:
        logger.removeHandler(notes)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging as library

    verbosity, had_bars = library.get_verbosity(), library.is_progress_bar_enabled()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:  # the user's own setting wins
        library.set_verbosity(max(verbosity, logging.ERROR))
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(verbosity)
        if had_bars:
            library.enable_progress_bar()


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    # Where it is not imported yet nothing is to be put back, and importing it takes seconds.
    library = sys.modules.get("datasets")
    if library is None or library.are_progress_bars_disabled():
        yield
        return
    library.disable_progress_bars()
    try:
        yield
    finally:
        library.enable_progress_bars()


@contextmanager
def _quiet_logger(library: str) -> Iterator[None]:
    """Errors alone."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(max(logger.getEffectiveLevel(), logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(level)
