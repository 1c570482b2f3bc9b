"""One run of reinforcement learning, from a model to the same model after its last step."""

import copy
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import PreTrainedModel

from fulmen.errors import ConfigError
from fulmen.modeling.families import has_dsa
from fulmen.modeling.rollouts import RolloutEngine
from fulmen.tasks.base import HELD_OUT, Score
from fulmen.training.precision import in_float32
from fulmen.training.processes import processes
from fulmen.training.rl.episodes import play, reply_text, require_room
from fulmen.training.rl.prompts import training_rows
from fulmen.training.rl.rewards import UNLEARNABLE_AFTER, Scorer, unlearnable
from fulmen.training.rl.settings import Domain, RlSettings
from fulmen.training.run import OnPart, OnStep, RunWatch, open_run, run_plan, silence
from fulmen.training.sharding import is_sharded
from fulmen.training.sparse.lora import add_lora, merge_lora

if TYPE_CHECKING:
    from fulmen.training.rl.trainer import RlTrainer

METRICS_FILE = "metrics.jsonl"
HELD_OUT_BATCH = 64
TRAINERS_OWN = ("pad_token_id", "bos_token_id", "eos_token_id", "use_cache")
SHOWN = ("reward", "kl", "entropy", "length")

# Scores of held-out problems, by task: in each list the strict and the lenient one of a problem.
HeldOutScores = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class RlResult:
    """What a run came to: lines of its log, and scores of the same held-out problems before and after."""

    rows: list[dict[str, Any]]
    before: HeldOutScores
    after: HeldOutScores
    seconds: float


def train_rl(
    model: PreTrainedModel,
    tokenizer: Any,
    domains: Sequence[Domain],
    make_engine: Callable[[PreTrainedModel], RolloutEngine],
    run_dir: Path,
    settings: RlSettings,
    on_step: OnStep = lambda *_: None,
    on_part: OnPart = lambda *_: None,
    note: Callable[[str], None] = lambda _: None,
) -> RlResult:
    """Train `model` in place by what its tasks reward; the last step's weights are left in it.

    Interrupted, a call with the same arguments resumes from `run_dir` and ends with the same weights; the
    model must have its first weights again. Engines that are not deterministic end with others.

    Args:
        domains: tasks of different names; each step's prompts are theirs in turn.
        make_engine: makes what writes the replies, from the model as it is trained (with adapters, if there
            are some, and in float32). It is closed in the end.
        run_dir: checkpoints and `metrics.jsonl`, a line a step.
        on_step, on_part: told of progress (`fulmen.training.run`). note: told what the user should know.

    Raises:
        ConfigError: settings that do not fit the model, the processes or one another.
        RolloutError: engine and trainer do not agree about the sampled tokens.
        TrainingDivergedError: a loss was not finite; the weights are the last checkpoint's.
        OutputError: the disk is full; what was written before is complete.
    """
    began = time.monotonic()
    state = processes()
    _require_fitting(model, domains, settings, state.num_processes)
    checkpoint = open_run(run_dir)
    tasks = {domain.task.name: domain.task for domain in domains}
    scorer = Scorer(tasks, note)
    # All of them: where weights of 16 bits are added up, engine and trainer round apart. A coarse index is in
    # buffers.
    with _own_config(model), in_float32([*model.parameters(), *model.buffers()]):
        reference = _prepare(model, settings)
        engine = make_engine(model)
        try:
            ask = _Asker(engine, tokenizer, domains, scorer, settings, on_part)
            before = run_plan(run_dir, lambda: {"before": ask("before")})["before"]
            trainer = _trainer(model, reference, tokenizer, domains, engine, run_dir, settings, scorer)
            watch = RlWatch(trainer, run_dir / METRICS_FILE, on_step, note)
            trainer.add_callback(watch)
            trainer.train(resume_from_checkpoint=checkpoint)
            trainer.indexer_loss.rest()
            trainer.update_engine()
            after = ask("after")
        finally:
            engine.close()
            for name in ("forward", "_original_forward"):
                vars(model).pop(name, None)
            merge_lora(model)
            model.requires_grad_(True).eval()
    return RlResult(watch.rows, before, after, time.monotonic() - began)


def _require_fitting(
    model: PreTrainedModel, domains: Sequence[Domain], settings: RlSettings, n_processes: int
) -> None:
    names = [domain.task.name for domain in domains]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"tasks={names} cannot be; name at least one, and each once")
    for domain in domains:
        require_room(domain.task, settings.max_new_tokens)
    if settings.indexer == "trained" and not has_dsa(model.config):
        raise ConfigError("indexer='trained' needs a model with DSA; use frozen, or convert the model first")
    if is_sharded():
        raise ConfigError("reinforcement learning shards no weights; start the processes without FSDP")
    if settings.prompts % n_processes or settings.replies % (settings.at_once * n_processes):
        raise ConfigError(
            f"prompts={settings.prompts} with micro_batch={settings.at_once} cannot be shared by "
            f"{n_processes} processes; use multiples of that"
        )


