"""Files of proofs: JSON lines with `problem` and `proof`, and what is known of them."""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from fulmen.endpoints import read_json
from fulmen.errors import ConfigError, CorpusError
from fulmen.files import write_file
from fulmen.pipeline.reporter import Reporter
from fulmen.tasks.base import HELD_OUT
from fulmen.tasks.proofs.labelled import LabelledProof, ProofSource
from fulmen.tasks.proofs.proof import SCORES
from fulmen.tasks.proofs.replies import truth_of, verify_messages

Row = dict[str, Any]
# Indices between the first ones of two seeds.
APART = 10_000_000
# At once: they are held in memory.
MOST_PROOFS = 1_000_000
LARGEST_SEED = 99


def proof_row(index: int, made: LabelledProof) -> Row:
    """A labelled proof as plain data: `score` 1, 0.5 or 0; `step` and `fault` null in a sound one."""
    return {
        "problem": made.proof.problem,
        "proof": made.proof.text,
        "score": made.score,
        "step": made.step,
        "kind": made.proof.kind,
        "fault": made.fault,
        "index": index,
    }


def chat_row(index: int, made: LabelledProof) -> Row:
    """The request to check a proof and the right reply, as messages, with the labels beside them."""
    reply = {"role": "assistant", "content": str(truth_of(made.findings))}
    asked = verify_messages(made.proof.problem, made.proof.text)
    labels = {
        name: value for name, value in proof_row(index, made).items() if name not in ("problem", "proof")
    }
    return {"messages": [*map(dict, asked), reply], **labels}


def labelled_proofs(
    source: ProofSource, n: int, held_out: bool, seed: int, reporter: Reporter
) -> list[tuple[int, LabelledProof]]:
    """`n` different proofs with their indices; another seed, up to 99, begins elsewhere.

    Raises ConfigError where there are not so many.
    """
    if n > MOST_PROOFS:
        raise ConfigError(f"n={n} cannot be; use {MOST_PROOFS:,} at most", arguments=["n"])
    first = (HELD_OUT if held_out else 0) + seed * APART
    indices = range(first, first + min(APART, 20 * n + 1000))
    found = []
    with reporter.stage("Make"):
        for one in islice(_different(source, indices), n):
            found.append(one)
            reporter.advance(len(found), n)
    if len(found) < n:
        raise ConfigError(
            f"n={n} cannot be: there are about {len(found)} such proofs; lower it, or raise max_steps",
            arguments=["n", "max_steps"],
        )
    return found


def _different(source: ProofSource, indices: Iterable[int]) -> Iterator[tuple[int, LabelledProof]]:
    seen: set[tuple[str, str]] = set()
    for index in indices:
        made = source.labelled(index)
        if (made.proof.problem, made.proof.text) not in seen:
            seen.add((made.proof.problem, made.proof.text))
            yield index, made


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines, whole or not at all. Raises OutputError."""
    write_file(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))


def read_rows(path: Path, *needed: str) -> list[Row]:
    """The rows of a file; `needed` fields are texts that are not empty.

    Raises CorpusError for a file or a line that is not such a one; the line is named.
    """
    try:
        # Not splitlines: a proof may have a line separator of Unicode's, which JSON does not escape.
        lines = path.expanduser().read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise CorpusError(f"{path} cannot be read ({error.strerror}); name a file of JSON lines") from error
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} is no UTF-8 text (byte {error.start}); name a file of JSON lines"
        ) from error
    rows = [_row(f"{path}:{number}", line, needed) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise CorpusError(f"{path} is empty; name a file of JSON lines, as fulmen verify make writes")
    return rows


def require_labels(path: Path, rows: Iterable[Row]) -> None:
    """Raise ConfigError for a row whose `score` is none, or whose `step` is no number."""
    for number, row in enumerate(rows, 1):
        step = row.get("step")
        if row.get("score") not in SCORES or not (step is None or type(step) is int):
            raise ConfigError(
                f"{path}: row {number} has score={row.get('score')!r} and step={step!r}; use 1, 0.5 or 0, "
                "and the number of the step that is not right, or null"
            )


def _row(where: str, line: str, needed: tuple[str, ...]) -> Row:
    try:
        row = read_json(line)
    except ValueError as error:
        raise CorpusError(f"{where} is no JSON ({error}); write one object a line") from error
    fields = row if isinstance(row, dict) else {}
    if missing := [name for name in needed if not _is_text(fields.get(name))]:
        raise CorpusError(f"{where} has no text {missing[0]!r}; each line needs {' and '.join(needed)}")
    return fields


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
