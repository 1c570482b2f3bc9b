"""The suites on a tiny model: against plain forwards and `generate`, resumed, and their tables and files."""

import json
import re
from dataclasses import replace
from pydoc_data.topics import topics

import pytest
import torch
from transformers import LlamaForCausalLM

from fulmen.config import DsaConfig
from fulmen.data import Document, draw_sequences
from fulmen.data.sequences import common_start
from fulmen.errors import ConfigError, OutputError, ResumeError, UnsupportedModelError
from fulmen.evaluation.greedy import answer_by_forward
from fulmen.evaluation.journal import Journal, Unit
from fulmen.evaluation.provenance import about_run
from fulmen.evaluation.suites import catalog
from fulmen.evaluation.suites.catalog import all_suites, find_suite, suite_names
from fulmen.evaluation.suites.catalog.generate import generation_tables, generation_units, repeated_share
from fulmen.evaluation.suites.catalog.keyloss import (
    key_tokens,
    keyloss_tables,
    keyloss_units,
    short_context,
    short_context_losses,
)
from fulmen.evaluation.suites.catalog.ruler import ruler_tables, ruler_verdict
from fulmen.evaluation.suites.catalog.short import short_lengths
from fulmen.evaluation.suites.lm_eval_bridge import evaluate_with_lm_eval
from fulmen.evaluation.suites.losses import require_plain_head, token_losses
from fulmen.evaluation.suites.report import SuiteReport
from fulmen.evaluation.suites.responders import LocalResponder
from fulmen.evaluation.suites.ruler_tasks import TASKS
from fulmen.evaluation.suites.run import SuitePlan, run_suites
from fulmen.evaluation.suites.samples import make_sample
from fulmen.evaluation.wording import markdown_table
from fulmen.modeling.families import family_for_type
from fulmen.modeling.selectors import dsa_attentions
from tests.data.byte_tokenizer import byte_tokenizer
from tests.evaluation.parity.tiny_parity import random_ids, tiny_v32
from tests.evaluation.suites.tiny_suites import VOCAB, tiny_llama

HELD_OUT = [Document(name, "prose", text) for name, text in topics.items() if len(text) > 12_000]
TOPK, LENGTH = 48, 448
PLAN = SuitePlan(
    suites=("ruler", "keyloss", "short", "generate"),
    lengths=(LENGTH,),
    samples=2,
    tasks=("niah_single", "niah_multivalue"),
    seed=3,
)

PARROT = """
from fulmen.evaluation.journal import Unit
from fulmen.evaluation.suites.suite import Section, Suite

class Parrot(Suite):
    name, order = "parrot", 99

    def units(self, responder, tokenizer, documents, sizes):
        (length,) = sizes.lengths
        keys = [("parrot", "", length, number) for number in range(sizes.samples)]
        return [Unit(key, length, lambda: {"said": length}) for key in keys]

    def tables(self, records, *, topk, seed):
        return {"said": [record["said"] for record in records]}

    def section(self, tables):
        return Section("Parrot", (f"It says {', '.join(map(str, tables['said']))}.",), [("nothing",)])

SUITE = Parrot()
"""


def small_plan(*suites, lengths=(64,), samples=1, tasks=()):
    return SuitePlan(suites=suites, lengths=lengths, samples=samples, tasks=tasks)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def dense():
    return tiny_llama()


@pytest.fixture(scope="module")
def responder(dense, tokenizer):
    torch.manual_seed(1)
    model = family_for_type("llama").from_dense(dense, DsaConfig(TOPK, 4, 2, 4, (0, 1)))
    return LocalResponder(model.eval(), tokenizer)


@pytest.fixture(scope="module")
def texts(tokenizer):
    return draw_sequences(HELD_OUT, tokenizer, LENGTH, 3)


@pytest.fixture(scope="module")
def tables(responder, tokenizer, tmp_path_factory):
    journal = Journal(tmp_path_factory.mktemp("whole") / "samples.jsonl", {"model": "tiny"})
    return run_suites(responder, tokenizer, HELD_OUT, PLAN, journal).suites


@pytest.fixture(scope="module")
def report(tables):
    return SuiteReport(tables, about_run("tiny <model>", ["/usr/bin/fulmen", "eval", "tiny"]))


