"""How the engine's answers are read and rewritten, and what is counted of them."""

import asyncio
import json
from decimal import Decimal
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'fulmen[serve]'")

from transformers import LlamaConfig, Qwen2Config, Qwen3_5TextConfig

from fulmen.config import DsaConfig
from fulmen.modeling.cost import token_bytes
from fulmen.serving.billing.ledger import AttentionReads
from fulmen.serving.billing.prices import DEFAULT_PRICES, Tokens
from fulmen.serving.engine.served_model import ServedModel
from fulmen.serving.gateway.dialects.anthropic import AnthropicDialect
from fulmen.serving.gateway.dialects.base import Event, events_of
from fulmen.serving.gateway.dialects.openai import OpenAiDialect
from fulmen.serving.gateway.errors import ApiError
from fulmen.serving.gateway.jobs.attention_reads import count_attention_reads
from fulmen.serving.gateway.usage import bill_for_client

BILL = {"cost": "1"}
STREAM = (
    b'data: {"a": "\xe2\x9a\xa1"}\n\n: keep-alive\n\nevent: end\ndata: {"b":\ndata: 2}\n\ndata: [DONE]\n\n'
)


def chunk(delta=None, finish=None, usage=None, index=0):
    choices = [] if delta is None else [{"index": index, "delta": delta, "finish_reason": finish}]
    return Event(None, json.dumps({"id": "1", "choices": choices, "usage": usage}))


def counts(prompt, output, cached=None):
    details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
    return {"prompt_tokens": prompt, "completion_tokens": output, **details}


def read(sent):
    """The JSON of each event in bytes for a client."""
    parts = sent.decode().removesuffix("data: [DONE]\n\n").split("\n\n")
    return [json.loads(part.removeprefix("data: ")) for part in parts if part]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_found_however_the_bytes_are_cut(size):
    async def pieces():
        for start in range(0, len(STREAM), size):
            yield STREAM[start : start + size]

    async def collect():
        return [event async for event in events_of(pieces())]

    expected = [Event(None, '{"a": "⚡"}'), Event("end", '{"b":\n2}'), Event(None, "[DONE]")]
    assert asyncio.run(collect()) == expected


def stream(asked_usage):
    dialect = OpenAiDialect(asked_usage)
    first = dialect.feed(chunk({"content": "a", "reasoning": "hm"}, usage=counts(9, 1)))
    held = dialect.feed(chunk({"content": "b"}, "stop", counts(9, 2)))
    held += dialect.feed(chunk(usage=counts(9, 2, cached=4))) + dialect.feed(Event(None, "[DONE]"))
    return dialect, read(first), held, dialect.tail(BILL)


@pytest.mark.parametrize("asked_usage", [False, True])
def test_the_end_of_an_answer_waits_for_the_bill(asked_usage):
    dialect, first, held, tail = stream(asked_usage)
    assert first[0]["choices"][0]["delta"] == {"content": "a", "reasoning_content": "hm"}
    assert first[0]["usage"] is None
    assert held == b""
    assert dialect.usage.tokens == Tokens(4, 5, 2)
    assert tail.endswith(b"data: [DONE]\n\n")
    sent = read(tail)
    assert sent[0]["choices"][0]["delta"] == {"content": "b"}
    assert [len(event["choices"]) for event in sent] == ([1, 0] if asked_usage else [1])
    usage = sent[-1]["usage"]
    assert (usage["prompt_cache_hit_tokens"], usage["prompt_cache_miss_tokens"]) == (4, 5)
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (9, 2, 11)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 4}
    assert usage["fulmen"] == BILL
    assert all(event["usage"] is None for event in sent[:-1])


