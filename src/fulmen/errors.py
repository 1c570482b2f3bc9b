"""Every error a user can cause, in one tree.

    FulmenError (ValueError)
    ├── ConfigError                  topk, index dims, steps or budget that cannot be
    ├── UnsupportedModelError        architecture without a family, or a layer kind we cannot convert
    ├── AlreadyConvertedError        the source has an indexer already
    ├── CheckpointError              unreadable, truncated, of an unsupported type, or with NaN weights
    ├── CorpusError                  empty, binary, too small to split
    │   └── DocumentTooShortError    a document shorter than the window that was asked for
    ├── DocumentError                a folder of documents that is missing, empty or huge
    ├── OutputError                  the output exists, is not writable, or the disk is full
    ├── ResumeError                  a half-finished run with other settings lies in the output directory
    ├── TrainingDivergedError        NaN or Inf in a loss
    ├── RolloutError                 a rollout engine that disagrees with the trainer, or cannot do as asked
    ├── CacheError                   a cache that has no room for index keys
    ├── BackendError                 a pinned backend that cannot run here
    ├── EndpointError                a model server that cannot be reached, or lacks the model
    ├── EngineError                  the engine behind `fulmen serve` is not installed, or does not start
    ├── SandboxError                 generated code cannot be isolated here, so it is not run
    ├── MessageError                 chat messages that cannot be written, or a reply that cannot be read
    │   └── ContextBudgetError       messages that must be kept and take more tokens than there are
    ├── AccountError                 a key or key file that cannot be used, or an account that is not there
    └── LedgerError                  a ledger that cannot be opened, or does not fit what is asked of it
        └── InsufficientBalance      an account whose deposits are used up

A message is one line and names the thing, its value and the remedy. Our own invariants are `assert`s.
"""

import collections.abc


class FulmenError(ValueError):
    """Base of all errors that a user can cause and fix.

    Attributes:
        arguments: names of Python arguments in the message, which the command line writes as its options.
    """

    def __init__(self, message: str = "", *, arguments: collections.abc.Iterable[str] = ()) -> None:
        super().__init__(message)
        self.arguments = tuple(arguments)


class ConfigError(FulmenError):
    """A setting that cannot be: its name, its value, what it may be."""


class UnsupportedModelError(FulmenError):
    """The model's architecture (or one of its parts) has no family in fulmen."""


class AlreadyConvertedError(FulmenError):
    """The source model is a DSA model already."""


class CheckpointError(FulmenError):
    """A model file that is missing, truncated, of an unsupported type, or holds NaN."""


class CorpusError(FulmenError):
    """A text corpus that is missing, empty, binary or too small to split."""


class DocumentTooShortError(CorpusError):
    """A document with fewer tokens than the window that was asked for."""


class DocumentError(FulmenError):
    """A folder of documents that is missing, empty or too large, or a request about it that cannot be met."""


class OutputError(FulmenError):
    """An output path that exists, cannot be written, or has no room."""


class ResumeError(FulmenError):
    """A half-finished run whose settings differ from those asked for now."""


class TrainingDivergedError(FulmenError):
    """A loss became NaN or infinite; the best weights so far are kept."""


class RolloutError(FulmenError):
    """A rollout engine whose log-probabilities are not the trainer's, or that cannot do what it is asked."""


class CacheError(FulmenError):
    """A key/value cache that cannot hold index keys."""


class BackendError(FulmenError):
    """A pinned backend cannot run the operation here; the message has the reason."""


def one_line(error: Exception) -> str:
    """What a library said, in one line of bearable length."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def first_line(error: BaseException) -> str:
    """The first line of what a library said, of bearable length."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def unwritable(path: object, error: Exception) -> OutputError:
    """The OutputError for a write that failed, whatever the library raised: what, why, and what to do."""
    reason = getattr(error, "strerror", None) or first_line(error)
    if "enforce fail" in reason:  # torch's file writer
        reason = "the disk is full, or takes no file of that size"
    return OutputError(
        f"{path} cannot be written ({reason[:200]}); make room or the place writable, then run the same again"
    )


class EndpointError(FulmenError):
    """A model server that cannot be reached, refuses, or does not have the model."""


class EngineError(FulmenError):
    """The engine that serves a model is not installed, or ends before it answers."""


class SandboxError(FulmenError):
    """Generated code cannot be isolated on this machine, and nobody said to run it without."""


class MessageError(FulmenError):
    """Chat messages that no encoding can write, or a model's reply that cannot be read."""


class ContextBudgetError(MessageError):
    """What must be kept of a conversation takes more tokens than its budget has."""


class AccountError(FulmenError):
    """An API key, a file of them or an account that is missing, damaged or taken; never shows a key."""


class LedgerError(FulmenError):
    """A ledger that cannot be opened or written, holds another currency, or lacks the request."""


class InsufficientBalance(LedgerError):
    """An account whose deposits are used up: no new request until there is a new deposit."""
