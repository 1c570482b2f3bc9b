"""All suites, found by themselves: every module of this package has a SUITE and is named as it.

No suite's code is imported until it is asked for.
"""

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

from fulmen.errors import ConfigError

if TYPE_CHECKING:
    from fulmen.evaluation.suites.suite import Suite


def suite_names() -> list[str]:
    """The names of all suites."""
    return [module.name for module in pkgutil.iter_modules(__path__)]


@cache
def find_suite(name: str) -> "Suite":
    """A suite by its name. Raises ConfigError for one that there is not."""
    if name not in suite_names():
        known = ", ".join(suite.name for suite in all_suites())
        raise ConfigError(f"suite={name!r} is not known; choose from {known}")
    return importlib.import_module(f"{__name__}.{name}").SUITE


def all_suites() -> "list[Suite]":
    """Every suite, in the order of a report."""
    return sorted(map(find_suite, suite_names()), key=lambda suite: suite.order)


def require_known_tasks(names: tuple[str, ...]) -> None:
    """Raise ConfigError for a name that is no task of any suite."""
    known = [task for suite in all_suites() for task in suite.tasks]
    for name in names:
        if name not in known:
            raise ConfigError(f"task={name!r} is not known; choose from {', '.join(known)}")
