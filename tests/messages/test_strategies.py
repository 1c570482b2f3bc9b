"""Context strategies: what holds for each over ten thousand histories, and what each keeps."""

import json
from collections import Counter
from functools import cache, partial
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fulmen.errors import ConfigError, ContextBudgetError, MessageError
from fulmen.messages import strategies
from fulmen.messages.message import tool_steps
from fulmen.messages.strategies import OMITTED, SUMMARY_HEAD, SUMMARY_NAME
from tests.messages.conversations import conversation, step

STRATEGIES = {
    "none": strategies.none,
    "summary": strategies.summary,
    "summary, by a model": partial(strategies.summary, summarise=lambda past: f"{len(past)} messages"),
    "discard_75": strategies.discard_75,
    "discard_75, early": partial(strategies.discard_75, trigger=0.3),
    "discard_all": strategies.discard_all,
    "keep_newest": strategies.keep_newest,
    "keep_newest, none": partial(strategies.keep_newest, n=0, trigger=0.0),
    "hierarchical": strategies.hierarchical,
    "hierarchical, 1": partial(strategies.hierarchical, n=1),
}
SAYING = ("system", "developer", "user")


def count(messages):
    """Letters for tokens."""
    texts = (str(message.get(key) or "") for message in messages for key in ("content", "tool_calls"))
    return sum(map(len, texts)) + 10 * len(messages)


def history(draw):
    """With results long enough to be worth omitting."""
    messages = conversation(draw, turns=3, steps=4)
    for message in messages:
        if message["role"] == "tool" and draw.random() < 0.5:
            message["content"] = "result " * draw.randint(1, 60)
    return messages


def said(messages):
    return [message for message in messages if message["role"] in SAYING and "name" not in message]


def check_invariants(strategy, messages, budget, trigger):
    try:
        kept = strategy(messages, budget, count)
    except ContextBudgetError:
        assert count(messages) > trigger * budget
        return
    assert count(kept) <= budget
    assert kept is not messages
    # Each call has its results, right behind it, in their order.
    for place in tool_steps(kept):
        calls = [call["id"] for call in kept[place.start]["tool_calls"]]
        assert [kept[index]["tool_call_id"] for index in place[1:]] == calls
    assert said(kept) == said(messages)
    if messages[0]["role"] == "system":
        assert kept[0] == messages[0]
    if count(messages) <= trigger * budget:
        assert kept == messages
    assert strategy(kept, budget, count) == kept


@cache
def drawn_history(seed):
    """And a copy of it, in words."""
    messages = history(Random(seed))
    return messages, repr(messages)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_thousand_histories_keep_what_must_be_kept(name):
    strategy = STRATEGIES[name]
    trigger = 1.0 if name == "none" else getattr(strategy, "keywords", {}).get("trigger", 0.8)
    for seed in range(1000):
        messages, before = drawn_history(seed)
        share = Random(seed).choice((0.2, 0.5, 0.8, 1.0, 1.3, 2.0))
        check_invariants(strategy, messages, int(count(messages) * share), trigger)
        assert repr(messages) == before


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 5000), st.sampled_from(sorted(STRATEGIES)))
def test_any_history_and_budget(draw, budget, name):
    strategy = STRATEGIES[name]
    trigger = 1.0 if name == "none" else getattr(strategy, "keywords", {}).get("trigger", 0.8)
    check_invariants(strategy, history(draw), budget, trigger)


SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}


def long_history(steps=8, size=1000):
    """One call a step, with results of so many letters."""
    messages = [SYSTEM, USER]
    for number in range(steps):
        calling, *results = step(Random(number), number)
        messages += [
            {**calling, "tool_calls": calling["tool_calls"][:1]},
            {**results[0], "content": "x" * size},
        ]
    return messages


def fits(messages, share):
    """The budget of which messages take a share."""
    return int(count(messages) / share)


def test_none_keeps_all_up_to_the_budget():
    messages = long_history()
    assert strategies.none(messages, count(messages), count) == messages
    with pytest.raises(ContextBudgetError, match="what must be kept takes"):
        strategies.none(messages, count(messages) - 1, count)


def test_discard_75_keeps_the_newest_quarter():
    messages = long_history(steps=8)
    assert strategies.discard_75(messages, fits(messages, 0.9), count) == [SYSTEM, USER, *messages[-4:]]
    # Two steps are too much as well: a quarter of them, rounded down, is none.
    assert strategies.discard_75(messages, fits(messages, 6), count) == [SYSTEM, USER]


def test_discard_all_keeps_no_step_and_every_answer():
    answered = [*long_history(), {"role": "assistant", "content": "42"}, USER, *long_history()[2:]]
    kept = [SYSTEM, USER, {"role": "assistant", "content": "42"}, USER]
    assert strategies.discard_all(answered, fits(answered, 0.9), count) == kept


