"""What an agent keeps of a history that outgrows the context: pure functions of (messages, budget, count).

A step is an assistant's message with tool calls and the results that answer it; all steps together are the
tool history. Strategies discard or shorten steps, and leave everything else as it is: what system, developer
and user said, and answers without calls. Nothing is done until the messages take more than `trigger` of the
budget (0.8, as DeepSeek-V3.2 has it), so that until then a prefix cache holds all but what is new.

    none            keep everything
    summary         replace the tool history by a text about it
    discard_75      discard the oldest 75 % of the steps, again if that is not enough
    discard_all     discard the tool history: the work begins anew
    keep_newest     omit the results of all but the newest n steps
    hierarchical    keep the newest n, and where that is not enough discard all

All return a new list, and change no message. What comes back fits the budget, has every call answered and
every result behind its call, and stays as it is when given again. Other values than the defaults are set by
`functools.partial(keep_newest, n=3)`, which is a strategy again.

Apply one before each call to what it returned last time and what came since; where only the whole history is
at hand, `at_every_call` does that.

Sources: DeepSeek-V3.2, arXiv 2512.02556, context management of its search agent; keep_newest and hierarchical
are GLM-5's. V3.2's "parallel, fewest steps" chooses among several histories, so it cannot be a function of
one: see `parallel_fewest_steps`.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import ceil
from numbers import Real

from fulmen.errors import ConfigError, ContextBudgetError, MessageError
from fulmen.messages.message import (
    Message,
    calls_of,
    check_messages,
    results_in_order,
    text_of,
    tool_steps,
)

# The tokens that a prompt of these messages has.
Counter = Callable[[Sequence[Message]], int]
Strategy = Callable[[Sequence[Message], int, Counter], list[Message]]

TRIGGER = 0.8
DISCARDED = 0.75
NEWEST = 5
OMITTED = "[The result is omitted to save space; call the tool again if you need it.]"
# The name by which a summary knows an earlier one; it is said by nobody.
SUMMARY_NAME = "fulmen_summary"
SUMMARY_HEAD = "What you did so far, in short, as the steps themselves are discarded:\n\n"
DIGEST_LETTERS = 200
NO_TEXT = "(more than text)"


def none(messages: Sequence[Message], budget: int, count: Counter) -> list[Message]:
    """All messages.

    Args:
        messages: in OpenAI's shape, up to where the model goes on.
        budget: tokens that the prompt may have.
        count: of a list of messages, with whatever stands around them in the prompt.

    Raises ContextBudgetError if what must be kept is larger than the budget, MessageError for a call without
    its result or a result without its call (ids are compared where all have one), ConfigError for a budget
    or trigger that cannot be, and for a count that gives no number. So do all.
    """
    if _steps_if_due(messages, budget, count, 1.0) is None:
        return list(messages)
    return _fitting(messages, budget, count)


def summary(
    messages: Sequence[Message],
    budget: int,
    count: Counter,
    *,
    summarise: Callable[[Sequence[Message]], str] | None = None,
    trigger: float = TRIGGER,
) -> list[Message]:
    """A text in place of the tool history, as a last message of the role user.

    Args:
        summarise: the text for the messages of the steps, a summary of earlier ones before them. By default
            `digest`, which asks no model.
    """
    if (steps := _steps_if_due(messages, budget, count, trigger)) is None:
        return list(messages)
    if not steps:
        return _fitting(messages, budget, count)
    earlier = [range(at, at + 1) for at, message in enumerate(messages) if _is_summary(message)]
    past = [messages[index] for step in (*earlier, *steps) for index in step]
    text = (summarise or digest)(past)
    if not isinstance(text, str):
        raise ConfigError(f"summarise gives {text!r:.80}; let it return text", arguments=("summarise",))
    told: Message = {"role": "user", "name": SUMMARY_NAME, "content": SUMMARY_HEAD + text}
    return _fitting([*_without(messages, [*earlier, *steps]), told], budget, count)


def discard_75(
    messages: Sequence[Message], budget: int, count: Counter, *, trigger: float = TRIGGER
) -> list[Message]:
    """Without the oldest 75 % of the steps, rounded up; again while `trigger` is exceeded."""
    kept = messages
    while (steps := _steps_if_due(kept, budget, count, trigger)) is not None:
        if not steps:
            return _fitting(kept, budget, count)
        kept = _without(kept, steps[: ceil(len(steps) * DISCARDED)])
    return list(kept)


def discard_all(
    messages: Sequence[Message], budget: int, count: Counter, *, trigger: float = TRIGGER
) -> list[Message]:
    """Without any step: the next one begins where the user asked."""
    if (steps := _steps_if_due(messages, budget, count, trigger)) is None:
        return list(messages)
    return _fitting(_without(messages, steps), budget, count)


def keep_newest(
    messages: Sequence[Message],
    budget: int,
    count: Counter,
    *,
    n: int = NEWEST,
    trigger: float = TRIGGER,
) -> list[Message]:
    """With the results of the newest n steps; older ones that are longer become a line that says so.

    Each step from then on changes the middle of the prompt, and a prefix cache misses all that follows it.
    """
    _check_newest(n)
    if (steps := _steps_if_due(messages, budget, count, trigger)) is None:
        return list(messages)
    return _fitting(_with_newest(messages, steps, n), budget, count)


def hierarchical(
    messages: Sequence[Message],
    budget: int,
    count: Counter,
    *,
    n: int = NEWEST,
    trigger: float = TRIGGER,
) -> list[Message]:
    """As `keep_newest`, and where `trigger` is exceeded all the same, as `discard_all`."""
    _check_newest(n)
    if (steps := _steps_if_due(messages, budget, count, trigger)) is None:
        return list(messages)
    return discard_all(_with_newest(messages, steps, n), budget, count, trigger=trigger)


def at_every_call(strategy: Strategy) -> Strategy:
    """A strategy for callers that give the whole history each time, as if it had never been managed.

    It is applied before each assistant's message to what it had kept until then, and in the end to the rest.
    Otherwise `discard_all`, once it is due, would discard every later result at once, and the work never end.

    What was kept last time is remembered: a history that goes on from there is counted and summarised from
    there.
    """
    known: tuple[tuple[int, Counter] | None, list[Message], list[Message]] = (None, [], [])

    def managed(messages: Sequence[Message], budget: int, count: Counter) -> list[Message]:
        nonlocal known
        settings, given, history = known
        is_known = settings == (budget, count) and _begins_with(messages, given)
        check_messages(messages, len(given) if is_known else 0)
        is_applied = is_known and _goes_on(messages, len(given))
        start = len(given) if is_applied else 0
        history = history if is_applied else []
        for message in messages[start:]:
            if message["role"] == "assistant" and not is_applied:
                history = strategy(history, budget, count)
            history, is_applied = [*history, message], False
        if not is_applied:
            history = strategy(history, budget, count)
        known = ((budget, count), list(messages), history)
        return list(history)

    return managed


def parallel_fewest_steps(histories: Iterable[Sequence[Message]]) -> list[Message]:
    """Of the histories that end with an answer, the one with the fewest steps; of equals the first.

    Run as many times as there are to be histories, each within its context by a strategy or without one.

    Raises MessageError if none has ended.
    """
    ended = [list(history) for history in histories if _has_ended(history)]
    if not ended:
        raise MessageError("no history ends with an assistant's answer without calls; let the runs finish")
    return min(ended, key=lambda history: sum(message["role"] == "assistant" for message in history))


def digest(messages: Sequence[Message]) -> str:
    """The beginning of each call and of its result, a line each, after what earlier summaries said."""
    lines = []
    for message in messages:
        if message["role"] == "user":
            lines.append(text_of(message, "a summary").removeprefix(SUMMARY_HEAD))
        for call in calls_of(message):
            given = call.get("function")
            function = given if isinstance(given, Mapping) else {}
            lines.append(_beginning(f"{function.get('name')}({function.get('arguments')})"))
        if message["role"] == "tool":
            text = _text_alone(message)
            lines.append(f"→ {NO_TEXT if text is None else _beginning(text)}")
    return "\n".join(lines)


def _beginning(text: str) -> str:
    """A text's beginning, in one line."""
    return " ".join(text.split())[:DIGEST_LETTERS]


