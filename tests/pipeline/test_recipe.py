"""A recipe from its file to its page: what is done, in which order, once, and with which data."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fulmen.errors import ConfigError, OutputError, ResumeError
from fulmen.modeling.rollouts import Rollout
from fulmen.pipeline.answers import Answerer, open_model
from fulmen.pipeline.recipe import RecipeRun
from fulmen.pipeline.recipe_settings import Rejection, read_recipe
from fulmen.pipeline.recipe_stages import RecipeStages
from fulmen.pipeline.rejection import (
    RejectionCounts,
    filled_up,
    kept_lessons,
    lessons_of,
    own_answers,
    read_journal,
    sample_task,
)
from fulmen.pipeline.reporter import SilentReporter
from fulmen.tasks import named
from fulmen.tasks.base import HELD_OUT, TURN
from fulmen.tasks.split import text_of, text_of_messages
from fulmen.training.prompts import ends_of, pad_of
from tests.pipeline.tiny_runs import LENGTH

CPU = torch.device("cpu")
# Which words the prompt has tells the answer: learned in some steps.
TASKS = """
import random

def say(index, low=10, high=50):
    words = [f"w{random.Random(f'{index} {place}').randrange(low, high)}" for place in range(2)]
    right = "w60" if low < 50 else "w61"
    return {
        "prompt": [{"role": "user", "content": " ".join(words)}],
        "answer": right,
        "score": lambda reply: float(reply.strip() == right),
    }

def ask(index):
    return {name: value for name, value in say(index).items() if name != "answer"}
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    file = tmp_path_factory.mktemp("tasks") / "mine.py"
    file.write_text(TASKS)
    return f"python:{file}:say"


@pytest.fixture
def asked(task, llama_dir, corpus_dir):
    sft = {"steps": 40, "problems": 40, "batch": 4, "learning_rate": 0.005, "lora": None}
    return {
        "base": str(llama_dir),
        "convert": {"topk": 8, "stages": "inherit", "length": LENGTH, "data": str(corpus_dir)},
        "sft": sft,
        "rl": {"steps": 3},
        "max_new_tokens": 3,
        "domains": {
            "low": {"tasks": [f"{task}:low=10,high=26"], "kl": 0},
            "high": {"tasks": f"{task}:low=50,high=66", "rl": {"steps": 4}},
        },
        "rejection": {"problems": 16, "samples": 3, "keep": 1, "examples": 24},
        "distill": {"steps": 64, "learning_rate": 0.005},
        "mixed": {"steps": 5},
        "held_out": 8,
        "dense": True,
        "seed": 3,
    }


class Notes(SilentReporter):
    """Keeps what it is told."""

    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


class GreedyEngine:
    """`generate` one prompt at a time, as an engine; samples are all alike."""

    def __init__(self, model, ends, pad):
        self.model, self.ends, self.pad = model, ends, pad

    def generate(self, prompts, sampling):
        found = []
        for number, prompt in enumerate(prompts):
            ids = torch.tensor([list(prompt)])
            settings = {"do_sample": False, "eos_token_id": self.ends, "pad_token_id": self.pad}
            out = self.model.generate(ids, max_new_tokens=sampling.max_new_tokens, **settings)[0].tolist()
            tokens = tuple(out[len(prompt) :])
            found += [Rollout(number, tokens, (0.0,) * len(tokens), None, True)] * sampling.per_prompt
        return found


def answerer(place, device):
    model, tokenizer = open_model(place, device)
    return Answerer(GreedyEngine(model, ends_of(model, tokenizer), pad_of(model, tokenizer)), tokenizer)


