"""Replays, counted by hand on tokens that are letters."""

from functools import partial

import pytest

from fulmen.agents.replay import BLOCK_TOKENS, hit_tokens, replay
from fulmen.agents.strategies import discard_all, keep_newest, none
from fulmen.errors import ConfigError, ContextBudgetError

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
USER = {"role": "user", "content": "u" * 32}
CALLING = {"role": "assistant", "content": "c" * 8, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c", "content": "r" * 88}
ANSWER = {"role": "assistant", "content": "a" * 4}
TRACE = [USER, CALLING, RESULT, CALLING, RESULT, ANSWER]


def tokenize(messages):
    return [ord(letter) for message in messages for letter in message["content"]]


def test_an_append_only_history_hits_all_that_was_there():
    # Prompts of 32, 128 and 224 letters; what the second and third find are 40 and 136, in blocks of 16.
    assert replay(TRACE, none, 1000, tokenize) == (0 + 32 + 128, 32 + 96 + 96, 8 + 8 + 4)


def test_discarding_all_misses_little_once():
    # Due at the third prompt, which is the first again: its last block is computed.
    assert replay(TRACE, discard_all, 240, tokenize) == (0 + 32 + 16, 32 + 96 + 16, 20)


def test_keeping_the_newest_misses_what_follows_the_change():
    newest = partial(keep_newest, n=1)
    # The third prompt: 32 + 8 as before, then 74 letters that stand for 88, 8 and 88: 32 hit of 210.
    hit, miss, written = replay(TRACE, newest, 240, tokenize)
    assert (hit, written) == (0 + 32 + 32, 20)
    assert miss == 32 + 96 + 178


def test_a_turn_that_is_over_is_history():
    # Prompts of 32 and 68; the second shares all 36 that the first call had, two blocks.
    assert replay([USER, ANSWER, USER, ANSWER], none, 1000, tokenize) == (0 + 32, 32 + 36, 8)


def test_nothing_is_called_without_an_assistant():
    assert replay([USER], none, 1000, tokenize) == (0, 0, 0)


def test_the_last_token_is_computed():
    prompt = list(range(2 * BLOCK_TOKENS))
    assert hit_tokens(prompt, prompt) == BLOCK_TOKENS
    assert hit_tokens([*prompt, 1], prompt) == 2 * BLOCK_TOKENS
    assert hit_tokens([], prompt) == 0


def test_a_budget_that_is_too_small_is_the_strategys_error():
    with pytest.raises(ContextBudgetError):
        replay(TRACE, none, 100, tokenize)


def test_a_tokenizer_that_forgets_is_refused():
    with pytest.raises(ConfigError, match="fewer tokens with a reply"):
        replay(TRACE, none, 1000, lambda messages: [0] * (10 - len(messages)))
