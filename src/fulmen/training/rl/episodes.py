"""Replies of several turns: an engine writes one, its task tells it something, and it goes on behind both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, cast

from fulmen.errors import ConfigError
from fulmen.modeling.rollouts import Rollout, RolloutEngine, Sampling
from fulmen.tasks.base import TURN, EpisodeTask, Problem, Task, turns_of
from fulmen.training.rl.prompts import prompt_tokens

# Stands for a reply where a template is asked what it writes behind one.
_REPLY = "@reply@"
# Each turn has a seed of its own, far from those of other calls.
_SEEDS, _TURN_SEED = 2**32, 2_654_435_761


def play(
    engine: RolloutEngine,
    tokenizer: Any,
    tasks: Mapping[str, Task],
    problems: Sequence[Problem],
    sampling: Sampling,
) -> list[Rollout]:
    """Rollouts for problems, `per_prompt` each and in their order, as `RolloutEngine.generate`.

    Each turn of a task of n turns has an n-th of `max_new_tokens`. A reply ends where its task says so, after
    n turns, or where what is told would leave no room for another turn.

    Args:
        tasks: by the names that problems have.

    Raises what the engine does, ConfigError for a prompt without tokens and as `require_room`.
    """
    found: list[Rollout] = []
    for turns in dict.fromkeys(turns_of(tasks[problem.task]) for problem in problems):
        places = [n for n, problem in enumerate(problems) if turns_of(tasks[problem.task]) == turns]
        some = [problems[place] for place in places]
        prompts = [prompt_tokens(tokenizer, problem) for problem in some]
        if turns == 1:
            rollouts = engine.generate(prompts, sampling)
        else:
            rollouts = _episodes(engine, tokenizer, tasks, some, prompts, sampling)
        found += [replace(rollout, prompt=places[rollout.prompt]) for rollout in rollouts]
    return sorted(found, key=lambda rollout: rollout.prompt)


def reply_text(tokenizer: Any, rollout: Rollout) -> str:
    """What the policy wrote, its turns joined by TURN."""
    told = rollout.told or (False,) * len(rollout.tokens)
    runs = groupby(zip(told, rollout.tokens, strict=True), key=lambda one: one[0])
    turns = [[token for _, token in run] for is_told, run in runs if not is_told]
    texts = tokenizer.batch_decode(turns, skip_special_tokens=True)
    return TURN.join(text.replace(TURN, " ") for text in texts)


def require_room(task: Task, max_new_tokens: int) -> int:
    """Tokens of each turn. Raises ConfigError where there is not one for each."""
    if (each := max_new_tokens // turns_of(task)) < 1:
        raise ConfigError(
            f"max_new_tokens={max_new_tokens} is less than a token for each of the {turns_of(task)} turns of "
            f"task {task.name!r}; allow more, or fewer turns",
            arguments=["max_new_tokens"],
        )
    return each


def told_ids(tokenizer: Any, told: str, last: int | None) -> list[int]:
    """Token ids between a reply and the next one: its end, a message of the user, what opens the reply.

    Args:
        last: the reply's last token; its end is not written twice. None: it has not ended.

    Raises ConfigError for a chat template that does not write a reply as it is.
    """
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(f"\n{told}\n", add_special_tokens=False)["input_ids"])
    said = [("user", ""), ("assistant", _REPLY), ("user", told)]
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in said],
        add_generation_prompt=True,
        tokenize=False,
    )
    _, reply, behind = text.partition(_REPLY)
    if not reply:
        raise ConfigError("the chat template does not write replies as they are; use tasks of one turn")
    ids = list(tokenizer(behind, add_special_tokens=False)["input_ids"])
    return ids[1:] if ids[:1] == [last] else ids


@dataclass
class _Episode:
    """A reply that is being written."""

    number: int
    task: EpisodeTask
    problem: Problem
    prompt: Sequence[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    kept: list[tuple[int, ...]] = field(default_factory=list)
    told: list[bool] = field(default_factory=list)
    last: Rollout | None = None
    has_ended: bool = False

    def write(self, turn: Rollout) -> None:
        """Add a turn."""
        self.last = turn
        self._add(turn.tokens, turn.logprobs, turn.kept or [()] * len(turn.tokens), is_told=False)

    def hear(self, tokenizer: Any, room: int) -> bool:
        """Add what the model is told; whether there is something, and no more than `room` tokens with it."""
        assert self.last is not None
        told = self.task.told(self.problem, reply_text(tokenizer, self.rollout()))
        if told is None:
            self.has_ended = self.last.ended
            return False
        ids = told_ids(tokenizer, told, self.last.tokens[-1] if self.last.ended else None)
        if len(self.tokens) + len(ids) > room:
            return False
        self._add(ids, [0.0] * len(ids), [()] * len(ids), is_told=True)
        return True

    def rollout(self) -> Rollout:
        """The reply so far."""
        assert self.last is not None
        return Rollout(
            self.number,
            tuple(self.tokens),
            tuple(self.logprobs),
            None if self.last.kept is None else tuple(self.kept),
            self.has_ended,
            # Of the whole sequence, as the last turn's prompt is all that was before it.
            self.last.experts,
            tuple(self.told),
        )

    def _add(
        self, ids: Sequence[int], logprobs: Sequence[float], kept: Sequence[tuple[int, ...]], *, is_told: bool
    ) -> None:
        self.tokens += ids
        self.logprobs += logprobs
        self.kept += kept
        self.told += [is_told] * len(ids)


def _episodes(
    engine: RolloutEngine,
    tokenizer: Any,
    tasks: Mapping[str, Task],
    problems: Sequence[Problem],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
) -> list[Rollout]:
    """Rollouts of problems whose tasks have the same number of turns, all turns of a number at once."""
    begun = [
        _Episode(number, cast(EpisodeTask, tasks[problem.task]), problem, prompts[number])
        for number, problem in enumerate(problems)
        for _ in range(sampling.per_prompt)
    ]
    each = require_room(begun[0].task, sampling.max_new_tokens)
    going, turns = begun, begun[0].task.turns
    for turn in range(turns):
        seed = (sampling.seed + turn * _TURN_SEED) % _SEEDS
        asked = replace(sampling, per_prompt=1, max_new_tokens=each, seed=seed)
        written = engine.generate([[*one.prompt, *one.tokens] for one in going], asked)
        for episode, rollout in zip(going, written, strict=True):
            episode.write(rollout)
        # Nothing is told after the last turn; whether the reply has ended is asked all the same.
        room = sampling.max_new_tokens - each if turn + 1 < turns else 0
        going = [episode for episode in going if episode.hear(tokenizer, room)]
        if not going:
            break
    return [episode.rollout() for episode in begun]