class Stages:
    """Real stages but for RL, which leaves the model as it is; `called` has what was asked of it."""

    def __init__(self):
        self.called = []

    def rl(self, source, tasks, out, options, seed, device, reporter):
        self.called.append((Path(out).name, Path(source).name, tasks, options, seed))
        shutil.copytree(source, out)
        row = {"step": 1, "reward": 0.5, "kl": 0.0}
        (out / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        (out / "rl.html").write_text("<p>curves</p>")

    def recipe_stages(self, **changes):
        return RecipeStages(require=lambda: None, rl=self.rl, answerer=answerer, **changes)


def test_a_whole_recipe_and_again(asked, tmp_path):
    stages, out = Stages(), tmp_path / "run"
    report = RecipeRun(read_recipe(asked), out, CPU, SilentReporter(), stages.recipe_stages()).run()
    low, high = asked["domains"]["low"]["tasks"][0], asked["domains"]["high"]["tasks"]
    assert [(name, source, tasks, options["steps"]) for name, source, tasks, options, _ in stages.called] == [
        ("rl", "cold", [f"{low},kl=0"], 3),
        ("rl", "cold", [f"{high},kl=0.001"], 4),
        ("mixed", "distilled", [f"{low},kl=0", f"{high},kl=0.001"], 5),
        ("dense-mixed", "dense-distilled", [f"{low},kl=0", f"{high},kl=0.001"], 5),
    ]
    assert all(options["max_new_tokens"] == 3 and seed == 3 for *_, options, seed in stages.called)
    asked_of = {stage: list(found) for stage, found in report.solved.items()}
    both = ["low", "high"]
    assert asked_of == {
        **{"base": both, "low/cold": ["low"], "low/rl": ["low"], "high/cold": ["high"], "high/rl": ["high"]},
        **{"distilled": both, "mixed": both, "dense-distilled": both, "dense-mixed": both},
    }
    # What was learned is real: from nothing to what the specialists know, in one model.
    shares = report.shares()
    assert shares["base"]["low"]["strict"]["estimate"] < 0.2
    for name in both:
        assert shares[f"{name}/rl"][name]["strict"]["estimate"] > 0.6
        assert shares["mixed"][name]["strict"]["estimate"] > 0.6
    assert report.samples[low]["samples"] == 48
    assert report.samples[low]["duplicates"] == 32
    # Both domains have as many examples, whatever was kept.
    assert report.samples[low]["kept"] == 16
    assert [counts["kept"] + counts["own"] for counts in report.samples.values()] == [24, 24]
    assert len((out / "data" / "distilled.jsonl").read_text().splitlines()) == 48
    # Nothing is done again.
    again = Stages()
    nothing = again.recipe_stages(sft=None, convert=None)
    second = RecipeRun(read_recipe(asked), out, CPU, SilentReporter(), nothing).run()
    assert not again.called
    assert second.solved == report.solved
    page = (out / "recipe.html").read_text()
    assert all(word in page for word in ("low/rl/rl.html", "Reward", "Loss of fine-tuning", "Wilson"))
    kept = json.loads((out / "recipe.json").read_text())
    assert kept["differences"][-1]["against"] == "dense-mixed"
    assert {path.name for path in (out / "data").iterdir()} >= {"distilled.jsonl", "samples-0.jsonl"}
    assert "Supervised fine-tuning" in (out / "distilled" / "README.md").read_text()
    # Another setting is refused, by the stage that it is of.
    asked["mixed"]["steps"] = 6
    with pytest.raises(ResumeError, match=r"stage mixed .*steps was 5, is 6"):
        RecipeRun(read_recipe(asked), out, CPU, SilentReporter(), nothing).run()


def test_an_interruption_in_any_stage_is_taken_up(asked, tmp_path):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    del asked["dense"], asked["domains"]["low"]
    out, stages = tmp_path / "run", Stages()
    for changes in ({"convert": stop}, {"sft": stop}, {"rl": stop}):
        stopped = RecipeStages(**{**vars(stages.recipe_stages()), **changes})
        run = RecipeRun(read_recipe(asked), out, CPU, SilentReporter(), stopped)
        with pytest.raises(Stop):
            run.run("specialists")
    run = RecipeRun(read_recipe(asked), out, CPU, SilentReporter(), stages.recipe_stages())
    assert set(run.run("specialists").solved) == {"base", "high/cold", "high/rl"}
    # What failed at once may be mended.
    asked["distill"]["steps"] = 3
    failing = RecipeStages(**{**vars(stages.recipe_stages()), "sft": stop})
    with pytest.raises(Stop):
        RecipeRun(read_recipe(asked), out, CPU, SilentReporter(), failing).run("distilled")
    asked["distill"]["steps"] = 4
    # Killed after a model was in its place, and before that was written down.
    record = out / "stages" / "high.rl.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "done": False}))
    run = RecipeRun(read_recipe(asked), out, CPU, SilentReporter(), stages.recipe_stages())
    assert "distilled" in run.run("distilled").solved
    assert [name for name, *_ in stages.called] == ["rl"]
    assert not (out / "mixed").exists()


def test_samples_are_counted_and_held_out_problems_left_out(task, tmp_path):
    own, journal = named(task), tmp_path / "samples.jsonl"
    rows = [
        {"index": 5, "replies": ["w60", " w60", "w3"], "right": [True, True, False]},
        {"index": 6, "replies": ["w60", "w60 ", "w60!"], "right": [True, True, True]},
        {"index": HELD_OUT + 1, "replies": ["w60"] * 3, "right": [True] * 3},
    ]
    # A line torn by a kill.
    journal.write_text("".join(f"\n{json.dumps(row)}" for row in rows) + '\n{"index": 9, "repl')
    forbidden = {text_of(own.problem(HELD_OUT + 1))}
    lessons, counts = kept_lessons(own, Rejection(keep=1), read_journal(journal), forbidden)
    assert [lesson.reply for lesson in lessons] == ["w60", "w60"]
    assert vars(counts) == {
        **{"problems": 3, "solved": 3, "samples": 9, "right": 8, "duplicates": 4},
        **{"contaminated": 1, "surplus": 1, "kept": 2, "own": 0, "repeated": 0},
    }


def test_own_answers_fill_up_and_everything_is_counted(task):
    own = named(task)
    kept = [lessons_of(own, own.problem(index), "w60")[0] for index in (5, 6)]
    # What a specialist was asked, and what is held out, is not answered once more.
    first = own_answers(own, 3)
    forbidden = {text_of_messages(first[0].messages)}
    kept.append(first[1])
    counts = RejectionCounts(surplus=4)
    found = filled_up(own, kept, 5, forbidden, counts)
    assert found[:3] == kept
    assert not {text_of_messages(lesson.messages) for lesson in found[3:]} & {
        text_of_messages(lesson.messages) for lesson in [*kept, first[0]]
    }
    assert (counts.kept, counts.own, counts.repeated, counts.surplus) == (3, 2, 0, 4)
    # Fewer are wanted than were kept.
    assert filled_up(own, kept, 2, forbidden, counts) == kept[:2]
    assert (counts.kept, counts.own, counts.repeated, counts.surplus) == (2, 0, 0, 5)
    # A task without answers of its own says again what was kept.
    silent = SimpleNamespace(problem=lambda index: replace(own.problem(index), answer=""))
    assert filled_up(silent, kept, 7, forbidden, counts) == [*kept, *kept, kept[0]]
    assert (counts.own, counts.repeated) == (0, 4)


class Half:
    """Answers every other problem of a call right, and counts what it is asked."""

    def __init__(self):
        self.asked = []

    def replies(self, task, problems, sampling):
        self.asked += [problem.index for problem in problems]
        return [[["w60", "w3"][number % 2]] * sampling.per_prompt for number in range(len(problems))]


def test_problems_are_drawn_until_enough_is_kept(task, tmp_path):
    own, answerer = named(f"{task}:low=10,high=40"), Half()

    def sample(name, keep_at_least, most=64):
        settings = Rejection(problems=most, samples=2, keep=1, keep_at_least=keep_at_least)
        sample_task(answerer, own, settings, 3, 0, tmp_path / name, frozenset(), SilentReporter())
        return read_journal(tmp_path / name)

    assert len(sample("some", 9)) == 32
    asked = list(answerer.asked)
    # Nothing is asked again, and more are asked for more; at most as many as there may be.
    assert len(sample("some", 9)) == 32
    assert answerer.asked == asked
    assert len(sample("some", 17)) == 48
    assert len(sample("some", 1000)) == 64
    assert answerer.asked == [row["index"] for row in read_journal(tmp_path / "some")]
    assert len(sample("all", None, 48)) == 48


def test_a_domain_has_rejection_settings_of_its_own():
    shared = {"samples": 3, "keep": 1, "examples": 50}
    domains = {
        "a": {"tasks": "gcd", "rejection": {"keep": 4, "keep_at_least": 9}},
        "b": {"tasks": "lcm"},
    }
    found = read_recipe({"base": "x", "rejection": shared, "domains": domains})
    assert [domain.rejection for domain in found.domains] == [
        Rejection(samples=3, keep=4, keep_at_least=9, examples=50),
        Rejection(samples=3, keep=1, examples=50),
    ]


def test_a_reply_of_several_turns_is_a_lesson_for_each(tmp_path):
    task, journal = named("world_steps:level=2"), tmp_path / "samples.jsonl"
    problem = task.problem(5)
    turns = problem.answer.split(TURN)
    journal.write_text(json.dumps({"index": 5, "replies": [problem.answer] * 2, "right": [True, True]}))
    lessons, counts = kept_lessons(task, Rejection(keep=2), read_journal(journal), [])
    assert [lesson.reply for lesson in lessons] == turns
    for number, lesson in enumerate(lessons):
        assert [one["role"] for one in lesson.messages] == ["user", *["assistant", "user"] * number]
        told = [one["content"] for one in lesson.messages[2::2]]
        assert told == [task.told(problem, TURN.join(turns[:n])) for n in range(1, number + 1)]
    assert (counts.kept, counts.duplicates, counts.surplus) == (1, 1, 0)
    assert [lesson.reply for lesson in own_answers(task, 1)][-1].startswith('{"tool": "answer"')


@pytest.fixture
def silent_run(asked, tmp_path):
    """Makes the run of a domain whose specialist never replies."""

    def silent(place, device):
        found = answerer(place, device)
        found.engine.generate = lambda prompts, sampling: [
            Rollout(number, (3,), (0.0,), None, True)
            for number in range(len(prompts))
            for _ in range(sampling.per_prompt)
        ]
        return found

    def make(task):
        change = {"domains": {"low": {"tasks": [task]}}, "sft": {**asked["sft"], "steps": 1}, "dense": False}
        stages = RecipeStages(**{**vars(Stages().recipe_stages()), "answerer": silent})
        return RecipeRun(
            read_recipe({**asked, **change, "distill": {"steps": 1}}), tmp_path / "run", CPU, notes, stages
        )

    notes = Notes()
    return make, notes


def test_nothing_to_distil_is_said(silent_run, task):
    with pytest.raises(ConfigError, match="nothing to distil"):
        silent_run[0](task.replace(":say", ":ask")).run()


def test_own_answers_are_distilled_where_no_specialist_was_right(silent_run, task):
    make, notes = silent_run
    report = make(task).run("distilled")
    counts = report.samples[task]
    assert (counts["right"], counts["kept"], counts["own"]) == (0, 0, 24)
    assert "distilled" in report.solved
    assert any("learns nothing here from its specialist" in line for line in notes.lines)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domains": {}}, "name at least one"),
        ({"domain": {}}, "did you mean domains"),
        ({"base": None}, "lacks base"),
        ({"base": 3}, "base=3"),
        ({"held_out": 0}, "held_out"),
        ({"dense": "yes"}, "dense='yes'"),
        ({"seed": -1}, "seed"),
        ({"sft": {"steps": 0}}, r"domains\.a\.sft: steps=0|distill: steps=0"),
        ({"sft": {"step": 1}}, "did you mean steps"),
        ({"sft": {"learning_rate": "fast"}}, "learning_rate='fast' cannot be"),
        ({"sft": {"bf16": "yes"}}, "bf16='yes' cannot be"),
        ({"distill": {"problems": 3}}, "distill has no key 'problems'"),
        ({"convert": {"top": 3}}, "did you mean topk"),
        ({"mixed": {"steps": "few"}}, "mixed.steps"),
        ({"mixed": {"tasks": []}}, "mixed.tasks is set by the recipe"),
        ({"mixed": {"prompts": 0}}, "mixed: prompts=0"),
        ({"mixed": {"top_p": 5}}, r"mixed: top_p=5 cannot be"),
        ({"rl": {"full": True, "lora": 4}}, "mixed: full trains all weights, lora a few"),
        ({"domains": {"a": {"tasks": "gcd", "rl": {"group": 1}}}}, "domains.a.rl: group=1"),
        ({"domains": {"a": {"tasks": "gcd", "kl": float("inf")}}}, "domains.a.kl=inf"),
        ({"domains": {"mixed": {"tasks": "gcd"}}}, "'mixed' has the name of a folder"),
        ({"rejection": {"samples": 0}}, "rejection.samples"),
        ({"rejection": {"sample": 1}}, "did you mean samples"),
        ({"rejection": {"temperature": "hot"}}, "rejection.temperature"),
        ({"rejection": {"keep_at_least": 0}}, "rejection.keep_at_least"),
        ({"rejection": {"examples": 1.5}}, "rejection.examples=1.5"),
        ({"domains": {"a": {"tasks": "gcd", "rejection": {"keep": 0}}}}, r"domains\.a\.rejection\.keep=0"),
        ({"domains": {"a": {"tasks": "gcd", "rejection": {"kept": 1}}}}, r"domains\.a\.rejection has no key"),
        ({"domains": {"a": {"tasks": "gcd", "rejection": 3}}}, r"domains\.a\.rejection=3"),
        ({"rl": 3}, "rl=3"),
        ({"domains": {"a": {"tasks": "spel_backward"}}}, "did you mean spell_backward"),
        ({"domains": {"a": {"task": "gcd"}}}, "did you mean tasks"),
        ({"domains": {"a": {"tasks": []}}}, "domains.a.tasks"),
        ({"domains": {"a": {"tasks": "gcd", "kl": -1}}}, "domains.a.kl"),
        ({"domains": {"a": {"tasks": "gcd"}, "b": {"tasks": "gcd"}}}, "twice"),
        ({"domains": {"a": {"tasks": ["gcd", "gcd:"]}}}, "'gcd' stands in the recipe twice"),
        ({"domains": {"a": {"tasks": "gcd"}, "A": {"tasks": "lcm"}}}, "'a' is there twice"),
        ({"domains": {"a b": {"tasks": "gcd"}}}, "use letters"),
    ],
)
def test_recipes_that_cannot_be(change, message):
    good = {"base": "smollm2-135m", "domains": {"a": {"tasks": "gcd"}}}
    assert read_recipe(good).domains[0].tasks == ("gcd",)
    with pytest.raises(ConfigError, match=message):
        read_recipe({**good, **change})


