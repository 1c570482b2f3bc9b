"""evaluate, as `import fulmen` has it: parity with dense attention, or suites of tests.

What it is asked is checked here, then the work is imported.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, overload

from fulmen.errors import ConfigError
from fulmen.pipeline.arguments import (
    Data,
    Place,
    data_argument,
    flag_argument,
    names_argument,
    path_argument,
    place_argument,
    refused,
)
from fulmen.pipeline.reporter import Reporter, reporter_of
from fulmen.pipeline.settings import AUTO_DEVICE, EvalSettings
from fulmen.pipeline.suite_settings import (
    DEFAULT_SAMPLES,
    PARITY,
    SUITES_ALONE,
    SuiteSettings,
    known_names,
    parse_lengths,
)

if TYPE_CHECKING:
    import torch

    from fulmen.evaluation.parity.report import ParityReport
    from fulmen.evaluation.suites.report import SuiteReport


@overload
def evaluate(
    source: Place,
    *,
    dense: Place | None = None,
    data: Data = (),
    texts: Sequence[str] | None = None,
    length: int | None = None,
    sequences: int | None = None,
    topk: int | None = None,
    kinds: Sequence[str] | str = (),
    needles: bool = True,
    needle_length: int | None = None,
    quick: bool = False,
    device: "str | torch.device" = AUTO_DEVICE,
    out: Place | None = None,
    reporter: Reporter | None = None,
) -> "ParityReport": ...


@overload
def evaluate(
    source: Place,
    *,
    suites: Sequence[str] | str,
    dense: Place | None = None,
    url: str | None = None,
    model: str | None = None,
    lengths: Sequence[int] | str | None = None,
    samples: int = DEFAULT_SAMPLES,
    tasks: Sequence[str] | str = (),
    seed: int = 0,
    topk: int | None = None,
    data: Data = (),
    texts: Sequence[str] | None = None,
    out: Place | None = None,
    device: "str | torch.device" = AUTO_DEVICE,
    reporter: Reporter | None = None,
) -> "SuiteReport": ...


def evaluate(
    source: Place,
    *,
    suites: Sequence[str] | str | None = None,
    dense: Place | None = None,
    data: Data = (),
    texts: Sequence[str] | None = None,
    topk: int | None = None,
    length: int | None = None,
    sequences: int | None = None,
    kinds: Sequence[str] | str = (),
    needles: bool = True,
    needle_length: int | None = None,
    quick: bool = False,
    url: str | None = None,
    model: str | None = None,
    lengths: Sequence[int] | str | None = None,
    samples: int = DEFAULT_SAMPLES,
    tasks: Sequence[str] | str = (),
    seed: int = 0,
    out: Place | None = None,
    device: "str | torch.device" = AUTO_DEVICE,
    reporter: Reporter | None = None,
) -> "ParityReport | SuiteReport":
    """Compare a converted model with dense attention; with `suites`, let any model answer suites of tests.

    Nothing is written, unless there is an `out`.

    Args:
        source: a converted model's directory; for suites that need no DSA any model's, and with `url` where
            the tokenizer is.
        suites: some of "ruler", "keyloss", "short", "generate"; or "all" of them that the model can run.
        dense: the dense model to compare with too, after `train` above all; in suites it is the one that
            answers as dense. None: only `source` itself, read densely.
        data: text whose held-out part is read, as for `convert`.
        texts: texts in memory, instead of `data`.
        topk: tokens that each query keeps; None: the model's own.
        length: of parity: tokens per sequence; None: 4 k, at least 2048, within the context.
        sequences: of parity: per kind of text; None: 8, or 2 if `quick`; of more than 4096 tokens down to
            half as many.
        kinds: of parity: kinds of text to take, as "code", "prose" or "chat"; empty: all.
        needles: of parity: whether to ask questions, too, that the text answers: the verdict needs them.
        needle_length: of parity: tokens of their prompts; None: 8 k, 2048 to 8192, within the context.
        quick: of parity: fewer sequences and questions, for a first look.
        url: of suites: an OpenAI-compatible endpoint to ask, "ruler" and "generate" only.
        model: of suites: the endpoint's name for the model.
        lengths: of suites: tokens of a prompt, as (1024, 2048), "1k,2k" or "max"; None: k decides.
        samples: of suites: questions per task and length, or texts per length.
        tasks: of suites: some of RULER's; empty: all.
        seed: of suites: another one asks other questions.
        out: folder where answers are kept as they come; an interrupted call goes on there. Those of parity
            are removed at its end.
        device: where to compute, as "cpu" or "cuda"; "auto": on a GPU if torch sees one. Not with `url`.
        reporter: whom to tell how far it is, as `fulmen.LineReporter()`; None: nobody.

    Raises:
        ConfigError: an argument that cannot be, or is not for this kind of evaluation.
        CheckpointError, UnsupportedModelError: a model that cannot be read, or has no DSA.
        CorpusError: text that is missing, empty, binary or too short.
        EndpointError: an endpoint that cannot be reached, refuses, or does not have the model.
        ResumeError: `out` holds results of another run.
    """
    places, in_memory = data_argument(data, texts)
    other = None if dense is None else place_argument("dense", dense)
    if suites is None:
        for_suites: dict[str, object] = {
            "samples": samples if samples != DEFAULT_SAMPLES else None,
            "seed": seed or None,
        }
        for_suites |= {"url": url, "model": model, "lengths": lengths, "tasks": tasks or None}
        _require_default("without suites", for_suites)
        settings = EvalSettings(
            model_dir=path_argument("source", source),
            dense=other,
            data=places,
            texts=in_memory,
            sequences=sequences,
            length=length,
            topk=topk,
            kinds=names_argument("kinds", kinds) if kinds else (),
            needles=flag_argument("needles", needles),
            needle_length=needle_length,
            quick=flag_argument("quick", quick),
            device=device,
            out=None if out is None else path_argument("out", out),
        )
        return measure_parity_of(settings, reporter)
    for_parity: dict[str, object] = {
        "length": length,
        "sequences": sequences,
        "needle_length": needle_length,
        "kinds": kinds or None,
        "quick": quick or None,
    }
    _require_default("to suites", for_parity | {"needles": needles if needles is not True else None})
    names = names_argument("suites", suites)
    if PARITY in names:
        raise refused("suites", suites, "parity is what evaluate (fulmen eval) measures by itself")
    names = known_names(names, "suite", SUITES_ALONE)
    suite_settings = SuiteSettings(
        source=place_argument("source", source),
        suites=names,
        lengths=parse_lengths(lengths),
        samples=samples,
        tasks=names_argument("tasks", tasks) if tasks else (),
        seed=seed,
        data=places,
        texts=in_memory,
        topk=topk,
        dense=other,
        url=url,
        model=model,
        out=None if out is None else path_argument("out", out),
        device=device,
    )
    return run_suites_of(suite_settings, reporter)


def measure_parity_of(settings: EvalSettings, reporter: Reporter | None) -> "ParityReport":
    """`evaluate` without suites, of settings that are checked."""
    reporter = reporter_of(reporter)
    with reporter.stage("Start"):
        from fulmen.pipeline.evaluate import measure
        from fulmen.pipeline.quiet import quiet
    with quiet(reporter):
        return measure(settings, reporter)


def run_suites_of(settings: SuiteSettings, reporter: Reporter | None) -> "SuiteReport":
    """`evaluate` with suites, of settings that are checked."""
    reporter = reporter_of(reporter)
    with reporter.stage("Start"):
        from fulmen.pipeline.quiet import quiet
        from fulmen.pipeline.suites import run_suite_settings, suites_of
    with quiet(reporter):
        names = tuple(name for name in suites_of(settings) if name != PARITY)
        return run_suite_settings(settings, names, reporter)


def _require_default(where: str, values: Mapping[str, object]) -> None:
    """Raise ConfigError for an argument of the other kind of evaluation."""
    for name, value in values.items():
        if value is not None:
            raise ConfigError(f"{name}={value!r} does not apply {where}; leave it out", arguments=[name])
