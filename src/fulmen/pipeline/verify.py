"""A verifier of proofs: data to train one, how good it is, labels by votes, proofs that it refines.

    write_proofs("train.jsonl", n=2000, chat=True)
    report = verify_score("http://127.0.0.1:8000/v1", n=200, out="score")
    verify_label("http://127.0.0.1:8000/v1", "proofs.jsonl", out="labels.jsonl")
    verify_refine("http://127.0.0.1:8000/v1", "problems.jsonl", out="refined.jsonl")

Replies are kept in a journal beside the output; interrupted, or with a server that was down, the same call
goes on where it was.
"""

import json
from pathlib import Path

from fulmen.config import require_positive_int
from fulmen.errors import OutputError
from fulmen.files import write_file
from fulmen.pipeline.arguments import (
    Place,
    flag_argument,
    number_argument,
    path_argument,
    place_argument,
    refused,
)
from fulmen.pipeline.reporter import Reporter, reporter_of
from fulmen.pipeline.settings import AUTO_DEVICE
from fulmen.pipeline.verify_asking import Asking, ReplyJournal
from fulmen.pipeline.verify_label import label_proofs
from fulmen.pipeline.verify_refine import refine_proofs
from fulmen.pipeline.verify_rows import (
    LARGEST_SEED,
    Row,
    chat_row,
    labelled_proofs,
    proof_row,
    read_rows,
    require_labels,
    write_rows,
)
from fulmen.pipeline.verify_score import VerifierReport, score_verifier
from fulmen.pipeline.verify_writers import EndpointWriter, Writer
from fulmen.tasks.proofs.factory import ALL_KINDS, DEFAULT_LONGEST, DEFAULT_SHORTEST, proof_source
from fulmen.tasks.proofs.labelled import ProofSource

DEFAULT_PROOFS, DEFAULT_NEW_TOKENS, DEFAULT_CONCURRENCY = 200, 1024, 4
# Of samples that shall differ.
DRAWN_TEMPERATURE = 1.0