def test_rates_may_be_written_without_a_point(tmp_path):
    rates = "sft: {learning_rate: 3E-4}\nrl: {learning_rate: 1e-4}\n"
    (tmp_path / "recipe.yaml").write_text(f"base: x\ndomains: {{a: {{tasks: gcd, kl: 1e-2}}}}\n{rates}")
    found = read_recipe(tmp_path / "recipe.yaml")
    assert (found.domains[0].kl, found.distill["learning_rate"], found.mixed["learning_rate"]) == (
        0.01,
        3e-4,
        1e-4,
    )


def test_files_that_are_no_recipe(tmp_path):
    for text, message in (
        *(("a: [", "is no YAML"), ("[" * 10_000, "is no YAML")),
        ("base: x\ndomains: {a: {kl: 0, tasks: gcd, kl: 1}}", "'kl' is there twice.*line 2"),
        *(("- a", "has no keys"), ("base: x", "lacks domains")),
    ):
        (tmp_path / "recipe.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(tmp_path / "missing.yaml")


def test_a_folder_is_of_one_recipe(asked, tmp_path):
    def begun(recipe):
        return RecipeRun(read_recipe(recipe), tmp_path, CPU, SilentReporter(), Stages().recipe_stages())

    begun(asked)
    begun({**asked, "mixed": {"steps": 9}})
    low = asked["domains"]["low"]
    for other in ({"seed": 4}, {"domains": {"low": low}}, {"domains": {**asked["domains"], "more": low}}):
        if "more" in other.get("domains", {}):
            del other["domains"]["low"]
        with pytest.raises(ResumeError, match=r"is of another recipe \((seed|domains) was"):
            begun({**asked, **other})


def test_a_folder_with_something_else_is_not_taken(asked, tmp_path):
    (tmp_path / "base").mkdir()
    with pytest.raises(OutputError, match="has files, and is no recipe's folder"):
        RecipeRun(read_recipe(asked), tmp_path, CPU, SilentReporter(), Stages().recipe_stages())
    assert [file.name for file in tmp_path.iterdir()] == ["base"]


def test_a_converted_base_has_no_dense_twin(asked, llama_dir, tmp_path):
    run = RecipeRun(read_recipe(asked), tmp_path / "run", CPU, SilentReporter(), Stages().recipe_stages())
    base = run._base()
    for changes, message in (({}, "needs a dense base"), ({"dense": False}, "convert: is for a dense base")):
        with pytest.raises(ConfigError, match=message):
            RecipeRun(
                read_recipe({**asked, "base": base, **changes}),
                tmp_path / "other",
                CPU,
                SilentReporter(),
                Stages().recipe_stages(),
            )
