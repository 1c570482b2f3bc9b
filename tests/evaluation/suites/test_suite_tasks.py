"""RULER's tasks: exact lengths, the answer in the text as often as the task says, and hand-made answers."""

import re
from collections import Counter
from dataclasses import replace
from pydoc_data.topics import topics

import pytest
import torch

from fulmen.data import Document, draw_sequences
from fulmen.data.lookup_words import NAMES
from fulmen.errors import ConfigError
from fulmen.evaluation.suites.ruler_tasks import TASKS, find_tasks
from fulmen.evaluation.suites.samples import make_sample
from fulmen.evaluation.suites.word_lists import REPEATS, vocabulary, zeta_counts

HAYSTACK = [Document(name, "prose", text) for name, text in topics.items() if len(text) > 12_000]
WORDS = vocabulary(HAYSTACK)


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return smollm2


@pytest.fixture(scope="module")
def text_ids(tokenizer):
    return draw_sequences(HAYSTACK, tokenizer, 4096, 1)[0].input_ids.tolist()


@pytest.fixture
def make(tokenizer, text_ids):
    def make_one(name, length=1024, number=0, seed=0):
        return make_sample(TASKS[name], text_ids, tokenizer, length, number=number, seed=seed, words=WORDS)

    return make_one


def text_before_question(tokenizer, sample):
    """Haystack and inserts, without an example before them and the question behind."""
    whole = tokenizer.decode(sample.prompt_ids)
    return whole.rpartition("\n\nQuestion: ")[0].rpartition("Answer: ")[2]


@pytest.mark.parametrize("length", [1024, 3000])
@pytest.mark.parametrize("name", TASKS)
def test_prompt_and_answer_are_exactly_as_long_as_asked(make, tokenizer, name, length):
    for number in range(3):
        sample = make(name, length, number)
        assert len(sample.prompt_ids) + sample.answer_tokens == length
        assert sample.prompt_ids.dtype == torch.int64
        assert (sample.task, sample.length, sample.number) == (name, length, number)
        for text in sample.expected:
            ids = tokenizer(f" {text},", add_special_tokens=False)["input_ids"]
            assert len(sample.expected) * len(ids) <= sample.answer_tokens
        if sample.answer_ids is not None:
            assert tokenizer.decode(sample.answer_ids) == f" {sample.expected[0]}"
            assert len(sample.answer_ids) <= sample.answer_tokens


@pytest.mark.parametrize("name", TASKS)
def test_seed_and_number_decide_the_sample(make, name):
    first, again = make(name), make(name)
    assert torch.equal(first.prompt_ids, again.prompt_ids)
    assert first.expected == again.expected
    for other in (make(name, seed=1), make(name, number=1)):
        assert not torch.equal(first.prompt_ids, other.prompt_ids)


@pytest.mark.parametrize(
    ("name", "needles"),
    [("niah_single", 1), ("niah_multikey", 4), ("niah_multivalue", 4), ("niah_multiquery", 4)],
)
def test_needles_are_there_once_each(make, tokenizer, name, needles):
    sample = make(name)
    text = text_before_question(tokenizer, sample)
    found = re.findall(r"The secret number of (\w+): (\d{5})\n", text)
    assert len(found) == len({number for _, number in found}) == needles
    assert all(text.count(number) == 1 for number in sample.expected)
    assert len({key for key, _ in found}) == (1 if name == "niah_multivalue" else needles)
    assert {number for _, number in found} >= set(sample.expected)


def test_the_key_that_is_asked_has_the_number_that_is_expected(make, tokenizer):
    for name in ("niah_single", "niah_multikey", "niah_lines"):
        sample = make(name)
        prompt = tokenizer.decode(sample.prompt_ids)
        key = re.search(r"next to ([\w ]+) in the text above\?\nAnswer", prompt)[1]
        assert f"The secret number of {key}: {sample.expected[0]}\n" in prompt
    sample = make("niah_multiquery")
    prompt = tokenizer.decode(sample.prompt_ids)
    keys = re.search(r"next to (\w+), (\w+), (\w+) and (\w+) in the text above\?\nAnswer", prompt)
    for key, number in zip(keys.groups(), sample.expected, strict=True):
        assert f"The secret number of {key}: {number}\n" in prompt