def test_nothing_in_the_cache_is_said_as_zero_not_as_null():
    dialect = OpenAiDialect(True)
    answer = {"choices": [{"message": {"content": "a", "reasoning": None}}], "usage": counts(3, 1)}
    dialect.read_plain(answer)
    shown = dialect.plain(answer, BILL)
    assert shown["usage"]["prompt_cache_hit_tokens"] == 0
    assert shown["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert shown["choices"][0]["message"] == {"content": "a"}


def test_output_of_several_choices_is_summed_while_it_streams():
    dialect = OpenAiDialect(False)
    for index, output in ((0, 1), (1, 1), (0, 2), (1, 2), (1, 3)):
        dialect.feed(chunk({"content": "a"}, usage=counts(9, output), index=index))
    assert dialect.usage.output == 5


def test_without_an_end_the_prompt_counts_as_cached():
    dialect = OpenAiDialect(False)
    dialect.feed(chunk({"content": "a"}, usage=counts(9, 1)))
    assert dialect.usage.tokens == Tokens(9, 0, 1)


def test_an_error_in_the_stream_is_an_error():
    with pytest.raises(ApiError) as caught:
        OpenAiDialect(False).feed(Event(None, '{"error": {"message": "EngineCore died", "code": 500}}'))
    assert caught.value.status == 500


def test_an_error_in_the_stream_keeps_its_status_and_field():
    said = {"error": {"message": "token ids out of range", "param": "logit_bias", "code": 400}}
    with pytest.raises(ApiError) as caught:
        OpenAiDialect(False).feed(Event(None, json.dumps(said)))
    assert (caught.value.status, caught.value.param) == (400, "logit_bias")


def anthropic(kind, **said):
    return Event(kind, json.dumps({"type": kind, **said}))


def test_anthropics_end_waits_for_the_bill_and_its_usage_is_read():
    dialect = AnthropicDialect()
    start = anthropic("message_start", message={"usage": {"input_tokens": 9}})
    assert dialect.feed(start) == f"event: message_start\ndata: {start.data}\n\n".encode()
    for text in "abc":
        assert dialect.feed(anthropic("content_block_delta", delta={"text": text}))
    assert dialect.usage.tokens == Tokens(9, 0, 3)
    usage = {
        "input_tokens": 4,
        "cache_read_input_tokens": 5,
        "cache_creation_input_tokens": 2,
        "output_tokens": 4,
    }
    assert dialect.feed(anthropic("message_delta", usage=usage)) == b""
    assert dialect.feed(anthropic("message_stop")) == b""
    assert dialect.usage.tokens == Tokens(5, 6, 4)
    assert dialect.tail(BILL).count(b"event: message_") == 2


def served(config, dsa):
    return ServedModel(Path("m"), "m", config, dsa, 4096, "", frozenset())


def count_by_hand(config, dsa, tokens, windows):
    """Query by query and layer by layer."""
    coarse_bytes = dsa.coarse_head_dim + 2 if dsa.coarse_head_dim else 0
    index_bytes = token_bytes(config, dsa).index_keys // len(dsa.layers) - coarse_bytes
    kv = token_bytes(config, dsa).kv // config.num_hidden_layers
    dense = sparse = saved = 0
    for position in range(tokens.hit + 1, tokens.hit + tokens.miss + max(0, tokens.output - 1) + 1):
        for layer, window in enumerate(windows):
            seen = reads = min(position, window or position)
            if layer in dsa.layers:
                kept = dsa.layer_topk(layer)
                selects = position > max(dsa.topk, kept)
                reads = kept if selects else position
                candidates = dsa.candidate_factor * max(kept, dsa.topk)
                few = not coarse_bytes or position <= 4 * candidates
                scored = position if few else candidates
                saved -= (scored * index_bytes + (not few) * position * coarse_bytes) * selects
            dense, sparse, saved = dense + seen, sparse + reads, saved + (seen - reads) * kv
    return AttentionReads(dense // len(windows), sparse // len(windows), saved)


@pytest.mark.parametrize(
    "tokens", [Tokens(0, 50, 9), Tokens(48, 100, 30), Tokens(0, 3, 1), Tokens(100, 1, 0)]
)
def test_reading_is_what_a_count_by_hand_gives(tokens):
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3)
    dsa = DsaConfig(40, 4, 2, 4, (0, 1, 2), (1.8, 0.7, 0.5))
    found = count_attention_reads(served(config, dsa), tokens)
    assert found == count_by_hand(config, dsa, tokens, [None] * 3)


@pytest.mark.parametrize("tokens", [Tokens(0, 50, 9), Tokens(48, 100, 30), Tokens(0, 3, 1), Tokens(15, 4, 0)])
def test_reading_of_an_index_in_two_levels(tokens):
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3)
    dsa = DsaConfig(
        8, 4, 2, 4, (0, 1, 2), (1.5, 0.5, 1), coarse_head_dim=6, coarse_n_heads=4, candidate_factor=1
    )
    found = count_attention_reads(served(config, dsa), tokens)
    assert found == count_by_hand(config, dsa, tokens, [None] * 3)


def test_reading_knows_windows_and_layers_that_stay_dense():
    windows = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2}
    config = Qwen2Config(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3, **windows
    )
    dsa, tokens = DsaConfig(16, 4, 2, 4, (0,)), Tokens(10, 60, 5)
    found = count_attention_reads(served(config, dsa), tokens)
    assert found == count_by_hand(config, dsa, tokens, [None, None, 20])
    dense = count_attention_reads(served(config, None), tokens)
    assert (
        dense.context_tokens
        == dense.tokens_read
        == count_attention_reads(served(config, dsa), tokens).context_tokens
    )
    assert dense.bytes_saved == 0


def test_reading_leaves_layers_with_linear_attention_out():
    kinds = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    hybrid = Qwen3_5TextConfig(num_hidden_layers=4, layer_types=kinds, head_dim=8, **shape)
    tokens, sizes = Tokens(10, 60, 5), (16, 4, 2, 4)
    found = count_attention_reads(served(hybrid, DsaConfig(*sizes, (3,))), tokens)
    two_layers = LlamaConfig(num_hidden_layers=2, **shape)
    assert found == count_by_hand(two_layers, DsaConfig(*sizes, (1,)), tokens, [None] * 2)


def test_the_bill_shows_cost_and_what_dense_would_have_cost():
    tokens = Tokens(1_000_000, 500_000, 10)
    bill = bill_for_client(DEFAULT_PRICES, tokens, Decimal("1.20003"), AttentionReads(7, 5, 3))
    assert bill == {
        "cost": "1.20003",
        "dense_cost": "2.50012",
        "currency": "CNY",
        "context_tokens": 7,
        "tokens_read": 5,
        "bytes_saved": 3,
    }