def stock_losses(model, ids_T):
    with torch.no_grad():
        logits = model(ids_T[None], use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids_T[1:], reduction="none")


class TestSubjects:
    def test_variants_are_the_dense_model_and_the_converted_one(self, responder, dense, texts):
        prompt = texts[0].input_ids[:150]
        for variant, model in (("dense", dense), ("dsa", responder.model)):
            expected = model.generate(prompt[None], max_new_tokens=12, do_sample=False, eos_token_id=None)
            assert responder.continue_text(prompt, 12, variant) == expected[0, 150:].tolist()
        assert responder.variants == ("dense", "dsa", "window")
        assert LocalResponder(dense, responder.tokenizer).variants == ("dense",)

    def test_a_source_answers_as_dense_and_the_model_itself_sparsely(self, responder, dense, texts):
        torch.manual_seed(2)
        source, ids_T = tiny_llama(), texts[0].input_ids[:90]
        with torch.no_grad():
            source.lm_head.weight.mul_(-1)
        asked = LocalResponder(responder.model, responder.tokenizer, source=source)
        assert asked.variants == responder.variants
        expected = {"dense": stock_losses(source, ids_T), "dsa": responder.losses(ids_T, "dsa")}
        for variant, loss_P in expected.items():
            torch.testing.assert_close(asked.losses(ids_T, variant), loss_P)
            written = (LocalResponder(source, None) if variant == "dense" else responder).continue_text(
                ids_T, 8, variant
            )
            assert asked.continue_text(ids_T, 8, variant) == written
        assert asked.continue_text(ids_T, 8, "dense") != responder.continue_text(ids_T, 8, "dense")

    def test_selectors_are_as_before_afterwards(self, responder, texts):
        before = [attention.selector for attention in dsa_attentions(responder.model)]
        responder.hidden(texts[0].input_ids, "window")
        assert [attention.selector for attention in dsa_attentions(responder.model)] == before

    def test_one_forward_writes_what_greedy_decoding_writes(self, responder, dense, texts):
        prompt = texts[0].input_ids[:100]
        greedy = torch.tensor(LocalResponder(dense, None).continue_text(prompt, 6, "dense"))
        assert answer_by_forward(dense, prompt, greedy) == greedy.tolist()
        for place in range(6):
            wrong = greedy.clone()
            wrong[place] = (wrong[place] + 1) % VOCAB
            assert answer_by_forward(dense, prompt, wrong) == greedy[: place + 1].tolist()

    def test_an_answer_ends_with_its_line_and_when_all_is_found(self, responder, tokenizer, texts):
        ids = texts[0].input_ids.tolist()
        sample = make_sample(TASKS["niah_multivalue"], ids, tokenizer, LENGTH)
        whole = tokenizer.decode(responder.continue_text(sample.prompt_ids, sample.answer_tokens, "dense"))
        answer = responder.answer(sample, "dense")
        assert whole.startswith(answer)
        word = re.search(r"\w+", whole)[0]
        found = replace(sample, expected=(word,), stop="\0")
        assert responder.answer(found, "dense").rstrip().endswith(word)
        assert found.share_found(responder.answer(found, "dense")) == 1

    def test_a_stock_mla_model_has_the_same_variants(self):
        stock, ids_T = tiny_v32(), random_ids(80)
        responder = LocalResponder(stock, None)
        for variant in responder.variants:
            (written,) = responder.continue_text(ids_T, 1, variant)
            last_C = responder.hidden(ids_T, variant)[-1]
            assert written == stock.get_output_embeddings()(last_C).argmax()
        with torch.no_grad():
            assert responder.continue_text(ids_T, 1, "dsa") == [stock(ids_T[None]).logits[0, -1].argmax()]
        gap = responder.hidden(ids_T, "dense") - responder.hidden(ids_T, "dsa")
        assert gap[:12].abs().max() < 1e-5 < gap[12:].abs().max()
        assert len(responder.continue_text(ids_T, 5, "dsa")) == 5

    def test_a_topk_needs_dsa(self, dense, tokenizer):
        with pytest.raises(ConfigError, match="has no DSA"):
            LocalResponder(dense, tokenizer, topk=5)

    def test_common_start(self):
        assert common_start([1, 2, 3], [1, 2, 4]) == 2
        assert common_start([1, 2], [1, 2, 4]) == 2
        assert common_start([], [1]) == 0