def write_proofs(
    out: Place,
    *,
    n: int = DEFAULT_PROOFS,
    kind: str = ALL_KINDS,
    min_steps: int = DEFAULT_SHORTEST,
    max_steps: int = DEFAULT_LONGEST,
    held_out: bool = False,
    chat: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> list[Row]:
    """Write labelled proofs as JSON lines, half of them sound, no two alike; return the rows.

    Args:
        out: file to write.
        kind: "equations", "logic", "words", or "all" in turn.
        min_steps, max_steps: of a proof.
        held_out: those that no training sees, whose problems are others.
        chat: with the request and the right reply as `messages`, for training.
        seed: 0 to 99; each has other proofs.
        overwrite: replace a file at `out`.
        reporter: whom to tell how far it is; None: nobody.

    Raises:
        ConfigError: an argument that cannot be, or more proofs than there are.
        OutputError: the file is there already, or cannot be written.
    """
    path = _file_argument("out", out)
    if path.exists() and not flag_argument("overwrite", overwrite):
        raise OutputError(f"{path} exists; name another file, or set overwrite", arguments=["overwrite"])
    source = _source(n, kind, min_steps, max_steps, seed)
    row = chat_row if flag_argument("chat", chat) else proof_row
    made = labelled_proofs(source, n, flag_argument("held_out", held_out), seed, reporter_of(reporter))
    rows = [row(*one) for one in made]
    write_rows(path, rows)
    return rows


def verify_score(
    model: str,
    *,
    data: Place | None = None,
    name: str | None = None,
    n: int = DEFAULT_PROOFS,
    kind: str = ALL_KINDS,
    min_steps: int = DEFAULT_SHORTEST,
    max_steps: int = DEFAULT_LONGEST,
    seed: int = 0,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    concurrency: int = DEFAULT_CONCURRENCY,
    out: Place | None = None,
    device: object = AUTO_DEVICE,
    reporter: Reporter | None = None,
) -> VerifierReport:
    """Ask a verifier about proofs whose truth is known, greedily.

    Args:
        model: an OpenAI-compatible address (the key is read from FULMEN_API_KEY), or a model's directory or
            name, converted or not.
        data: JSON lines with `problem`, `proof`, `score` and `step`, as `write_proofs` has them; None: `n`
            held-out ones of `kind`, `min_steps` to `max_steps`, and `seed`.
        name: of the model at an address; None: the first that the server names.
        concurrency: requests at a time.
        out: folder for score.json and the replies; None: nothing is kept.
        device: as "cpu" or "cuda", for a model that runs here.
        reporter: whom to tell how far it is; None: nobody.

    Raises:
        ConfigError, CorpusError: an argument or a row that cannot be.
        EndpointError: the server cannot be reached, or refuses; what it answered is kept in `out`.
        CheckpointError, UnsupportedModelError, OutputError, ResumeError: model or folder cannot be used.
    """
    _require_counts(concurrency=concurrency, max_new_tokens=max_new_tokens)
    told = reporter_of(reporter)
    if data is None:
        source = _source(n, kind, min_steps, max_steps, seed)
        rows = [proof_row(*one) for one in labelled_proofs(source, n, True, seed, told)]
    else:
        place = path_argument("data", data, "a file")
        rows = read_rows(place, "problem", "proof")
        require_labels(place, rows)
    folder = None if out is None else path_argument("out", out).expanduser()
    journal = ReplyJournal(None if folder is None else folder / "replies.jsonl")
    writer = _writer(model, name, told, device)
    asking = _asking(writer, journal, told, concurrency, max_new_tokens, 0.0)
    report = score_verifier(writer.name, rows, asking)
    if folder is not None:
        write_file(folder / "score.json", json.dumps(report.to_dict(), indent=1) + "\n")
    return report


def verify_label(
    model: str,
    data: Place,
    *,
    out: Place,
    name: str | None = None,
    analyses: int = 8,
    votes: int = 3,
    uphold: int = 2,
    temperature: float = DRAWN_TEMPERATURE,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    concurrency: int = DEFAULT_CONCURRENCY,
    device: object = AUTO_DEVICE,
    reporter: Reporter | None = None,
) -> list[Row]:
    """Label proofs by analyses and votes on them; write the rows with `label` and return them.

    Args:
        data: JSON lines with `problem` and `proof`, about anything.
        out: file to write; the replies are kept beside it.
        analyses: of each proof. votes: on each analysis that finds a fault. uphold: analyses, upheld by most
            of their votes, that a label below 1 takes.
        temperature: of the replies, which shall differ.
        model, name, max_new_tokens, concurrency, device, reporter: as of `verify_score`.

    Raises as `verify_score`.
    """
    _require_counts(
        analyses=analyses,
        votes=votes,
        uphold=uphold,
        concurrency=concurrency,
        max_new_tokens=max_new_tokens,
    )
    heat = _temperature(temperature)
    if uphold > analyses:
        raise refused("uphold", uphold, f"use 1 to analyses={analyses}")
    rows, told = read_rows(path_argument("data", data, "a file"), "problem", "proof"), reporter_of(reporter)
    path, journal = _resumable(out)
    asking = _asking(
        _writer(model, name, told, device),
        journal,
        told,
        concurrency,
        max_new_tokens,
        heat,
    )
    labelled = label_proofs(rows, asking, analyses, votes, uphold)
    write_rows(path, labelled)
    return labelled


def verify_refine(
    model: str,
    data: Place,
    *,
    out: Place,
    name: str | None = None,
    judge: str | None = None,
    judge_name: str | None = None,
    pool: int = 1,
    verifications: int = 4,
    rounds: int = 4,
    temperature: float = DRAWN_TEMPERATURE,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    concurrency: int = DEFAULT_CONCURRENCY,
    device: object = AUTO_DEVICE,
    reporter: Reporter | None = None,
) -> list[Row]:
    """Have problems proved, the proofs verified, and written anew; write the best ones and return them.

    Args:
        data: JSON lines with `problem`.
        out: file to write; the replies are kept beside it.
        judge, judge_name: another model that verifies, and its name; None: the one that proves.
        pool: proofs of each problem; 1: the same one is refined again and again.
        verifications: of each proof. rounds: of refinement, at most.
        model, name, temperature, max_new_tokens, concurrency, device, reporter: as of `verify_label`.

    Raises as `verify_score`.
    """
    _require_counts(
        pool=pool, verifications=verifications, concurrency=concurrency, max_new_tokens=max_new_tokens
    )
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 0:
        raise refused("rounds", rounds, "use 0 or more")
    rows, told = read_rows(path_argument("data", data, "a file"), "problem"), reporter_of(reporter)
    heat = _temperature(temperature)
    path, journal = _resumable(out)
    prover = _writer(model, name, told, device)
    verifier = prover if judge is None else _writer(judge, judge_name, told, device)
    refined = refine_proofs(
        rows,
        _asking(prover, journal, told, concurrency, max_new_tokens, heat),
        _asking(verifier, journal, told, concurrency, max_new_tokens, heat),
        pool,
        verifications,
        rounds,
    )
    write_rows(path, refined)
    return refined


def _source(n: int, kind: str, min_steps: int, max_steps: int, seed: int) -> ProofSource:
    """Raises ConfigError for numbers that cannot be."""
    require_positive_int("n", n)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED:
        raise refused("seed", seed, f"use 0 to {LARGEST_SEED}")
    return proof_source(kind, min_steps, max_steps)


def _writer(model: str, name: str | None, reporter: Reporter, device: object) -> Writer:
    """By an address (http...), or a model's place.

    Args:
        model: address, or a model's directory or name, converted or not.
        name: what the server calls the model; None: the first that it names.

    Raises:
        ConfigError: neither.
        EndpointError: as `EndpointWriter`.
        CheckpointError, UnsupportedModelError: a model that cannot be read.
    """
    place = place_argument("model", model, "an address, a model directory or a model's name")
    if "://" in place:
        return EndpointWriter(place, name, reporter)
    with reporter.stage("Load"):
        from fulmen.pipeline.quiet import quiet
        from fulmen.pipeline.verify_local import LocalWriter

        with quiet(reporter):
            return LocalWriter(place, device)


def _asking(
    writer: Writer,
    journal: ReplyJournal,
    reporter: Reporter,
    concurrency: int,
    max_new_tokens: int,
    temperature: float,
) -> Asking:
    return Asking(
        writer,
        journal,
        reporter,
        concurrency=concurrency,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )


def _require_counts(**values: object) -> None:
    for name, value in values.items():
        require_positive_int(name, value)


def _temperature(value: object) -> float:
    found = number_argument("temperature", value, "a number from 0 to 2")
    if not 0 <= found <= 2:
        raise refused("temperature", value, "use a number from 0 to 2")
    return float(found)


def _file_argument(name: str, value: object) -> Path:
    path = path_argument(name, value, "a file").expanduser()
    if path.is_dir():
        raise refused(name, value, "name a file")
    return path


def _resumable(out: object) -> tuple[Path, ReplyJournal]:
    """A file to write, and the replies beside it.

    Raises OutputError for a file without them: it is no earlier result, and may be the data itself.
    """
    path = _file_argument("out", out)
    replies = path.with_name(f"{path.stem}.replies.jsonl")
    if path.exists() and not replies.exists():
        raise OutputError(f"{path} exists, and no run wrote it; name another file", arguments=["out"])
    return path, ReplyJournal(replies)