def _prepare(model: PreTrainedModel, settings: RlSettings) -> PreTrainedModel | None:
    """Switch gradients on where they are wanted; return a reference that is a model by itself, if need be."""
    # A trained indexer has no adapter that could be taken away.
    is_apart = settings.lora is None or settings.indexer == "trained"
    reference = copy.deepcopy(model).requires_grad_(False).eval() if is_apart else None
    model.requires_grad_(True)
    if settings.lora is not None:
        add_lora(model, settings.lora, settings.seed)
    if settings.indexer == "frozen":
        for name, parameter in model.named_parameters():
            if ".indexer." in name:
                parameter.requires_grad_(False)
    return reference


@contextmanager
def _own_config(model: PreTrainedModel) -> Iterator[None]:
    """Trainer and TRL change special ids and more in the model's config; in the end it is as before."""
    config, settings = model.config.get_text_config(), copy.deepcopy(model.generation_config)
    own = {name: getattr(config, name, None) for name in TRAINERS_OWN}
    try:
        yield
    finally:
        model.generation_config = settings
        for name, value in own.items():
            setattr(config, name, value)


def _trainer(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer: Any,
    domains: Sequence[Domain],
    engine: RolloutEngine,
    run_dir: Path,
    settings: RlSettings,
    scorer: Scorer,
) -> "RlTrainer":
    with warnings.catch_warnings():
        # TRL says on import which vLLM it would like.
        warnings.simplefilter("ignore")
        logging.getLogger("trl").setLevel(logging.ERROR)
        from fulmen.training.rl.trainer import RlTrainer, rl_arguments
    trainer = RlTrainer(
        model,
        reference,
        tokenizer,
        domains,
        engine,
        settings,
        scorer,
        args=rl_arguments(run_dir, settings, processes().num_processes, model.device),
        train_dataset=Dataset.from_dict(training_rows(domains, settings.all_prompts)),
    )
    silence(trainer)
    return trainer


@dataclass(frozen=True)
class _Asker:
    """Asks held-out problems, greedily."""

    engine: RolloutEngine
    tokenizer: Any
    domains: Sequence[Domain]
    scorer: Scorer
    settings: RlSettings
    on_part: OnPart

    def __call__(self, when: str) -> HeldOutScores:
        """Scores by task; a reply that cannot be scored has 0."""
        return {domain.task.name: self._scores(domain, when) for domain in self.domains}

    def _scores(self, domain: Domain, when: str) -> list[tuple[float, float]]:
        count, found = self.settings.held_out, []
        for begin in range(0, count, HELD_OUT_BATCH):
            self.on_part(begin, count, f"held-out problems {when}, {domain.task.name}")
            indices = range(HELD_OUT + begin, HELD_OUT + min(count, begin + HELD_OUT_BATCH))
            problems = [domain.task.problem(index) for index in indices]
            tasks = {domain.task.name: domain.task}
            rollouts = play(self.engine, self.tokenizer, tasks, problems, self.settings.greedy())
            for problem, rollout in zip(problems, rollouts, strict=True):
                reply = reply_text(self.tokenizer, rollout)
                score = self.scorer.score(problem, reply) or Score(0.0, 0.0)
                found.append((score.strict, score.lenient))
        self.on_part(count, count, f"held-out problems {when}, {domain.task.name}")
        return found


class RlWatch(RunWatch):
    """Writes a line a step, and says once which tasks teach nothing."""

    loss_name = "reward"

    def __init__(
        self, trainer: "RlTrainer", log_file: Path, on_step: OnStep, note: Callable[[str], None]
    ) -> None:
        super().__init__(log_file, on_step, None, time.monotonic())
        self.trainer, self.note = trainer, note
        self.rows: list[dict[str, Any]] = []
        self._clock = time.monotonic()

    def resume(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = list(rows)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._clock = time.monotonic()

    def step_rows(self, step: int) -> list[dict[str, Any]]:
        seconds = round(time.monotonic() - self._clock, 3)
        self.rows.append({"step": step, **self.trainer.step_row(), "seconds": seconds})
        if step == UNLEARNABLE_AFTER:
            for name, advice in unlearnable(self.rows).items():
                self.note(f"Task {name} taught nothing in {step} steps: {advice}")
        return self.rows[-1:]

    def step_figures(self) -> dict[str, float]:
        return {name: self.rows[-1][name] for name in SHOWN if self.rows[-1][name] is not None}