SETTINGS = {"model": "a", "seed": 0}


class TestJournal:
    def units(self, done, count=4):
        def unit(number):
            def run():
                done.append(number)
                return {"value": number / 3}

            return Unit(("s", "t", 10, number), 10, run)

        return [unit(number) for number in range(count)]

    def test_what_is_done_is_not_done_again(self, tmp_path):
        path, done, calls = tmp_path / "new" / "samples.jsonl", [], []
        first = Journal(path, SETTINGS).run(self.units(done, 2))
        again = Journal(path, SETTINGS).run(self.units(done, 4), lambda *call: calls.append(call))
        assert done == [0, 1, 2, 3]
        assert again[:2] == first
        assert again[3] == {"suite": "s", "task": "t", "length": 10, "number": 3, "value": 1.0}
        assert calls == [(10, 20, "s t 10, 3"), (20, 20, "s t 10, 4")]

    def test_a_line_cut_short_is_done_again(self, tmp_path):
        path, done = tmp_path / "samples.jsonl", []
        whole = Journal(path, SETTINGS).run(self.units(done))
        path.write_text(path.read_text()[:-9])
        assert Journal(path, SETTINGS).run(self.units(done)) == whole
        assert done == [0, 1, 2, 3, 3]
        assert len(path.read_text().splitlines()) == 5
        assert list(tmp_path.iterdir()) == [path]

    def test_an_interrupted_run_goes_on(self, tmp_path):
        path, done = tmp_path / "samples.jsonl", []
        units = self.units(done)

        def stop():
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Journal(path, SETTINGS).run([*units[:2], units[2]._replace(run=stop)])
        Journal(path, SETTINGS).run(units)
        assert done == [0, 1, 2, 3]

    def test_other_settings_are_refused(self, tmp_path):
        path = tmp_path / "samples.jsonl"
        Journal(path, SETTINGS)
        with pytest.raises(ResumeError, match=r"another run \(seed was 0, is 1\); remove it") as caught:
            Journal(path, {**SETTINGS, "seed": 1})
        assert "\n" not in str(caught.value)

    def test_places_that_cannot_be(self, tmp_path):
        (tmp_path / "file").write_text("text\n")
        with pytest.raises(ResumeError, match="holds no results of fulmen"):
            Journal(tmp_path / "file", SETTINGS)
        with pytest.raises(OutputError, match="cannot be written"):
            Journal(tmp_path / "file" / "samples.jsonl", SETTINGS)


