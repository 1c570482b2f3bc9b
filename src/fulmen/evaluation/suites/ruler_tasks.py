"""The tasks of RULER (arXiv 2404.06654) that need no text from outside; words and facts are fulmen's own.

The prompts are plain text, to be continued; each ends with the first words of its answer, as RULER's do.
Single and multi-key needles are worded as in `fulmen.evaluation.needle_text`, for models as small as 135
M.
"""

from collections.abc import Sequence
from itertools import pairwise

from fulmen.data.lookup_words import NAMES
from fulmen.errors import ConfigError
from fulmen.evaluation.needle_text import NEEDLE, QUESTION
from fulmen.evaluation.suites.samples import PromptSpec, Task, TaskContext
from fulmen.evaluation.suites.word_lists import common_words, frequent_words

KEYS = VALUES = QUERIES = 4
HOPS = 4
PEOPLE = 4
CITIES = (
    *("Lisbon", "Vienna", "Dublin", "Prague", "Warsaw", "Athens", "Madrid", "Berlin", "Cairo", "Lima"),
    *("Oslo", "Rome", "Paris", "Tokyo", "Delhi", "Havana", "Seoul", "Boston", "Geneva", "Milan"),
)
CONSONANTS = "BDFGKLMNPRSTVZ"


def needle_single(context: TaskContext) -> PromptSpec:
    """One key and its number (section 3.1, single NIAH)."""
    return _needles(context, 1)


def needle_multikey(context: TaskContext) -> PromptSpec:
    """The number of one key among four of the same form (section 3.1, multi-keys)."""
    return _needles(context, KEYS)


def needle_lines(context: TaskContext) -> PromptSpec:
    """As multi-key, where nothing but needles is there (section 3.1, multi-keys, the limiting case)."""
    name, number = _full_names(context, 1)[0], _numbers(context, 1)[0]

    def line(key: str, value: str) -> list[int]:
        return context.ids(NEEDLE.format(name=key, number=value).strip() + "\n")

    def lines(available: int) -> list[list[int]]:
        pieces, seen = [line(name, number)], {name}
        left = available - len(pieces[0])
        while True:
            other = _new_full_name(context, seen)
            piece = line(other, _numbers(context, 1)[0])
            left -= len(piece)
            if left < 0:
                break
            pieces.append(piece)
        context.random.shuffle(pieces)
        return pieces

    return PromptSpec((), QUESTION.format(name=name), (number,), body=lines)


def needle_multivalue(context: TaskContext) -> PromptSpec:
    """All four numbers of one key (section 3.1, multi-values)."""
    name, numbers = context.random.choice(NAMES), _numbers(context, VALUES)
    question = (
        f"\n\nQuestion: which {VALUES} numbers are next to {name} in the text above?\n"
        f"Answer: The {VALUES} secret numbers of {name}:"
    )
    return PromptSpec([NEEDLE.format(name=name, number=number) for number in numbers], question, numbers)


def needle_multiquery(context: TaskContext) -> PromptSpec:
    """The numbers of four keys at once (section 3.1, multi-queries)."""
    names, numbers = context.random.sample(NAMES, QUERIES), _numbers(context, QUERIES)
    needles = [NEEDLE.format(name=name, number=number) for name, number in zip(names, numbers, strict=True)]
    context.random.shuffle(needles)
    before = (
        f"Example:\n{NEEDLE.format(name='Zed', number=11111)}{NEEDLE.format(name='Yan', number=22222)}"
        "Question: which numbers are next to Yan and Zed in the text above?\n"
        "Answer: Yan: 22222, Zed: 11111\n\n"
    )
    question = (
        f"\n\nQuestion: which numbers are next to {_listed(names)} in the text above?\nAnswer: {names[0]}:"
    )
    return PromptSpec(needles, question, numbers, before)


def variable_tracking(context: TaskContext) -> PromptSpec:
    """All variables that have one value, along a chain of assignments (section 3.2): one chain, four hops."""
    names = _variables(context, HOPS + 1)
    value = _numbers(context, 1)[0]
    chain = [f"\n\nVAR {names[0]} = {value}\n\n"]
    chain += [f"\n\nVAR {new} = VAR {old}\n\n" for old, new in pairwise(names)]
    # An example, as RULER gives one; its names have vowels, so that no chain can have them.
    before = (
        "Example:\nVAR AEO = 77001\nVAR UOA = VAR AEO\nVAR IEA = VAR UOA\n"
        "Question: which 3 variables have the value 77001?\nAnswer: AEO, UOA, IEA\n\n"
    )
    question = f"\n\nQuestion: which {len(names)} variables have the value {value}?\nAnswer:"
    return PromptSpec(chain, question, tuple(names), before)


