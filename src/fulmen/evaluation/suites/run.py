"""All suites of one run: what is read, in which order, and what is reported of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fulmen.config import require_positive_int
from fulmen.data import Document, windows
from fulmen.errors import ConfigError
from fulmen.evaluation.suites.generation import generation_tables, generation_units
from fulmen.evaluation.suites.journal import Journal, Progress, Unit
from fulmen.evaluation.suites.keyloss import keyloss_tables, keyloss_units
from fulmen.evaluation.suites.ruler import ruler_tables, ruler_units
from fulmen.evaluation.suites.ruler_tasks import find_tasks
from fulmen.evaluation.suites.short import short_lengths, short_tables, short_units
from fulmen.evaluation.suites.subjects import LocalSubject, Subject

SUITES = ("ruler", "keyloss", "short", "generate")
# What each suite needs of the subject.
NEEDS_WEIGHTS, NEEDS_DSA = ("keyloss", "short"), ("short",)


@dataclass(frozen=True)
class SuitePlan:
    """What to run.

    Attributes:
        suites: some of SUITES.
        lengths: tokens of a prompt with its answer, or of a text.
        samples: of each task and length, or texts of each length.
        tasks: names of RULER tasks; none: all.
        seed: of texts, questions and resampling.
    """

    suites: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int
    tasks: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.suites:
            if name not in SUITES:
                raise ConfigError(f"suite={name!r} is not known; choose from {', '.join(SUITES)}")
        require_positive_int("samples", self.samples)
        if not self.lengths:
            raise ConfigError("lengths are none; use at least one")
        for length in self.lengths:
            require_positive_int("length", length)
        find_tasks(self.tasks)


def run_suites(
    subject: Subject,
    tokenizer: Any,
    documents: Sequence[Document],
    plan: SuitePlan,
    journal: Journal,
    progress: Progress = lambda done, total, what: None,
) -> dict[str, Any]:
    """Do what the journal lacks and return the tables of every suite, by its name: plain JSON types.

    Args:
        documents: held-out text.
        progress: as in `Journal.run`.

    Raises:
        ConfigError: a suite that the subject cannot run, or a length beyond its context.
        CorpusError: the documents are too few.
    """
    require_fit(subject, plan)
    units = [unit for name in plan.suites for unit in _units(name, subject, tokenizer, documents, plan)]
    records = journal.run(units, progress)
    return {
        name: _tables(name, [record for record in records if record["suite"] == name], subject, plan)
        for name in plan.suites
    }


def _units(
    name: str, subject: Any, tokenizer: Any, documents: Sequence[Document], plan: SuitePlan
) -> list[Unit]:
    if name == "ruler":
        tasks = find_tasks(plan.tasks)
        return ruler_units(subject, tokenizer, documents, tasks, plan.lengths, plan.samples, seed=plan.seed)

    def texts(length: int) -> list[Any]:
        return windows(documents, tokenizer, length, plan.samples, seed=plan.seed)

    if name == "short":
        lengths = short_lengths(subject.topk, subject.context)
        return short_units(subject, texts(lengths[-1]), lengths)
    if name == "keyloss":
        return [unit for length in plan.lengths for unit in keyloss_units(subject, texts(length))]
    return [unit for length in plan.lengths for unit in generation_units(subject, texts(length), length)]


def _tables(name: str, records: list[dict], subject: Any, plan: SuitePlan) -> dict[str, Any]:
    if name == "ruler":
        return ruler_tables(records, subject.topk)
    if name == "short":
        return short_tables(records, subject.topk)
    return keyloss_tables(records, plan.seed) if name == "keyloss" else generation_tables(records)


def require_fit(subject: Subject, plan: SuitePlan) -> None:
    """Raise ConfigError if the subject cannot run a suite of the plan, or a length is beyond its context."""
    is_local = isinstance(subject, LocalSubject)
    for name in plan.suites:
        if name in NEEDS_WEIGHTS and not is_local:
            raise ConfigError(f"suite={name!r} needs the model's logits, which an endpoint does not give")
        if name in NEEDS_DSA and "dsa" not in subject.variants:
            raise ConfigError(f"suite={name!r} compares DSA with dense, and this model has no DSA")
    require_within(plan.lengths, subject.context)


def require_within(lengths: Sequence[int], context: int | None) -> None:
    """Raise ConfigError if a length is beyond the context; None: it is not known."""
    if context and max(lengths) > context:
        raise ConfigError(
            f"length={max(lengths)} is beyond the model's context of {context} tokens; use a shorter one"
        )