class TestRun:
    def test_tables_are_plain_json(self, tables):
        assert json.loads(json.dumps(tables, allow_nan=False)) == tables
        assert list(tables) == list(PLAN.suites)

    def test_interrupted_and_resumed_gives_the_same(self, responder, tokenizer, tables, tmp_path):
        path, read = tmp_path / "samples.jsonl", []

        def stop_half_way(done, total, what):
            read.append(what)
            if done > total / 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_suites(responder, tokenizer, HELD_OUT, PLAN, Journal(path, {}), stop_half_way)
        first = len(read)
        resumed = run_suites(
            responder, tokenizer, HELD_OUT, PLAN, Journal(path, {}), lambda *done: read.append(done[2])
        )
        assert resumed.suites == tables
        assert 0 < first < len(read) == len(set(read))

    def test_more_samples_keep_the_first_ones(self, responder, tokenizer, tmp_path):
        path, read = tmp_path / "samples.jsonl", []
        plan = small_plan("ruler", lengths=(LENGTH,), tasks=("niah_single",))
        for samples in (1, 3):
            more = replace(plan, samples=samples)
            journal = Journal(path, {})
            run_suites(responder, tokenizer, HELD_OUT, more, journal, lambda *done: read.append(done[2]))
        assert [what[-1] for what in read] == ["1", "2", "3"]

    def test_ruler_asks_every_variant_the_same(self, tables):
        cells = tables["ruler"]["cells"]
        assert len(cells) == 2 * 3
        assert all(cell["n"] == 2 for cell in cells)

    def test_what_a_model_cannot_run_is_said(self, dense, tokenizer, tmp_path):
        plain, journal = LocalResponder(dense, tokenizer), Journal(tmp_path / "samples.jsonl", {})
        with pytest.raises(ConfigError, match="suite='short' compares DSA with dense, and this model has no"):
            run_suites(
                plain, tokenizer, HELD_OUT, SuitePlan(suites=("short",), lengths=(64,), samples=1), journal
            )
        with pytest.raises(ConfigError, match="length=4096 is beyond the model's context of 1024 tokens"):
            run_suites(
                plain, tokenizer, HELD_OUT, SuitePlan(suites=("ruler",), lengths=(4096,), samples=1), journal
            )

    def test_every_suite_is_found_by_its_modules_name(self):
        assert [suite.name for suite in all_suites()] == ["ruler", "keyloss", "short", "generate"]
        assert suite_names() == sorted(suite.name for suite in all_suites())
        assert len({suite.order for suite in all_suites()}) == len(all_suites())

    def test_one_more_file_is_one_more_suite(self, responder, tokenizer, tmp_path, monkeypatch):
        (tmp_path / "parrot.py").write_text(PARROT)
        monkeypatch.setattr(catalog, "__path__", [*catalog.__path__, str(tmp_path)])
        assert "parrot" in suite_names()
        assert all_suites()[-1].name == "parrot"
        journal = Journal(tmp_path / "samples.jsonl", {})
        report = run_suites(responder, tokenizer, HELD_OUT, small_plan("parrot", samples=2), journal)
        assert report.suites == {"parrot": {"said": [64, 64]}}
        assert "## Parrot\n\nIt says 64, 64." in report.to_markdown()
        assert "It says 64, 64." in report.to_html()

    def test_plans_that_cannot_be(self):
        with pytest.raises(ConfigError, match="suite='rule' is not known; choose from ruler, keyloss"):
            small_plan("rule")
        with pytest.raises(ConfigError, match="samples=0 cannot be"):
            small_plan("ruler", samples=0)
        with pytest.raises(ConfigError, match="task='x' is not known"):
            small_plan("ruler", tasks=("x",))

    def test_a_plain_model_runs_the_suites_that_need_no_dsa(self, dense, tokenizer, tmp_path):
        plan = SuitePlan(
            suites=("ruler", "keyloss", "generate"), lengths=(LENGTH,), samples=1, tasks=("niah_single",)
        )
        journal = Journal(tmp_path / "samples.jsonl", {})
        report = run_suites(LocalResponder(dense, tokenizer), tokenizer, HELD_OUT, plan, journal)
        assert report.suites["ruler"]["differences"] == []
        assert all(len(set(map(len, rows))) == 1 for _, _, rows in report.sections())


class TestRulerTables:
    def records(self, dense, dsa, task="t", length=100):
        return [
            {
                "task": task,
                "length": length,
                "number": number,
                "answers": {"dense": {"found": a}, "dsa": {"found": b}},
            }
            for number, (a, b) in enumerate(zip(dense, dsa, strict=True))
        ]

    def test_shares_and_differences_by_hand(self):
        tables = ruler_tables(self.records([1, 1, 1, 0.5], [1, 0.75, 1, 1]), topk=50)
        dense, dsa = tables["cells"]
        assert (dense["right"], dense["n"], dense["found"]) == (3, 4, 0.875)
        assert (dsa["right"], dsa["found"]) == (3, 0.9375)
        # Wilson's limits of 3 of 4, as published tables have them.
        assert (dense["share"]["low"], dense["share"]["high"]) == pytest.approx((0.3006, 0.9544), abs=1e-4)
        (gap,) = tables["differences"]
        assert (gap["estimate"], gap["only_dsa"], gap["only_dense"], gap["p"]) == (0, 1, 1, 1)
        assert gap["found"]["estimate"] == 6.25

    def test_only_telling_cells_are_pooled(self):
        records = [
            *self.records([1, 1], [1, 0], "good"),
            *self.records([0, 0.5], [1, 1], "dense cannot"),
            *self.records([1, 1], [1, 1], "short", length=50),
        ]
        tables = ruler_tables(records, topk=50)
        assert (tables["pooled"]["n"], tables["pooled"]["estimate"]) == (2, -50)
        assert [row["dense_can"] for row in tables["differences"]] == [True, False, True]
        assert [row["is_sparse"] for row in tables["differences"]] == [True, True, False]
        notes = [row[-1] for row in find_suite("ruler").section(tables).rows]
        assert notes == ["note", "", "dense cannot", "k covers it"]
        assert ruler_verdict(ruler_tables(records[2:], topk=50)).startswith("Nothing was tested")


