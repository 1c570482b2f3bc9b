"""`fulmen verify`: proofs with known faults, a verifier's score, labels by votes, refined proofs."""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from fulmen.cli.console import FulmenGroup
from fulmen.cli.device_option import Device
from fulmen.cli.progress import STARTING, console, reporter
from fulmen.errors import ConfigError
from fulmen.pipeline.settings import AUTO_DEVICE

verify_app = typer.Typer(
    # Mistakes are told by its commands' options.
    cls=FulmenGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Verifiers of proofs: make proofs with known faults, score a verifier, label by votes, refine.",
    epilog="MODEL is an OpenAI-compatible address (its key in FULMEN_API_KEY) or a model's directory or "
    "name. Replies are kept beside the output: interrupted, the same command goes on where it was.",
)

Writer = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="An address, as http://127.0.0.1:8000/v1, or a model.", show_default=False
    ),
]
Url = Annotated[
    str | None,
    typer.Option(metavar="URL", help="An address, in place of MODEL.", show_default=False),
]
Name = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help="The server's name for it. [dim]Default: the first that it names.[/]",
        show_default=False,
    ),
]
Count = Annotated[int, typer.Option(metavar="N", help="How many proofs.")]
Kind = Annotated[str, typer.Option(help="equations, logic, words, or all in turn.")]
MinSteps = Annotated[int, typer.Option(help="Steps of the shortest proofs.")]
MaxSteps = Annotated[int, typer.Option(help="Steps of the longest proofs.")]
Seed = Annotated[int, typer.Option(help="0 to 99; each has other proofs.")]
MaxNewTokens = Annotated[int, typer.Option(help="Longest reply, in tokens.")]
Concurrency = Annotated[int, typer.Option(help="Requests at a time.")]
Temperature = Annotated[float, typer.Option(help="Of the replies, which shall differ.")]
OutFile = Annotated[Path, typer.Option(metavar="FILE", help="JSON lines to write.", show_default=False)]


@verify_app.command("make")
def make_command(
    out: OutFile,
    n: Count = 200,
    kind: Kind = "all",
    min_steps: MinSteps = 3,
    max_steps: MaxSteps = 6,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Those that no training sees; their problems are others.")
    ] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="With request and right reply as messages, to train on.")
    ] = False,
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
) -> None:
    """Write proofs, half of them sound, half with one fault whose step is known.

    Example: [bold]fulmen verify make --kind words --n 2000 --chat --out verifier.jsonl[/]
    """
    from fulmen.pipeline.verify import write_proofs

    rows = write_proofs(
        out,
        n=n,
        kind=kind,
        min_steps=min_steps,
        max_steps=max_steps,
        held_out=held_out,
        chat=chat,
        seed=seed,
        overwrite=overwrite,
        reporter=reporter(),
    )
    counts = Counter(row["fault"] or "sound" for row in rows)
    said = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    typer.echo(f"{out}: {len(rows):,} proofs: {said}", err=True)


@verify_app.command("score")
def score_command(
    model: Writer = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Labelled proofs, as make writes. [dim]Default: held-out ones are made.[/]",
            show_default=False,
        ),
    ] = None,
    url: Url = None,
    name: Name = None,
    n: Count = 200,
    kind: Kind = "all",
    min_steps: MinSteps = 3,
    max_steps: MaxSteps = 6,
    seed: Seed = 0,
    max_new_tokens: MaxNewTokens = 1024,
    concurrency: Concurrency = 4,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for score.json and the replies.")] = Path(
        "verify-score"
    ),
    device: Device = AUTO_DEVICE,
) -> None:
    """Say how often a verifier tells sound proofs from faulty ones, and cites the right step.

    Example: [bold]fulmen verify score http://127.0.0.1:8000/v1 --n 300 --kind logic[/]
    """
    told = reporter()
    with told.stage(STARTING):
        from fulmen.pipeline.verify import verify_score
    report = verify_score(
        _one_of(model, url),
        data=data,
        name=name,
        n=n,
        kind=kind,
        min_steps=min_steps,
        max_steps=max_steps,
        seed=seed,
        max_new_tokens=max_new_tokens,
        concurrency=concurrency,
        out=out,
        device=device,
        reporter=told,
    )
    from fulmen.cli.suite import print_table

    told.note(f"Wrote {out / 'score.json'}")
    print_table(report.table(), report.model)
    console.print(
        "accuracy: told sound or faulty as it is; cited step: of the faults that were seen",
        highlight=False,
        soft_wrap=True,
    )


