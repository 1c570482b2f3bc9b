"""A recipe of post-training: specialists, rejection sampling, one distilled model, mixed RL; resumable.

The third step of DeepSeek-V3.2's recipe (arXiv 2512.02556, section 3): each specialist begins at one base and
is trained by reinforcement learning; they write the data that one model is fine-tuned on, under sparse
attention; then one stage of reinforcement learning mixes all domains. Each stage's model answers the same
held-out problems.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fulmen.errors import ConfigError
from fulmen.evaluation.provenance import about_run
from fulmen.evaluation.recipe.report import (
    BASE,
    COLD,
    DENSE_MIXED,
    DISTILLED,
    MIXED,
    SPECIALIST,
    RecipeReport,
)
from fulmen.evaluation.report_files import save_report
from fulmen.files import write_file
from fulmen.modeling.families import has_dsa
from fulmen.pipeline.held_out import Solved, held_out_problems, solved_by
from fulmen.pipeline.lessons import Lesson
from fulmen.pipeline.model_config import read_config
from fulmen.pipeline.recipe_folder import RecipeFolder
from fulmen.pipeline.recipe_settings import Recipe, RecipeDomain
from fulmen.pipeline.recipe_stages import RecipeStages
from fulmen.pipeline.rejection import (
    counts_row,
    filled_up,
    kept_lessons,
    own_answers,
    read_journal,
    sample_task,
)
from fulmen.pipeline.reporter import Reporter
from fulmen.tasks import named
from fulmen.tasks.base import Problem
from fulmen.tasks.rewards import GuardedTask
from fulmen.tasks.split import text_of

REJECTION, DENSE_DISTILLED = "rejection", "dense-distilled"
# How far a run goes.
SPECIALISTS, ALL = "specialists", "all"
PARTS = (SPECIALISTS, DISTILLED, ALL)
REPORT_FILES = {"json": "recipe.json", "markdown": "recipe.md", "html": "recipe.html"}
DATA = "data"
RL_PAGE, CARD, METRICS, SFT_LOG = "rl.html", "README.md", "metrics.jsonl", "stages/sft.jsonl"


class RecipeRun:
    """One run of a recipe in its folder.

    Args:
        stages: what does the work.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        device: torch.device,
        reporter: Reporter,
        stages: RecipeStages,
    ) -> None:
        """Raises ConfigError, CheckpointError or OutputError, before any work, for what cannot be."""
        stages.require()
        self.recipe, self.device, self.reporter, self.stages = recipe, device, reporter, stages
        self.is_dense = not has_dsa(read_config(recipe.base)[1])
        if recipe.dense and not self.is_dense:
            raise ConfigError(
                f"dense: true needs a dense base, and {recipe.base} is converted; name its source"
            )
        if recipe.convert and not self.is_dense:
            raise ConfigError(f"convert: is for a dense base, and {recipe.base} is converted; leave it out")
        specs = [spec for domain in recipe.domains for spec in domain.tasks]
        self.tasks = {spec: GuardedTask(named(spec)) for spec in specs}
        self.held_out = {spec: held_out_problems(task, recipe.held_out) for spec, task in self.tasks.items()}
        self.forbidden = {text_of(problem) for some in self.held_out.values() for problem in some}
        self.folder = RecipeFolder(out)
        # What two recipes cannot have in one folder; other settings are each stage's own.
        domains = {domain.name: domain.tasks for domain in recipe.domains}
        self.folder.belong_to(
            {"base": recipe.base, "seed": recipe.seed, "held_out": recipe.held_out, "domains": domains}
        )
        self.solved: dict[str, dict[str, Solved]] = {}
        self.samples: dict[str, dict[str, int]] = {}

    def run(self, until: str = ALL) -> RecipeReport:
        """Do what is not done yet, up to a part of PARTS; write the report after each stage."""
        base = self._base()
        self._evaluate(BASE, base, self.recipe.domains)
        specialists = {domain.name: self._specialist(domain, base) for domain in self.recipe.domains}
        if until != SPECIALISTS:
            lessons = self._lessons(specialists)
            distilled = self._fine_tune(DISTILLED, base, lessons, self.recipe.distill)
            self._evaluate(DISTILLED, distilled, self.recipe.domains)
            self._report()
            if until == ALL:
                mixed = self._learn(MIXED, distilled, self.recipe.domains, self.recipe.mixed)
                self._evaluate(MIXED, mixed, self.recipe.domains)
                if self.recipe.dense:
                    self._dense(lessons)
        return self._report()

    def _base(self) -> str:
        if not self.is_dense:
            return self.recipe.base
        options = self.recipe.convert

        def make(out: Path) -> None:
            self.stages.convert(self.recipe.base, out, options, self.recipe.seed, self.device, self.reporter)

        settings = {"source": self.recipe.base, "seed": self.recipe.seed, **options}
        return str(self.folder.make_model(BASE, settings, make, self.reporter))

    def _specialist(self, domain: RecipeDomain, base: str) -> str:
        lessons = [lesson for spec in domain.tasks for lesson in self._own_answers(spec, domain)]
        begins = base
        if lessons:
            begins = self._fine_tune(f"{domain.name}/{COLD}", base, lessons, domain.sft.options)
            self._evaluate(f"{domain.name}/{COLD}", begins, [domain])
        else:
            self.reporter.note(f"{domain.name}: its tasks have no answers of their own; no cold start")
        stage = f"{domain.name}/{SPECIALIST}"
        found = self._learn(stage, begins, [domain], domain.rl)
        self._evaluate(stage, found, [domain])
        # What is done so far can be looked at.
        self._report()
        return found

    def _own_answers(self, spec: str, domain: RecipeDomain) -> list[Lesson]:
        return own_answers(self.tasks[spec], -(-domain.sft.problems // len(domain.tasks)))

    def _lessons(self, specialists: Mapping[str, str]) -> list[Lesson]:
        """What the distilled model learns: what the specialists wrote and is kept, filled up."""
        settings = {
            "domains": {domain.name: asdict(domain.rejection) for domain in self.recipe.domains},
            "seed": self.recipe.seed,
            "specialists": dict(specialists),
        }
        journals = [self._journal(spec) for spec in self.tasks]
        self.folder.run(REJECTION, settings, lambda: self._sample(specialists), self.reporter, journals)
        found = [
            lesson
            for domain in self.recipe.domains
            for spec in domain.tasks
            for lesson in self._lessons_of(spec, domain)
        ]
        if not found:
            raise ConfigError(
                "no specialist wrote a right reply, and the tasks have no answers of their own, so there is "
                "nothing to distil; take easier tasks, more steps, or more rejection.samples"
            )
        return found

    def _lessons_of(self, spec: str, domain: RecipeDomain) -> list[Lesson]:
        task, count = self.tasks[spec], -(-domain.rejection.examples // len(domain.tasks))
        rows = read_journal(self._journal(spec))
        kept, counts = kept_lessons(task, domain.rejection, rows, self.forbidden)
        found = filled_up(task, kept, count, self.forbidden, counts)
        self.samples[spec] = counts_row(counts)
        self.reporter.note(
            f"{spec}: {counts.right} of {counts.samples} samples are right, {counts.kept} are kept "
            f"({counts.duplicates} duplicates, {counts.contaminated} to held-out problems), "
            f"{counts.own} answers of its own added, {counts.repeated} repeated"
        )
        if found and not counts.kept:
            self.reporter.note(f"{spec}: the distilled model learns nothing here from its specialist")
        return found

    def _sample(self, specialists: Mapping[str, str]) -> None:
        for domain in self.recipe.domains:
            answerer = self.stages.answerer(Path(specialists[domain.name]), self.device)
            for spec in domain.tasks:
                journal = self._journal(spec)
                journal.parent.mkdir(parents=True, exist_ok=True)
                with self.reporter.stage("Sample"):
                    sample_task(
                        answerer,
                        self.tasks[spec],
                        domain.rejection,
                        domain.max_new_tokens,
                        self.recipe.seed,
                        journal,
                        self.forbidden,
                        self.reporter,
                    )

    def _dense(self, lessons: Sequence[Lesson]) -> None:
        """The same data, steps and rewards for the dense base."""
        begins = self._fine_tune(DENSE_DISTILLED, self.recipe.base, lessons, self.recipe.distill)
        self._evaluate(DENSE_DISTILLED, begins, self.recipe.domains)
        mixed = self._learn(DENSE_MIXED, begins, self.recipe.domains, self.recipe.mixed)
        self._evaluate(DENSE_MIXED, mixed, self.recipe.domains)

    def _fine_tune(
        self, stage: str, source: str, lessons: Sequence[Lesson], options: Mapping[str, Any]
    ) -> str:
        lines = "".join(json.dumps(asdict(lesson)) + "\n" for lesson in lessons)
        digest = hashlib.sha256(lines.encode()).hexdigest()[:16]
        settings = {"source": source, "seed": self.recipe.seed, "lessons": len(lessons), "data": digest}

        def make(out: Path) -> None:
            write_file(self.folder.path / DATA / f"{stage.replace('/', '.')}.jsonl", lines)
            self.stages.sft(source, lessons, out, options, self.recipe.seed, self.device, self.reporter)

        self.reporter.note(f"Stage {stage}: fine-tuning on {len(lessons)} replies")
        return str(self.folder.make_model(stage, {**settings, **options}, make, self.reporter))

    def _learn(
        self, stage: str, source: str, domains: Sequence[RecipeDomain], options: Mapping[str, Any]
    ) -> str:
        longest = max(domain.max_new_tokens for domain in domains)
        tasks = [_with_kl(spec, domain.kl) for domain in domains for spec in domain.tasks]
        # The recipe asks held-out problems itself.
        options = {"max_new_tokens": longest, "held_out": 0, **options}

        def make(out: Path) -> None:
            self.stages.rl(source, tasks, out, options, self.recipe.seed, self.device, self.reporter)

        self.reporter.note(f"Stage {stage}: reinforcement learning on {', '.join(tasks)}")
        settings = {"source": source, "seed": self.recipe.seed, "tasks": tasks, **options}
        return str(self.folder.make_model(stage, settings, make, self.reporter))

    def _evaluate(self, stage: str, place: str, domains: Sequence[RecipeDomain]) -> None:
        settings = {
            "model": place,
            "held_out": self.recipe.held_out,
            "held_out_samples": self.recipe.held_out_samples,
            "tasks": {spec: domain.max_new_tokens for domain in domains for spec in domain.tasks},
        }

        def work() -> dict[str, Solved]:
            answerer, found = self.stages.answerer(Path(place), self.device), {}
            for domain in domains:
                with self.reporter.stage("Evaluate"):
                    found[domain.name] = [
                        one for spec in domain.tasks for one in self._solved(answerer, spec, domain)
                    ]
            return found

        self.solved[stage] = self.folder.run(f"evaluate/{stage}", settings, work, self.reporter)

    def _solved(self, answerer: Any, spec: str, domain: RecipeDomain) -> Solved:
        problems: list[Problem] = self.held_out[spec]
        task, samples = self.tasks[spec], self.recipe.held_out_samples
        found = solved_by(answerer, task, problems, domain.max_new_tokens, samples, self.reporter, spec)
        if task.failures:
            self.reporter.note(f"{spec}: scores that could not be had: {dict(task.failures)}; not solved")
        return found

    def _journal(self, spec: str) -> Path:
        number = list(self.tasks).index(spec)
        return self.folder.path / DATA / f"samples-{number}.jsonl"

    def _report(self) -> RecipeReport:
        about = {**about_run(self.recipe.base), "tasks": "; ".join(self.tasks), "seed": str(self.recipe.seed)}
        stages = [stage for stage in self.solved if (self.folder.model(stage)).is_dir()]
        curves = {stage: _curves(self.folder.model(stage)) for stage in stages}
        pages = {
            stage: f"{stage}/{page}"
            for stage in stages
            for page in (CARD, RL_PAGE)  # the last one that is there
            if (self.folder.model(stage) / page).exists()
        }
        report = RecipeReport(self.solved, self.samples, curves, pages, about)
        files = {kind: self.folder.path / name for kind, name in REPORT_FILES.items()}
        save_report(report, **files)
        return report


def _with_kl(spec: str, kl: float) -> str:
    return f"{spec}{',' if ':' in spec else ':'}kl={kl:g}"


def _curves(model: Path) -> list[dict[str, Any]]:
    """Lines of the log of the stage that made a model: of RL, else of fine-tuning."""
    for name in (METRICS, SFT_LOG):
        if (file := model / name).exists():
            return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return []
