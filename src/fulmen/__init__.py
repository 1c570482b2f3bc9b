"""fulmen: DeepSeek Sparse Attention for language models with dense attention.

Importing it makes Transformers' auto classes load converted models, and does nothing else.
"""

from typing import Any

from fulmen.config import DsaConfig
from fulmen.errors import (
    AccountError,
    AlreadyConvertedError,
    BackendError,
    CacheError,
    CheckpointError,
    ConfigError,
    CorpusError,
    DocumentTooShortError,
    EndpointError,
    EngineError,
    FulmenError,
    InsufficientBalance,
    LedgerError,
    OutputError,
    ResumeError,
    TrainingDivergedError,
    UnsupportedModelError,
)
from fulmen.modeling.registration import register_model_types

__version__ = "0.1.0"

__all__ = [
    "AccountError",
    "AlreadyConvertedError",
    "BackendError",
    "CacheError",
    "CheckpointError",
    "ConfigError",
    "CorpusError",
    "DocumentTooShortError",
    "DsaConfig",
    "EndpointError",
    "EngineError",
    "FulmenError",
    "InsufficientBalance",
    "LedgerError",
    "OutputError",
    "ResumeError",
    "TrainingDivergedError",
    "UnsupportedModelError",
    "__version__",
    "set_topk",
]


def __getattr__(name: str) -> Any:
    # The model code behind it takes seconds to import.
    if name == "set_topk":
        from fulmen.modeling.families import set_topk

        return set_topk
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register_model_types()