def _steps_if_due(
    messages: Sequence[Message], budget: int, count: Counter, trigger: float
) -> list[range] | None:
    """The steps of messages that take more of the budget than they may; None of others. All are checked."""
    are_numbers = isinstance(budget, Real) and isinstance(trigger, Real)
    if not (are_numbers and budget >= 1 and 0 <= trigger <= 1):
        raise ConfigError(
            f"budget={budget!r} with trigger={trigger!r} cannot be; use a budget of 1 token or more, and a "
            "trigger from 0 to 1",
            arguments=("budget", "trigger"),
        )
    steps = _answered_steps(messages)
    return steps if _tokens(messages, count) > trigger * budget else None


def _tokens(messages: Sequence[Message], count: Counter) -> int:
    """What `count` gives. Raises ConfigError for what is none: whatever is compared with NaN would fit."""
    tokens = count(messages)
    if not (isinstance(tokens, Real) and tokens >= 0):
        raise ConfigError(
            f"count gives {tokens!r:.80}; let it return the tokens of a list of messages",
            arguments=("count",),
        )
    return tokens


def _check_newest(n: int) -> None:
    if not isinstance(n, int) or n < 0:
        raise ConfigError(f"n={n!r} cannot be; use how many steps to keep, from 0", arguments=("n",))


