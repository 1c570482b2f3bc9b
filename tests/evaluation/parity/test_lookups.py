"""Look-ups by generation: what is written is what the model writes, what is counted is what was written."""

import json
from dataclasses import replace

import pytest
import torch

from fulmen.config import DsaConfig
from fulmen.data import Document, Lookup, LookupText, TokenSequence, lookup_texts
from fulmen.evaluation.journal import Journal
from fulmen.evaluation.parity.findings import lookup_verdict, short_summary, verdict
from fulmen.evaluation.parity.lookup_tables import lookup_tables
from fulmen.evaluation.parity.lookups import LookupPlan, is_right, lookup_units, write_answers
from fulmen.evaluation.parity.measure import measure_parity
from fulmen.evaluation.parity.plots import parity_plots
from fulmen.evaluation.parity.report import ParityReport
from fulmen.evaluation.parity.results import ParityResults
from fulmen.evaluation.statistics import clustered_difference_interval
from fulmen.evaluation.variants import (
    VARIANTS,
    VariantRunner,
    splits_topk,
    use_equal_topk,
    use_topk,
)
from fulmen.modeling.families import accelerated, family_for_type
from fulmen.modeling.selectors import dsa_attentions, use_selector
from tests.data.byte_tokenizer import byte_tokenizer
from tests.evaluation.parity.tiny_parity import random_ids, tiny_v32
from tests.evaluation.suites.tiny_suites import tiny_llama

LENGTH, TOPK = 420, 30
HELD_OUT = [
    Document(f"text {n}", kind, "".join(f"line {n} {m} of some text\n" for m in range(200)))
    for n, kind in enumerate(("code", "prose", "code", "prose"))
]


def tiny_dsa(ratios=(1.5, 0.5), **coarse):
    """A byte model with random indexers, whose layers keep different numbers of tokens."""
    torch.manual_seed(1)
    dsa = DsaConfig(TOPK, 4, 2, 8, (0, 1), ratios, **coarse)
    return family_for_type("llama").from_dense(tiny_llama(), dsa)