def inserted_fact(context: TaskContext) -> PromptSpec:
    """Where someone lives, who is one of four (section 3.4; the paragraphs are made up, not SQuAD's)."""
    people, cities = _full_names(context, PEOPLE), context.random.sample(CITIES, PEOPLE)
    facts = [_lives(person, city) for person, city in zip(people, cities, strict=True)]
    person, city = people[0], cities[0]
    context.random.shuffle(facts)
    question = f"\n\nQuestion: in which city does {person} live?\nAnswer: {person} lives in the city of"
    return PromptSpec(facts, question, (city,))


def inserted_facts_two_hops(context: TaskContext) -> PromptSpec:
    """Where someone's sister lives: two facts of three pairs (section 3.4; made up, not HotpotQA's)."""
    people, cities = _full_names(context, 6), context.random.sample(CITIES, 3)
    facts = [_lives(sister, city) for sister, city in zip(people[:3], cities, strict=True)]
    facts += [
        f"\n\nThe sister of {person} is called {sister}.\n\n"
        for sister, person in zip(people[:3], people[3:], strict=True)
    ]
    person, city = people[3], cities[0]
    context.random.shuffle(facts)
    question = (
        f"\n\nQuestion: in which city does the sister of {person} live?\n"
        f"Answer: The sister of {person} lives in the city of"
    )
    return PromptSpec(facts, question, (city,))


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("niah_single", needle_single, 16, fixed=True),
        Task("niah_multikey", needle_multikey, 16, fixed=True),
        Task("niah_lines", needle_lines, 16, fixed=True),
        Task("niah_multivalue", needle_multivalue, 48),
        Task("niah_multiquery", needle_multiquery, 72),
        Task("vt", variable_tracking, 40),
        Task("cwe", common_words, 56),
        Task("fwe", frequent_words, 32),
        Task("qa", inserted_fact, 8, fixed=True),
        Task("qa_hop", inserted_facts_two_hops, 8, fixed=True),
    )
}


def find_tasks(names: Sequence[str]) -> list[Task]:
    """Tasks by name, all of them if none is named. Raises ConfigError for an unknown name."""
    for name in names:
        if name not in TASKS:
            raise ConfigError(f"task={name!r} is not known; choose from {', '.join(TASKS)}")
    return [TASKS[name] for name in dict.fromkeys(names or TASKS)]


def _needles(context: TaskContext, n_keys: int) -> PromptSpec:
    names, numbers = context.random.sample(NAMES, n_keys), _numbers(context, n_keys)
    needles = [NEEDLE.format(name=name, number=number) for name, number in zip(names, numbers, strict=True)]
    context.random.shuffle(needles)
    return PromptSpec(needles, QUESTION.format(name=names[0]), (numbers[0],))


def _numbers(context: TaskContext, count: int) -> tuple[str, ...]:
    return tuple(str(number) for number in context.random.sample(range(10_000, 100_000), count))


def _variables(context: TaskContext, count: int) -> list[str]:
    found: set[str] = set()
    while len(found) < count:
        found.add("".join(context.random.sample(CONSONANTS, 3)))
    names = sorted(found)
    context.random.shuffle(names)
    return names


def _full_names(context: TaskContext, count: int) -> list[str]:
    """Two names each; no name in two of them."""
    names = context.random.sample(NAMES, 2 * count)
    return [f"{first} {last}" for first, last in zip(names[:count], names[count:], strict=True)]


def _new_full_name(context: TaskContext, seen: set[str]) -> str:
    """A name that is not in `seen`, and is from now on; of three parts where those of two become scarce."""
    parts = 2 if len(seen) < len(NAMES) ** 2 // 2 else 3
    while (name := " ".join(context.random.sample(NAMES, parts))) in seen:
        pass
    seen.add(name)
    return name


def _lives(person: str, city: str) -> str:
    return f"\n\n{person} lives in the city of {city}.\n\n"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}"
