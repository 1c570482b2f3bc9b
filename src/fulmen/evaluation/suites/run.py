"""All suites of one run: what is read, in which order, and what is reported of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fulmen.data import Document
from fulmen.errors import ConfigError
from fulmen.evaluation.journal import Journal, Progress
from fulmen.evaluation.suites.catalog import find_suite, require_known_tasks
from fulmen.evaluation.suites.report import SuiteReport
from fulmen.evaluation.suites.responders import LocalResponder, Responder
from fulmen.evaluation.suites.suite import SuiteSizes


@dataclass(frozen=True, kw_only=True)
class SuitePlan(SuiteSizes):
    """What to run. suites: names of some."""

    suites: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.suites:
            find_suite(name)
        require_known_tasks(self.tasks)


def run_suites(
    responder: Responder,
    tokenizer: Any,
    documents: Sequence[Document],
    plan: SuitePlan,
    journal: Journal,
    progress: Progress = lambda done, total, what: None,
) -> SuiteReport:
    """Do what the journal lacks and report the tables of every suite.

    Args:
        documents: held-out text.
        progress: as in `Journal.run`.

    Returns:
        A report without `about`, which the caller may add (`dataclasses.replace`).

    Raises:
        ConfigError: a suite that the responder cannot run, or a length beyond its context.
        CorpusError: the documents are too few.
    """
    require_fit(responder, plan)
    suites = [find_suite(name) for name in plan.suites]
    units = [unit for suite in suites for unit in suite.units(responder, tokenizer, documents, plan)]
    records = journal.run(units, progress)
    tables = {}
    for suite in suites:
        own = [record for record in records if record["suite"] == suite.name]
        tables[suite.name] = suite.tables(own, topk=responder.topk, seed=plan.seed)
    return SuiteReport(tables)


def require_fit(responder: Responder, plan: SuitePlan) -> None:
    """Raise ConfigError for a suite that the responder cannot run, or a length beyond its context."""
    is_local = isinstance(responder, LocalResponder)
    for suite in map(find_suite, plan.suites):
        if suite.needs_weights and not is_local:
            raise ConfigError(
                f"suite={suite.name!r} needs the model's logits, which an endpoint does not give"
            )
        if suite.needs_dsa and "dsa" not in responder.variants:
            raise ConfigError(f"suite={suite.name!r} compares DSA with dense, and this model has no DSA")
    require_within(plan.lengths, responder.context)


def require_within(lengths: Sequence[int], context: int | None) -> None:
    """Raise ConfigError if a length is beyond the context; None: it is not known."""
    if context and max(lengths) > context:
        raise ConfigError(
            f"length={max(lengths)} is beyond the model's context of {context} tokens; use a shorter one"
        )
