"""The tasks about proofs by their names: `verify_proof` and `prove`."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from fulmen.errors import ConfigError
from fulmen.tasks.base import Task
from fulmen.tasks.proofs.labelled import KINDS, ProofSource
from fulmen.tasks.proofs.prove import Prove
from fulmen.tasks.proofs.verify_proof import VerifyProof

PROOF_TASKS = ("verify_proof", "prove")
ALL_KINDS = "all"
DEFAULT_SHORTEST, DEFAULT_LONGEST = 3, 6


def proof_task(name: str, **parameters: Any) -> Task:
    """A task about proofs.

    Args:
        name: "verify_proof" or "prove".
        parameters: kind: "equations", "logic", "words", or "all" of them in turn (the default); min_steps and
            max_steps of a proof (3 and 6); of verify_proof meta: whether a cited fault must be real (True).

    Raises:
        ConfigError: a name, parameter or value that there is not.
    """
    if name not in PROOF_TASKS:
        raise ConfigError(f"task={name!r} is not known; choose from {', '.join(PROOF_TASKS)}")
    known = ("kind", "min_steps", "max_steps", *(["meta"] if name == "verify_proof" else []))
    for given in parameters:
        if given not in known:
            near = get_close_matches(given, known, 1)
            meant = f"do you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise ConfigError(f"task {name} has no parameter {given!r}; {meant}")
    meta = parameters.pop("meta", True)
    if not isinstance(meta, bool):
        raise ConfigError(f"meta={meta!r} cannot be; use True or False")
    source = proof_source(**parameters)
    return VerifyProof(source, meta) if name == "verify_proof" else Prove(source)


def named_proof_task(spec: str, parameters: Mapping[str, Any]) -> Task:
    """The task of `verify_proof:kind=logic,...`, which has that as its name. Raises as `proof_task`."""
    task = proof_task(spec.partition(":")[0], **parameters)
    task.name = spec
    return task


def proof_source(
    kind: str = ALL_KINDS, min_steps: int = DEFAULT_SHORTEST, max_steps: int = DEFAULT_LONGEST
) -> ProofSource:
    """Proofs of a kind (or "all") and of so many steps.

    Raises ConfigError for a kind that there is not, and for lengths that one of the kinds does not have.
    """
    if kind not in (*KINDS, ALL_KINDS):
        raise ConfigError(
            f"kind={kind!r} is not known; choose from {', '.join(KINDS)}, {ALL_KINDS}", arguments=["kind"]
        )
    kinds = tuple(KINDS.values()) if kind == ALL_KINDS else (KINDS[kind],)
    for name, value in (("min_steps", min_steps), ("max_steps", max_steps)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{name}={value!r} cannot be; use a whole number", arguments=[name])
    low, high = max(one.shortest for one in kinds), min(one.longest for one in kinds)
    if not low <= min_steps <= max_steps <= high:
        raise ConfigError(
            f"min_steps={min_steps} and max_steps={max_steps} cannot be; use {low} to {high}, in order",
            arguments=["min_steps", "max_steps"],
        )
    return ProofSource(kinds, min_steps, max_steps)