@pytest.fixture(scope="module", autouse=True)
def short_answers():
    """So that a random model, which does not stop, is soon done."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fulmen.evaluation.parity.lookups.MORE_TOKENS", 2)
        yield


@pytest.fixture(scope="module")
def model():
    return tiny_dsa()


@pytest.fixture(scope="module")
def plan():
    tokenizer = byte_tokenizer()
    texts = lookup_texts(HELD_OUT, tokenizer, LENGTH, 3, n_keys=2)
    return LookupPlan(texts, LENGTH, [20, 50], tokenizer)


def sequences(plan):
    """Some texts for the losses."""
    return [TokenSequence((f"text {n}",), "prose", random_ids(80, n), (0,)) for n in range(2)]


@pytest.fixture(scope="module")
def report(model, plan):
    return measure_parity(model, sequences(plan), lookups=plan, ks=[TOPK], topk=20)


def written_afresh(model, tokenizer, prompt_ids, count):
    """Greedy text by whole forward passes, up to the end of its line or EOS."""
    ids = prompt_ids
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids[None], use_cache=False).logits[0, -1:].argmax(-1)])
        text = tokenizer.decode(ids[len(prompt_ids) :])
        said = [line for line in text.split("\n")[:-1] if line.strip().rstrip("python") not in ("", "```")]
        if ids[-1] == tokenizer.eos_token_id or said:
            break
    return tokenizer.decode(ids[len(prompt_ids) :], skip_special_tokens=True)


@pytest.mark.parametrize("variant", ["dense", "key_head_oracle", "oracle", "dsa", "window"])
def test_what_is_written_is_what_whole_forwards_write(model, plan, variant):
    (text, *_), tokenizer = plan.texts, plan.tokenizer
    with accelerated(model), use_topk(model, 20), use_selector(model, VARIANTS[variant]):
        written = write_answers(model, text, tokenizer)
        for lookup, found in zip(text.lookups, written, strict=True):
            prompt_ids = torch.cat((text.prefix_ids, lookup.question_ids))
            count = len(lookup.answer_ids) + 2
            assert found == written_afresh(model, tokenizer, prompt_ids, count)


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ("12345", True),
        (" 12345.", True),
        ("The access code of Petra is 12345.", True),
        ("123456", False),
        ("912345", False),
        ("12 345", False),
        ("Sure:\n12345", False),
        ("\n\n```\n12345\n```", True),
        ("```python\n12345", True),
        ("```12345```", True),
        ("```\ndef f(a, b):\n    return 12345", False),
        ("", False),
    ],
)
def test_right_is_the_whole_answer_in_the_first_line_that_says_something(written, right):
    assert is_right(written, Lookup(torch.zeros(1), torch.zeros(1), "12345", 0.5)) is right


class TestEqualK:
    def test_every_layer_keeps_k_in_the_block_and_its_own_after_it(self, model):
        def kept():
            return [attention.layer_topk for attention in dsa_attentions(model)]

        assert splits_topk(model)
        assert kept() == [45, 15]
        with use_topk(model, 20), use_equal_topk(model):
            assert kept() == [20, 20]
        assert kept() == [45, 15]
        with pytest.raises(RuntimeError), use_equal_topk(model):
            raise RuntimeError
        assert kept() == [45, 15]

    def test_oracles_and_the_control_have_it_dsa_has_the_models_own(self, model):
        runner = VariantRunner(model, None)
        for name, expected in [("oracle", 20), ("key_head_oracle", 20), ("dsa_equal", 20), ("dsa", 30)]:
            with runner.running(name, 20, 0, ""):
                assert dsa_attentions(model)[0].layer_topk == expected, name

    def test_a_model_that_splits_nothing_has_no_such_variant(self, plan):
        equal = tiny_dsa(())
        assert not splits_topk(equal)
        assert "dsa_equal" not in VariantRunner(equal, None).variants
        assert not [unit for unit in lookup_units(VariantRunner(equal, None), plan) if "equal" in unit.key[1]]


def test_which_units_there_are(model, plan):
    tasks = [(unit.key[1], unit.key[3]) for unit in lookup_units(VariantRunner(model, None), plan)]
    assert len(set(tasks)) == len(tasks)
    for variant in ("oracle", "dsa_equal", "dsa", "window"):
        for k in (20, 50):
            assert [n for task, n in tasks if task == f"{variant} {k}"] == [0, 1, 2]
    assert [n for task, n in tasks if task == f"dense {LENGTH}"] == [0, 1, 2]
    assert [n for task, n in tasks if task == "key_head_oracle 20"] == [0, 1]


def test_stock_mla_models_answer_too():
    text_ids, question_ids = random_ids(60, 1), random_ids(3, 2)
    text = LookupText("a", "prose", text_ids, (Lookup(question_ids, random_ids(2, 3), "x", 0.5),))
    mla, tokenizer = tiny_v32(12), byte_tokenizer()
    runner = VariantRunner(mla, None)
    units = lookup_units(runner, LookupPlan([text], 64, [12], tokenizer))
    assert [unit.key[1].split()[0] for unit in units] == ["dense", "oracle", "dsa", "window"]
    with accelerated(mla):
        assert all(len(unit.run()["right"]) == 1 for unit in units)


def record(variant, k, text, *right):
    return {"variant": variant, "k": k, "text": text, "right": [bool(one) for one in right], "written": []}


@pytest.fixture
def counted(plan):
    two = replace(plan, texts=plan.texts[:2], ks=[20])
    records = [
        *(record("dense", LENGTH, 0, 1, 1, 1), record("dense", LENGTH, 1, 1, 1, 0)),
        *(record("key_head_oracle", 20, 0, 1, 1, 1),),
        *(record("oracle", 20, 0, 1, 1, 1), record("oracle", 20, 1, 1, 0, 0)),
        *(record("dsa_equal", 20, 0, 1, 1, 0), record("dsa_equal", 20, 1, 1, 0, 0)),
        *(record("dsa", 20, 0, 1, 0, 0), record("dsa", 20, 1, 1, 0, 1)),
        *(record("window", 20, 0, 0, 0, 0), record("window", 20, 1, 0, 0, 0)),
    ]
    return lookup_tables(two, records)


def test_answers_are_counted_lost_gained_and_split(counted):
    (row,) = counted["differences"]
    assert (row["lost"], row["gained"], row["n"], row["texts"]) == (3, 1, 6, 2)
    assert row["split"] == pytest.approx({"budget": -100 / 6, "index": -100 / 6, "split_of_k": 0})
    assert sum(row["split"].values()) == pytest.approx(row["dsa_minus_dense"]["estimate"])
    expected = clustered_difference_interval([1, 0, 0, 1, 0, 1], [1, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1])
    assert row["dsa_minus_dense"]["low"] == pytest.approx(100 * expected.low)
    few = next(row for row in counted["rows"] if row["variant"] == "key_head_oracle")
    assert (few["right"], few["n"], few["texts"], few["dense_right"]) == (3, 3, 1, 3)


def test_a_coarse_level_is_told_apart_where_it_was_asked(plan):
    few = replace(plan, texts=plan.texts[:1], ks=[20, 10])
    records = [record("dense", LENGTH, 0, 1, 1, 1)]
    for k, dsa in ((20, (1, 1, 0)), (10, (1, 0, 0))):
        records += [record("oracle", k, 0, 1, 1, 1), record("dsa", k, 0, *dsa)]
    records += [record("dsa_equal", 10, 0, 1, 0, 1), record("one_level", 10, 0, 1, 1, 0)]
    not_asked, asked = (row["split"] for row in lookup_tables(few, records)["differences"])
    assert not_asked == pytest.approx({"budget": 0, "index": -100 / 3, "split_of_k": 0})
    assert asked == pytest.approx({"budget": 0, "index": -100 / 3, "split_of_k": 0, "coarse": -100 / 3})


def test_one_level_answers_where_a_coarse_level_is_asked(plan):
    runner = VariantRunner(tiny_dsa(coarse_head_dim=8, coarse_n_heads=4, candidate_factor=2), None)
    asked = [unit.key[1] for unit in lookup_units(runner, replace(plan, ks=[60, 20]))]
    assert asked.count("one_level 20") == len(plan.texts)  # of more than 160 tokens
    assert "one_level 60" not in asked  # of more than 480


def results(over, lookups=None, quick=False):
    row = {"worse_kind": "code", "by_kind": {"code": {"over_dense": over}}}
    return ParityResults(100, 10, [], {"dsa": row}, {}, [], {}, {}, None, lookups=lookups, quick=quick)


def answered(estimate, low, high, dense=120):
    gap = {"estimate": estimate, "low": low, "high": high}
    lost = {"k": 10, "n": 128, "texts": 8, "lost": 3, "gained": 1, "dsa_minus_dense": gap}
    rows = [{"variant": "dense", "k": 100, "right": dense, "n": 128}]
    return {"length": 100, "rows": rows, "differences": [lost]}


FINE = {"estimate": 0.002, "low": 0.001, "high": 0.004}
WORSE = {"estimate": 0.05, "low": 0.04, "high": 0.06}


@pytest.mark.parametrize(
    ("over", "lookups", "words"),
    [
        (FINE, answered(-1.6, -4.0, 0.8), "Parity: "),
        (FINE, answered(-19.0, -30.0, -8.0), "No parity: "),
        (FINE, answered(-5.5, -11.0, -0.5), "No parity: "),
        (FINE, answered(-3.0, -9.0, 3.0), "Not shown: "),
        (FINE, answered(-3.0, None, None), "Not shown: "),
        (FINE, answered(0.0, -1.0, 1.0, dense=10), "Not shown: "),
        (FINE, None, "Not shown: "),
        (WORSE, answered(0.0, -3.0, 3.0), "No parity: "),
    ],
)
def test_the_verdict_needs_the_answers_too(over, lookups, words):
    text = verdict(results(over, lookups))
    assert text.startswith(words), text
    assert ("no question was asked" in text) == (lookups is None)
    assert verdict(results(over, lookups, quick=True)).startswith("A quick look. ")


def test_the_verdict_is_on_the_models_own_k():
    lookups = answered(-1.0, -3.0, 1.0)
    worse = {
        **lookups["differences"][0],
        "k": 5,
        "dsa_minus_dense": {"estimate": -40, "low": -50, "high": -30},
    }
    lookups["differences"].append(worse)
    assert verdict(results(FINE, lookups)).startswith("Parity: ")
    lookups["differences"][0] = {**lookups["differences"][0], "k": 20}
    assert verdict(results(FINE, lookups)).startswith("No parity: ")


def test_it_reads_everywhere(report, plan):
    assert set(report.variants) == {"dense", "oracle", "dsa_equal", "dsa", "window", "random"}
    header, *rows = short_summary(report)
    assert header[-2:] == ("answers at k = 50", "answers at k = 20")
    assert [row[-1] != "" for row in rows] == [True, True, True, True, True, False]
    said = lookup_verdict(report)
    for words in (
        "behind two worked examples",
        "6 questions about 3 texts",
        "At k = 20 (4.8 %)",
        "split of k",
    ):
        assert words in said
    assert said in report.findings()
    for page in (report.to_markdown(), report.to_html()):
        for words in ("oracle per key head", "DSA, equal k in each layer", "50 (11.9 %)"):
            assert words in page
    assert "lookups" in [plot.name for plot in parity_plots(report)]
    assert ParityReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_the_loss_is_split_as_the_answers_are(report):
    split, loss = report.error_split, {name: row["second_half"] for name, row in report.variants.items()}
    assert split["budget"] + split["indexer"] + split["split_of_k"] == pytest.approx(
        loss["dsa"] - loss["dense"]
    )
    assert split["split_of_k"] == pytest.approx(loss["dsa"] - loss["dsa_equal"])


def test_an_interrupted_run_goes_on_and_reads_nothing_twice(model, plan, report, tmp_path):
    path, read, first = tmp_path / "journal.jsonl", [], []

    def stop(done, total, what):
        read.append(done)
        first[:] = done, total
        if len(read) == 25:
            raise KeyboardInterrupt

    def measured(progress):
        return measure_parity(
            model,
            sequences(plan),
            lookups=plan,
            ks=[TOPK],
            topk=20,
            journal=Journal(path, {"model": "tiny"}),
            progress=progress,
        )

    with pytest.raises(KeyboardInterrupt):
        measured(stop)
    assert len(path.read_text().splitlines()) > 5
    left = []
    assert measured(lambda done, total, what: left.append((done, total))) == report
    assert left[0] == (0, left[-1][0])
    assert left[-1][0] == left[-1][1] < first[1] - read[-1] / 2
