"""fulmen: DeepSeek Sparse Attention for language models with dense attention.

    conversion = fulmen.convert("smollm2-135m", out="out/smol")
    print(fulmen.evaluate(conversion).to_markdown())
    model, tokenizer = fulmen.load(conversion)

Importing it makes Transformers' auto classes load converted models, and does nothing else: what is heavy is
imported where it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fulmen.config import DsaConfig
from fulmen.errors import (
    AccountError,
    AlreadyConvertedError,
    BackendError,
    CacheError,
    CheckpointError,
    ConfigError,
    ContextBudgetError,
    CorpusError,
    DocumentError,
    DocumentTooShortError,
    EndpointError,
    EngineError,
    FulmenError,
    InsufficientBalance,
    LedgerError,
    MessageError,
    OutputError,
    ResumeError,
    RolloutError,
    SandboxError,
    TrainingDivergedError,
    UnsupportedModelError,
)
from fulmen.modeling.registration import register_model_types
from fulmen.version import __version__

if TYPE_CHECKING:
    from fulmen.evaluation.parity.report import ParityReport
    from fulmen.evaluation.suites.report import SuiteReport
    from fulmen.modeling.families import set_topk
    from fulmen.pipeline.api import convert, train
    from fulmen.pipeline.api_evaluate import evaluate
    from fulmen.pipeline.api_export_rl import export_rl
    from fulmen.pipeline.api_load import inspect, load
    from fulmen.pipeline.api_recipe import distill, recipe, specialize
    from fulmen.pipeline.api_rl import rl
    from fulmen.pipeline.api_sft import sft
    from fulmen.pipeline.ask import ask
    from fulmen.pipeline.ask_answer import FolderAnswer
    from fulmen.pipeline.conversion import Conversion
    from fulmen.pipeline.description import ModelDescription
    from fulmen.pipeline.reporter import LineReporter, Reporter, SilentReporter

__all__ = [
    "AccountError",
    "AlreadyConvertedError",
    "BackendError",
    "CacheError",
    "CheckpointError",
    "ConfigError",
    "ContextBudgetError",
    "Conversion",
    "CorpusError",
    "DocumentError",
    "DocumentTooShortError",
    "DsaConfig",
    "EndpointError",
    "EngineError",
    "FolderAnswer",
    "FulmenError",
    "InsufficientBalance",
    "LedgerError",
    "LineReporter",
    "MessageError",
    "ModelDescription",
    "OutputError",
    "ParityReport",
    "Reporter",
    "ResumeError",
    "RolloutError",
    "SandboxError",
    "SilentReporter",
    "SuiteReport",
    "TrainingDivergedError",
    "UnsupportedModelError",
    "__version__",
    "ask",
    "convert",
    "distill",
    "evaluate",
    "export_rl",
    "inspect",
    "load",
    "recipe",
    "rl",
    "set_topk",
    "sft",
    "specialize",
    "train",
]

# Where each name is, which is imported when it is asked for.
_PLACES = {
    "Conversion": "fulmen.pipeline.conversion",
    "FolderAnswer": "fulmen.pipeline.ask_answer",
    "LineReporter": "fulmen.pipeline.reporter",
    "ModelDescription": "fulmen.pipeline.description",
    "ParityReport": "fulmen.evaluation.parity.report",
    "Reporter": "fulmen.pipeline.reporter",
    "SilentReporter": "fulmen.pipeline.reporter",
    "SuiteReport": "fulmen.evaluation.suites.report",
    "ask": "fulmen.pipeline.ask",
    "convert": "fulmen.pipeline.api",
    "distill": "fulmen.pipeline.api_recipe",
    "evaluate": "fulmen.pipeline.api_evaluate",
    "export_rl": "fulmen.pipeline.api_export_rl",
    "inspect": "fulmen.pipeline.api_load",
    "load": "fulmen.pipeline.api_load",
    "recipe": "fulmen.pipeline.api_recipe",
    "rl": "fulmen.pipeline.api_rl",
    "set_topk": "fulmen.modeling.families",
    "sft": "fulmen.pipeline.api_sft",
    "specialize": "fulmen.pipeline.api_recipe",
    "train": "fulmen.pipeline.api",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_model_types()