def _answered_steps(messages: Sequence[Message]) -> list[range]:
    """The steps; MessageError for results of other calls, and where the last step's are still to come."""
    steps = tool_steps(messages)
    for step in steps:
        results_in_order(messages, step)
    if steps and len(steps[-1]) == 1:
        raise MessageError(
            f"messages[{steps[-1].start}] ends the messages with tool calls; add their results first"
        )
    return steps


def _without(messages: Sequence[Message], steps: Iterable[Collection[int]]) -> list[Message]:
    gone = {index for step in steps for index in step}
    return [message for index, message in enumerate(messages) if index not in gone]


def _with_newest(messages: Sequence[Message], steps: Sequence[range], n: int) -> list[Message]:
    """With the results of all but the newest n steps omitted."""
    older = {index for step in steps[: max(0, len(steps) - n)] for index in step[1:]}
    return [
        {**message, "content": OMITTED} if index in older and _is_worth_omitting(message) else message
        for index, message in enumerate(messages)
    ]


def _is_worth_omitting(result: Message) -> bool:
    """Whether a result takes more room than the line in its place; pictures do."""
    text = _text_alone(result)
    return text is None or len(text) > len(OMITTED)


def _text_alone(result: Message) -> str | None:
    """A result's text; None for one with more than text."""
    try:
        return text_of(result, "a result")
    except MessageError:
        return None


def _is_summary(message: Message) -> bool:
    """Whether `summary` wrote a message; others may have its name."""
    is_named = message["role"] == "user" and message.get("name") == SUMMARY_NAME
    return is_named and str(message.get("content")).startswith(SUMMARY_HEAD)


def _fitting(messages: Sequence[Message], budget: int, count: Counter) -> list[Message]:
    """The messages as a list. Raises ContextBudgetError if they are larger than the budget."""
    if (tokens := _tokens(messages, count)) > budget:
        raise ContextBudgetError(
            f"what must be kept takes {tokens:,} tokens, and budget={budget:,}; raise it, use a strategy "
            "that discards more, or say less in the messages that none may discard",
            arguments=("budget",),
        )
    return list(messages)


def _has_ended(history: Sequence[Message]) -> bool:
    check_messages(history)
    return bool(history) and history[-1]["role"] == "assistant" and not calls_of(history[-1])


def _begins_with(messages: Sequence[Message], given: Sequence[Message]) -> bool:
    return isinstance(messages, Sequence) and list(messages[: len(given)]) == list(given)


def _goes_on(messages: Sequence[Message], length: int) -> bool:
    """Whether so many messages are followed by nothing, or by a reply to them and what came since."""
    return len(messages) == length or messages[length]["role"] == "assistant"
