"""A loaded model, dense or converted, for EleutherAI's lm-evaluation-harness, which is not a dependency.

model, tokenizer = ...                      # AutoModelForCausalLM.from_pretrained after `import fulmen`
results = evaluate_with_lm_eval(model, tokenizer, ["hellaswag"], limit=100)
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from fulmen.errors import ConfigError


def evaluate_with_lm_eval(model: Any, tokenizer: Any, tasks: Sequence[str], **options: Any) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` returns for these tasks; `options` go to it.

    Raises ConfigError if lm_eval is not installed.
    """
    wrapped = _lm_eval("lm_eval.models.huggingface").HFLM(pretrained=model, tokenizer=tokenizer)
    return _lm_eval("lm_eval").simple_evaluate(model=wrapped, tasks=list(tasks), **options)


def _lm_eval(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(f"lm_eval cannot be imported ({error}); install it: pip install lm-eval") from error
