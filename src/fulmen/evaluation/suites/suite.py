"""What a suite is: units of work that are kept as they come, tables of their records, and how these read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from fulmen.config import require_positive_int
from fulmen.data import Document
from fulmen.errors import ConfigError
from fulmen.evaluation.journal import Unit
from fulmen.evaluation.style import Plot

Rows = list[tuple[str, ...]]
# Plain JSON types.
Tables = dict[str, Any]
Record = Mapping[str, Any]


class Section(NamedTuple):
    """One suite in a report. notes: sentences above the table. rows: its table, the header first."""

    title: str
    notes: tuple[str, ...]
    rows: Rows


@dataclass(frozen=True)
class SuiteSizes:
    """How much a suite asks.

    Attributes:
        lengths: tokens of a prompt with its answer, or of a text.
        samples: of each task and length, or texts of each length.
        tasks: names of tasks, of the suites that have some; none: all.
        seed: of texts, questions and resampling.
    """

    lengths: tuple[int, ...]
    samples: int
    tasks: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive_int("samples", self.samples)
        if not self.lengths:
            raise ConfigError("lengths are none; use at least one")
        for length in self.lengths:
            require_positive_int("length", length)


class Suite(Protocol):
    """A suite: a module of `fulmen.evaluation.suites.catalog` whose SUITE it is, named as the module.

    Attributes:
        name: as in `--suites`.
        order: its place in a report; lower comes first.
        needs_dsa: whether it compares DSA with dense, and so cannot ask another model.
        needs_weights: whether it reads logits, which an endpoint does not give.
        tasks: names of its parts, where some of them can be chosen.
    """

    name: str
    order: int
    needs_dsa: bool = False
    needs_weights: bool = False
    tasks: tuple[str, ...] = ()

    def units(
        self, responder: Any, tokenizer: Any, documents: Sequence[Document], sizes: SuiteSizes
    ) -> list[Unit]:
        """The work, with a key each that begins with the suite's name.

        Args:
            responder: who is asked; a `LocalResponder` where the suite needs weights.
            documents: held-out text.

        Raises:
            ConfigError: a length that is not for this suite.
            CorpusError: the documents are too few.
        """
        ...

    def tables(self, records: Sequence[Record], *, topk: int | None, seed: int) -> Tables:
        """What the units' results say: estimates with intervals. topk: the responder's."""
        ...

    def section(self, tables: Tables) -> Section:
        """The tables for people."""
        ...

    def plots(self, tables: Tables) -> list[Plot]:
        """The tables drawn; none by default."""
        return []