def test_keep_newest_omits_older_results_alone():
    messages = long_history(steps=8)
    kept = strategies.keep_newest(messages, fits(messages, 0.9), count)
    results = [message["content"] for message in kept if message["role"] == "tool"]
    assert results == [OMITTED] * 3 + ["x" * 1000] * 5
    others = [message for message in kept if message["role"] != "tool"]
    assert others == [message for message in messages if message["role"] != "tool"]
    short = long_history(steps=8, size=3)
    assert strategies.keep_newest(short, count(short), count) == short


def test_hierarchical_discards_all_where_the_newest_are_too_many():
    messages = long_history(steps=8)
    enough = fits(messages, 0.9)
    assert strategies.hierarchical(messages, enough, count) == strategies.keep_newest(messages, enough, count)
    assert strategies.hierarchical(messages, fits(messages, 2), count) == [SYSTEM, USER]


def test_a_summary_takes_in_the_earlier_one():
    asked = []

    def summarise(past):
        asked.append(past)
        return f"summary {len(asked)}"

    messages = long_history()
    strategy = partial(strategies.summary, summarise=summarise)
    kept = strategy(messages, fits(messages, 0.9), count)
    first = {"role": "user", "name": SUMMARY_NAME, "content": f"{SUMMARY_HEAD}summary 1"}
    assert kept == [SYSTEM, USER, first]
    assert asked == [messages[2:]]
    more = [*kept, *messages[2:]]
    again = strategy(more, fits(more, 0.9), count)
    assert again == [SYSTEM, USER, {**first, "content": f"{SUMMARY_HEAD}summary 2"}]
    assert asked[1] == [first, *messages[2:]]


def test_a_digest_has_each_call_and_the_beginning_of_its_result():
    messages = long_history(steps=2)
    call = messages[2]["tool_calls"][0]["function"]
    kept = strategies.summary(messages, fits(messages, 0.9), count)
    lines = kept[-1]["content"].removeprefix(SUMMARY_HEAD).split("\n")
    assert lines[0] == f"{call['name']}({call['arguments']})"
    assert lines[1] == "→ " + "x" * 200
    assert Counter(line[0] for line in lines)["→"] == 2


def test_a_digest_has_the_beginning_of_long_arguments():
    calling, result = named_call(0)
    calling["tool_calls"][0]["function"]["arguments"] = json.dumps({"text": "y" * 10_000})
    messages = [SYSTEM, USER, calling, result]
    assert len(strategies.summary(messages, count(messages), count)[-1]["content"]) < 600


def test_a_summary_that_is_no_text_is_refused():
    messages = long_history()
    with pytest.raises(ConfigError, match="summarise gives None"):
        strategies.summary(messages, fits(messages, 0.9), count, summarise=lambda past: None)


def calls_of_a_run(trace, strategy, budget):
    """What each call of a run gets whose caller gives the whole history."""
    places = [place for place, message in enumerate(trace) if message["role"] == "assistant"]
    return [strategy(trace[:place], budget, count) for place in [*places, len(trace)]]


@pytest.mark.parametrize("name", STRATEGIES)
def test_at_every_call_is_a_strategy_applied_to_what_it_kept(name):
    strategy, budget = STRATEGIES[name], {"none": 100_000, "keep_newest": 8000}.get(name, 5000)
    trace = long_history(steps=12)
    expected, kept = [], []
    for message in trace:
        if message["role"] == "assistant":
            kept = strategy(kept, budget, count)
            expected.append(list(kept))
        kept.append(message)
    expected.append(strategy(kept, budget, count))
    assert calls_of_a_run(trace, strategies.at_every_call(strategy), budget) == expected
    # With nothing to remember, and with another history to remember.
    managed = strategies.at_every_call(strategy)
    assert [managed(trace, budget, count), managed(trace, budget, count)] == [expected[-1]] * 2
    assert managed([SYSTEM, USER, USER], budget, count) == [SYSTEM, USER, USER]
    assert managed(trace, budget, count) == expected[-1]


def test_at_every_call_the_newest_result_is_seen_again_after_a_reset():
    trace = long_history(steps=12)
    runs = calls_of_a_run(trace, strategies.at_every_call(strategies.discard_all), 5000)
    steps = [len(tool_steps(kept)) for kept in runs]
    assert max(steps) == 3
    assert steps[:6] == [0, 1, 2, 3, 0, 1]