def test_lines_are_needles_only_and_no_key_is_there_twice(make, tokenizer):
    text = text_before_question(tokenizer, make("niah_lines", 2048))
    keys = re.findall(r"^The secret number of ([\w ]+): \d{5}$", text, re.MULTILINE)
    assert len(keys) == len(set(keys)) > 80
    assert all(set(key.split()) <= set(NAMES) for key in keys)


def test_variables_form_one_chain_in_order(make, tokenizer):
    sample = make("vt")
    text = text_before_question(tokenizer, sample)
    steps = re.findall(r"VAR (\w+) = (VAR \w+|\d{5})", text)
    assert [name for name, _ in steps] == list(sample.expected)
    assert [value for _, value in steps[1:]] == [f"VAR {name}" for name in sample.expected[:-1]]
    assert f"have the value {steps[0][1]}?" in tokenizer.decode(sample.prompt_ids)


@pytest.mark.parametrize(("length", "repeats"), [(512, REPEATS[1]), (4096, REPEATS[0])])
def test_common_words_occur_ten_times_as_often_as_others(make, tokenizer, length, repeats):
    sample = make("cwe", length)
    listed = tokenizer.decode(sample.prompt_ids).rpartition("List:")[2].partition("\n\nQuestion")[0]
    counts = Counter(listed.split())
    often, seldom = repeats
    assert {word for word, count in counts.items() if count == often} == set(sample.expected)
    assert set(counts.values()) == {often, seldom}
    assert len(sample.expected) == 10
    assert len(counts) > 30


def test_frequent_words_fall_as_zeta(make, tokenizer):
    sample = make("fwe", 2048)
    listed = tokenizer.decode(sample.prompt_ids).rpartition("Coded text:")[2].partition("\n\nQuestion")[0]
    counts = Counter(listed.split()).most_common()
    assert tuple(word for word, _ in counts[:3]) == sample.expected
    first = counts[0][1]
    assert [count for _, count in counts[:4]] == pytest.approx(
        [first, first / 4, first / 9, first / 16], abs=1
    )
    assert sum(zeta_counts(1000)) <= 1000


def test_facts_answer_the_question(make, tokenizer):
    sample = make("qa")
    prompt = tokenizer.decode(sample.prompt_ids)
    person = re.search(r"which city does ([\w ]+) live", prompt)[1]
    facts = dict(re.findall(r"\n\n(\w+ \w+) lives in the city of (\w+)\.", prompt))
    assert len(facts) == len(set(facts.values())) == 4
    assert (facts[person],) == sample.expected


def test_two_hops_need_both_facts(make, tokenizer):
    sample = make("qa_hop")
    prompt = tokenizer.decode(sample.prompt_ids)
    person = re.search(r"city does the sister of ([\w ]+) live", prompt)[1]
    sisters = dict(re.findall(r"The sister of ([\w ]+) is called ([\w ]+)\.", prompt))
    homes = dict(re.findall(r"\n\n(\w+ \w+) lives in the city of (\w+)\.", prompt))
    assert len(sisters) == len(homes) == 3
    assert person not in homes
    assert (homes[sisters[person]],) == sample.expected


def test_generated_answers_count_whole_words_in_any_order_on_their_line(make):
    sample = replace(make("niah_multivalue"), expected=("11111", "22222", "33333", "apple"))
    assert sample.share_found(" 33333, 22222 and 11111; Apple.") == 1
    assert sample.share_found("11111 33333") == 0.5
    assert sample.share_found("111112 apples") == 0
    assert sample.share_found("\n 11111\n22222") == 0.25
    assert sample.share_found("") == 0


def test_a_fixed_answer_must_come_first(make):
    sample = replace(make("qa"), expected=("Lima",))
    assert sample.share_found(" Lima.") == 1
    assert sample.share_found(" the city of Lima") == 0


def test_what_cannot_be_is_said(make):
    with pytest.raises(ConfigError, match=r"task='nihao' is not known; choose from niah_single, "):
        find_tasks(["qa", "nihao"])
    assert [task.name for task in find_tasks(["vt", "qa", "vt"])] == ["vt", "qa"]
    assert len(find_tasks([])) == len(TASKS) == 10
    for name in TASKS:
        with pytest.raises(ConfigError):
            make(name, 40)