@verify_app.command("label")
def label_command(
    *,
    model: Writer = None,
    data: Annotated[
        Path,
        typer.Option(metavar="FILE", help="JSON lines with problem and proof.", show_default=False),
    ],
    out: OutFile,
    url: Url = None,
    name: Name = None,
    analyses: Annotated[int, typer.Option(help="Analyses of each proof.")] = 8,
    votes: Annotated[int, typer.Option(help="Votes on each analysis that finds a fault.")] = 3,
    uphold: Annotated[
        int, typer.Option(help="Analyses, upheld by most of their votes, that a label below 1 takes.")
    ] = 2,
    temperature: Temperature = 1.0,
    max_new_tokens: MaxNewTokens = 1024,
    concurrency: Concurrency = 4,
    device: Device = AUTO_DEVICE,
) -> None:
    """Label proofs without people: analyses by a model, votes on them, the lowest score that is upheld.

    Example: [bold]fulmen verify label http://127.0.0.1:8000/v1 --data proofs.jsonl --out labels.jsonl[/]
    """
    told = reporter()
    with told.stage(STARTING):
        from fulmen.pipeline.verify import verify_label
    rows = verify_label(
        _one_of(model, url),
        data,
        out=out,
        name=name,
        analyses=analyses,
        votes=votes,
        uphold=uphold,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        concurrency=concurrency,
        device=device,
        reporter=told,
    )
    counts = Counter(row["label"] for row in rows)
    said = ", ".join(f"{counts[label]} {label:g}" for label in (1.0, 0.5, 0.0))
    told.note(f"{out}: {len(rows)} proofs: {said}, {counts[None]} open")
    known = [row for row in rows if row["label"] is not None and "score" in row]
    if known:
        right = sum(row["label"] == row["score"] for row in known)
        told.note(f"of those with a score of their own {right} of {len(known)} are labelled so")


@verify_app.command("refine")
def refine_command(
    *,
    model: Writer = None,
    data: Annotated[Path, typer.Option(metavar="FILE", help="JSON lines with problem.", show_default=False)],
    out: OutFile,
    url: Url = None,
    name: Name = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Who verifies: an address or a model. [dim]Default: MODEL itself.[/]",
            show_default=False,
        ),
    ] = None,
    judge_model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The judge's server's name for it.", show_default=False),
    ] = None,
    pool: Annotated[int, typer.Option(help="Proofs of each problem; 1: the same one again and again.")] = 1,
    verifications: Annotated[int, typer.Option(help="Verifications of each proof.")] = 4,
    rounds: Annotated[int, typer.Option(help="Rounds of refinement, at most.")] = 4,
    temperature: Temperature = 1.0,
    max_new_tokens: MaxNewTokens = 1024,
    concurrency: Concurrency = 4,
    device: Device = AUTO_DEVICE,
) -> None:
    """Prove problems, have the proofs verified, write them anew from what was found.

    Example: [bold]fulmen verify refine http://127.0.0.1:8000/v1 --data p.jsonl --pool 8 --out new.jsonl[/]
    """
    told = reporter()
    with told.stage(STARTING):
        from fulmen.pipeline.verify import verify_refine
    rows = verify_refine(
        _one_of(model, url),
        data,
        out=out,
        name=name,
        judge=judge,
        judge_name=judge_model,
        pool=pool,
        verifications=verifications,
        rounds=rounds,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        concurrency=concurrency,
        device=device,
        reporter=told,
    )
    passed = sum(row["passes"] for row in rows)
    told.note(f"{out}: {len(rows)} problems, {passed} with a proof that passed all verifications")
    checked = [row["machine_score"] for row in rows if "machine_score" in row]
    if checked:
        told.note(f"checked by machine: {sum(score == 1 for score in checked)} of {len(checked)} are right")


def _one_of(model: str | None, url: str | None) -> str:
    """A model or an address. Raises ConfigError."""
    if (model is None) == (url is None):
        raise ConfigError("give MODEL, or an address with --url; one of the two")
    if url is not None and "://" not in url:
        raise ConfigError(f"url={url!r} is no address; write it as http://127.0.0.1:8000/v1")
    return model or str(url)