def test_at_every_call_nothing_is_summarised_or_counted_twice():
    asked, counted = [], []

    def summarise(past):
        asked.append(past)
        return "short"

    def counting(messages):
        counted.append(messages)
        return count(messages)

    managed = strategies.at_every_call(partial(strategies.summary, summarise=summarise))
    trace = long_history(steps=12)
    for place in range(2, len(trace) + 1, 2):
        managed(trace[:place], 5000, counting)
    assert len(asked) == 3
    assert len(counted) == 13 + len(asked)


@pytest.mark.parametrize("wrong", ["hello", {"role": "robot"}, {"role": "assistant", "tool_calls": ["x"]}])
def test_at_every_call_what_is_wrong_behind_a_known_history_is_named_by_its_place(wrong):
    managed, trace = strategies.at_every_call(strategies.discard_all), long_history(steps=3)
    expected = managed(trace, 5000, count)
    for messages in ([*trace, wrong], [*trace[:-2], wrong], 7):
        where = r"messages is a int" if messages == 7 else rf"messages\[{len(messages) - 1}\]"
        with pytest.raises(MessageError, match=where):
            managed(messages, 5000, count)
    assert managed(trace, 5000, count) == expected


def test_the_fewest_steps_that_ended_win():
    answer = {"role": "assistant", "content": "42"}
    histories = [
        long_history(3),
        [*long_history(4), answer],
        [*long_history(2), answer],
        [*long_history(2), answer],
    ]
    assert strategies.parallel_fewest_steps(histories) == histories[2]
    with pytest.raises(MessageError, match="no history ends"):
        strategies.parallel_fewest_steps(histories[:1])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"budget": 0}, "budget=0"),
        ({"trigger": 1.5}, "trigger=1.5"),
        ({"trigger": float("nan")}, "trigger=nan"),
        ({"n": -1}, "n=-1"),
        ({"budget": None}, "budget=None"),
        ({"budget": float("nan")}, "budget=nan"),
        ({"n": 1.5}, "n=1.5"),
        ({"trigger": "0.8"}, "trigger='0.8'"),
        ({"count": lambda messages: None}, "count gives None"),
        ({"count": lambda messages: float("nan")}, "count gives nan"),
        ({"count": lambda messages: -1}, "count gives -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, named):
    with pytest.raises(ConfigError, match=named):
        strategies.keep_newest(**{"messages": long_history(), "budget": 10, "count": count, **settings})


@pytest.mark.parametrize("name", STRATEGIES)
def test_histories_that_are_broken_are_refused(name):
    messages = long_history()
    for broken, why in ((messages[3:], "without a call"), (messages[:-1], "add their results first")):
        with pytest.raises(MessageError, match=why):
            STRATEGIES[name](broken, 10, count)


def named_call(number):
    """A step with one call."""
    call = {"id": f"id-{number}", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    result = {"role": "tool", "tool_call_id": f"id-{number}", "content": "x" * 200}
    return [{"role": "assistant", "content": None, "tool_calls": [call]}, result]


BROKEN = {
    "no list": (None, "messages is a NoneType"),
    "no dict": ([SYSTEM, 5], "messages.1. is a int"),
    "no role": ([{"content": "x"}], "role is None"),
    "no list of calls": ([USER, {"role": "assistant", "tool_calls": 5}], "tool_calls is 5"),
    "another's result": ([USER, named_call(1)[0], named_call(2)[1]], "'id-2' is none of the calls"),
}


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize(("messages", "why"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_history_is_refused_also_below_the_trigger(name, messages, why):
    for strategy in (STRATEGIES[name], strategies.at_every_call(STRATEGIES[name])):
        with pytest.raises(MessageError, match=why):
            strategy(messages, 10**6, lambda messages: 1)


PICTURE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]


def test_results_that_are_more_than_text_are_omitted_and_told():
    steps = [[said, {**result, "content": PICTURE}] for said, result in map(named_call, range(8))]
    messages = [SYSTEM, USER, *(message for step in steps for message in step)]
    size = fits(messages, 0.9)
    kept = strategies.keep_newest(messages, size, count)
    assert [message["content"] for message in kept if message["role"] == "tool"] == [OMITTED] * 3 + [
        PICTURE
    ] * 5
    assert strategies.summary(messages, size, count)[-1]["content"].endswith("→ (more than text)")


def test_a_summary_is_known_by_its_words_and_not_by_its_name_alone():
    named = {"name": SUMMARY_NAME}
    steps = [{**message, **named} for number in range(8) for message in named_call(number)]
    messages = [{**SYSTEM, **named}, {**USER, **named}, *steps]
    kept = strategies.summary(messages, fits(messages, 0.9), count)
    assert kept[:-1] == messages[:2]
    assert kept[-1]["content"].startswith(SUMMARY_HEAD)