class TestKeyLoss:
    def test_short_context_losses_are_those_of_cut_texts(self, responder, dense, texts):
        ids_T, short = texts[0].input_ids, 32
        losses = short_context_losses(responder, ids_T, short)
        assert losses.shape == (LENGTH - 1,)
        for place in (5, 40, 63, 64, 150, LENGTH - 2):
            start = max(place // short * short - short, 0)
            cut = stock_losses(dense, ids_T[start : place + 2])
            assert losses[place] == pytest.approx(cut[-1].item(), abs=1e-4)

    def test_token_losses_are_the_stock_models(self, responder, dense, texts):
        ids_T = texts[1].input_ids
        head = responder.model.get_output_embeddings()
        torch.testing.assert_close(
            token_losses(responder.hidden(ids_T, "dense"), head, ids_T), stock_losses(dense, ids_T)
        )

    def test_key_tokens_gain_and_are_foretold(self):
        long = torch.tensor([0.5, 0.5, 2.5, 1.9])
        short = torch.tensor([3.0, 2.0, 9.0, 4.0])
        assert key_tokens(long, short).tolist() == [True, False, False, True]

    def test_sums_are_over_the_second_half(self, responder, dense, texts, tmp_path):
        (record,) = Journal(tmp_path / "j", {}).run(keyloss_units(responder, texts[:1]))
        losses = stock_losses(dense, texts[0].input_ids)
        assert record["tokens"]["plain"] == LENGTH // 2 - 1
        assert record["losses"]["dense"]["plain"] == pytest.approx(
            losses[LENGTH // 2 :].sum().item(), abs=1e-3
        )
        short = short_context_losses(responder, texts[0].input_ids, short_context(LENGTH))
        key_P = key_tokens(losses, short)[LENGTH // 2 :]
        assert record["tokens"]["key"] == int(key_P.sum())
        expected = losses[LENGTH // 2 :][key_P].sum().item()
        assert record["losses"]["dense"]["key"] == pytest.approx(expected, abs=1e-3)

    def test_tables_add_up(self):
        records = [
            {
                "length": 10,
                "tokens": {"plain": 4, "key": key},
                "losses": {"dense": {"plain": 8.0, "key": key}, "dsa": {"plain": 8.4, "key": 1.5 * key}},
            }
            for key in (0, 1, 2)
        ]
        plain, key = keyloss_tables(records)["rows"]
        assert (plain["tokens"], key["tokens"]) == (12, 3)
        assert plain["losses"]["dense"]["loss"] == 2
        assert plain["losses"]["dsa"]["over_dense"]["estimate"] == pytest.approx(0.05)
        assert key["losses"]["dsa"]["over_dense"]["estimate"] == pytest.approx(0.5)
        assert key["losses"]["dsa"]["loss"] == pytest.approx(1.5)

    def test_no_key_tokens_is_a_row_without_losses(self):
        record = {"length": 10, "tokens": {"plain": 4, "key": 0}}
        record["losses"] = {"dense": {"plain": 8.0, "key": 0.0}, "dsa": {"plain": 8.4, "key": 0.0}}
        tables = keyloss_tables([record])
        assert tables["rows"][1]["losses"] == {}
        assert "none" in markdown_table(find_suite("keyloss").section(tables).rows)

    def test_a_model_that_scales_its_logits_is_refused(self, dense):
        class Scaled(LlamaForCausalLM):
            def forward(self, *args, **kwargs):
                output = super().forward(*args, **kwargs)
                output.logits = output.logits / 2
                return output

        scaled = Scaled(dense.config).eval()
        with pytest.raises(UnsupportedModelError, match="Scaled changes its logits"):
            require_plain_head(scaled)
        require_plain_head(dense)


class TestShortAndGeneration:
    def test_lengths_lie_around_k(self):
        assert short_lengths(256, 8448) == [128, 256, 257, 320, 512]
        assert short_lengths(48, None) == [24, 48, 49, 60, 96]
        assert short_lengths(256, 300) == [128, 256, 257]

    def test_up_to_k_equal_and_beyond_not(self, tables):
        rows = {row["length"]: row for row in tables["short"]["rows"]}
        assert list(rows) == [24, 48, 49, 60, 96]
        for length, row in rows.items():
            assert row["must_be_equal"] == (length <= TOPK)
            assert (row["max_difference"] == 0) == (length <= TOPK)
            assert row["unequal"] == (0 if length <= TOPK else 2)

    def test_repeated_share(self):
        assert repeated_share([1, 2, 3, 4, 5, 6, 7]) == 0
        assert repeated_share([1] * 13) == 0.9
        assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
        assert repeated_share([1, 2]) == 0

    @pytest.mark.parametrize("length", [1, 63, 64])
    def test_a_length_without_room_for_a_prompt(self, length):
        with pytest.raises(ConfigError, match=f"length={length} leaves no prompt before the 64 tokens"):
            generation_units(None, [], length)

    def test_agreement_is_counted_by_hand(self, responder, texts, tmp_path):
        units = generation_units(responder, texts[:2], LENGTH, new_tokens=10)
        records = Journal(tmp_path / "j", {}).run(units)
        for record, window in zip(records, texts, strict=False):
            prompt = window.input_ids[: LENGTH - 10]
            dense, dsa = (responder.continue_text(prompt, 10, name) for name in ("dense", "dsa"))
            same = 0
            while same < 10 and dense[same] == dsa[same]:
                same += 1
            assert record["agreed"] == {"dense": 10, "dsa": same}
            assert record["whole"] == {"dense": True, "dsa": same == 10}
        dense, dsa = generation_tables(records)["rows"]
        assert (dense["agreed_median"], dense["agreed_to_the_end"]) == (10, 2)
        assert dsa["agreed_median"] == sum(record["agreed"]["dsa"] for record in records) / 2


class TestFiles:
    def test_markdown_has_every_suite(self, report):
        text = report.to_markdown()
        for words in (
            "RULER's tasks",
            "Loss on key tokens",
            "Short texts",
            "Generation",
            "| niah_single | 448 |",
        ):
            assert words in text
        assert "Up to k = 48 tokens DSA is the dense model, logit by logit." in text
        assert "dense cannot" in text
        assert "- machine: " in text

    def test_page_has_tables_and_figures(self, report):
        html = report.to_html()
        assert html == SuiteReport.from_dict(json.loads(json.dumps(report.to_dict()))).to_html()
        names = [plot.name for plot in report.plots()]
        assert names == ["ruler-448", "ruler-differences"]
        assert all(f'<figure id="{name}">' in html for name in names)
        assert html.count("<table>") == 4
        assert "tiny &lt;model&gt;" in html
        assert "http" not in html.replace("http://www.w3.org", "")

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({}, "no report of suites: suites missing"),
            ({"suites": {"rule": {}}}, "suite='rule' is not known"),
        ],
    )
    def test_what_is_no_report_is_refused_by_name(self, values, words):
        with pytest.raises(ConfigError, match=words):
            SuiteReport.from_dict(values)

    def test_an_accidental_difference_below_k_is_a_regression(self, report):
        tables = json.loads(json.dumps(report.suites["short"]))
        tables["rows"][0].update(unequal=1, max_difference=0.1)
        (note,) = find_suite("short").section(tables).notes
        assert note.startswith("Regression: DSA differs from dense at 24 tokens")


def test_lm_eval_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.models.huggingface", None)
    with pytest.raises(ConfigError, match=r"lm_eval cannot be imported .*; install it: pip install lm-eval"):
        evaluate_with_lm_eval(None, None, ["hellaswag"])
