"""Schemas compiled beside the engine: what is found, what ends at a limit, that what passes is enforced."""

import asyncio
import json
import random

import pytest

pytest.importorskip("xgrammar", reason="needs the extra serve-cpu")
pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'fulmen[serve]'")

import numpy as np
import psutil
import xgrammar
from jsonschema_rs import Draft202012Validator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig

from fulmen.serving.engine.served_model import ServedModel
from fulmen.serving.gateway.errors import ApiError
from fulmen.serving.gateway.schemas.forced_calls import enforce_chat
from fulmen.serving.gateway.schemas.grammar_check import GrammarCheck
from fulmen.serving.gateway.schemas.json_schema import FieldSchema
from tests.processes import runs

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = {token: place for place, token in enumerate([*BYTES, "</s>"])}
WAIT_S = 240
SOUND = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
# Ends at no limit but the one on time.
ENDLESS = {"type": "string", "pattern": "^(.{0,6000})(.{0,6001})$"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose tokens are bytes."""
    place = tmp_path_factory.mktemp("bytes")
    tokenizer = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(place / "tokenizer.json"))
    config = LlamaConfig(num_hidden_layers=1, vocab_size=len(VOCABULARY))
    return ServedModel(place, "bytes", config, None, 2048, "", frozenset())


@pytest.fixture(scope="module")
def live(model):
    """Runs a coroutine with the one check of these tests: its process takes seconds to start, or a minute."""
    check = GrammarCheck(model, compile_s=1.0)
    with asyncio.Runner() as runner, pytest.MonkeyPatch.context() as patch:
        patch.setattr("fulmen.serving.gateway.schemas.grammar_check.PATIENCE_S", WAIT_S)
        yield lambda work: runner.run(asyncio.wait_for(work(check), WAIT_S))
        runner.run(check.close())


async def fault(check, *schemas, account="a"):
    """The field and the words of a refusal; None if the schemas are sound."""
    try:
        await check.check(account, [FieldSchema(f"f{place}", schema) for place, schema in enumerate(schemas)])
    except ApiError as error:
        return (error.param, error.message) if error.status == 422 else error
    return None


def test_what_is_found_names_field_and_limit_and_the_next_check_is_as_the_first(live):
    async def work(check):
        assert await fault(check, SOUND) is None
        field, why = await fault(check, SOUND, ENDLESS)
        assert (field, "takes more than" in why) == ("f1", True)
        for schema, word in (
            ({"type": "string", "pattern": "(a)\\1"}, "Backreference"),
            ({"type": "string", "pattern": "(a"}, "parenthesis"),
            ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum greater than maximum"),
            ({"$ref": "#/$defs/x"}, "$defs"),
            ({"$ref": "#"}, "no answer"),
            ({"type": "integer", "minimum": 10**400}, "cannot be enforced"),
            ({"type": "string", "pattern": "^.{0,1000}$"}, ""),
            ({"type": "string", "pattern": f"{'(' * 900}a{')' * 900}"}, ""),
        ):
            found = await fault(check, schema)
            assert found is None or word in found[1], schema
            assert word == "" or found, schema
        assert await fault(check, SOUND, {"type": "boolean"}) is None

    live(work)


def test_a_client_that_leaves_ends_the_compilation(live):
    async def work(check):
        await check.start()
        process = psutil.Process(check._process.pid)
        checking = asyncio.create_task(fault(check, ENDLESS))
        while not (working := process.children()):
            await asyncio.sleep(0.01)
        checking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await checking
        assert not runs(working[0])
        assert await fault(check, {"const": 1}) is None
        assert not check._turns
        while process.children():
            await asyncio.sleep(0.01)

    live(work)


def test_one_account_does_not_keep_the_others_waiting(live):
    async def work(check):
        await check.start()
        greedy = [
            asyncio.create_task(fault(check, {"description": str(i), **ENDLESS}, account="greedy"))
            for i in range(20)
        ]
        await asyncio.sleep(0)
        assert await fault(check, {"const": 2}, account="modest") is None
        assert sum(task.done() for task in greedy) <= 1
        for task in greedy:
            task.cancel()
        await asyncio.wait(greedy)

    live(work)


def test_a_process_that_is_lost_is_started_again(live):
    async def work(check):
        await check.start()
        check._process.kill()
        await check._process.wait()
        assert await fault(check, {"type": "null"}) is None

    live(work)


NODE = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}]}},
    "required": ["v", "next"],
}
POINT = {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}


@pytest.mark.parametrize(
    "schema",
    [
        None,
        {},
        {"type": "object"},
        {"properties": {"a": {"type": "string"}}, "required": ["a"]},
        {"type": "object", "properties": {"a": {"enum": ["x", 3, None, "é"]}, "b": {"const": [1]}}},
        {"$ref": "#/$defs/N", "$defs": {"N": NODE}},
        {"type": "object", "anyOf": [SOUND, POINT]},
        {"oneOf": [{**SOUND, "additionalProperties": False}, {**POINT, "additionalProperties": False}]},
        {"type": ["object", "null"], "properties": {"a": {"type": ["integer", "null"]}}, "required": ["a"]},
        {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
        {
            "type": "object",
            "properties": {"a": {"type": "array", "items": SOUND, "maxItems": 2, "minItems": 1}},
        },
        {"type": "object", "properties": {"a": {"prefixItems": [{"type": "null"}, POINT], "items": False}}},
        {"type": "object", "properties": {"a": {"type": "string", "minLength": 2, "maxLength": 3}}},
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "^[a-c]+x?$"}}},
        {"type": "object", "properties": {"a": {"type": "string", "format": "uri", "maxLength": 3}}},
        {"type": "object", "properties": {"a": {"type": "integer", "minimum": -3, "exclusiveMaximum": 12}}},
        {"type": "object", "properties": {"a": {"type": "number", "exclusiveMinimum": 0, "maximum": 2.5}}},
        {"type": "object", "patternProperties": {"^a.$": {"type": "integer"}}, "additionalProperties": False},
        {"type": "object", "propertyNames": {"pattern": "^[ab]$"}, "additionalProperties": {"type": "null"}},
    ],
    ids=lambda schema: json.dumps(schema)[:60],
)
def test_whatever_a_grammar_lets_through_meets_the_schema(schema):
    """Made-up arguments of a forced call, byte by byte, each judged by a validator."""
    function = {"name": "f"} if schema is None else {"name": "f", "parameters": schema}
    body = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    enforce_chat(body)
    info = xgrammar.TokenizerInfo(
        [bytes([place]) for place in range(256)] + [b"</s>"],
        vocab_type=xgrammar.VocabType.RAW,
        vocab_size=257,
        stop_token_ids=[256],
    )
    compiler = xgrammar.GrammarCompiler(info, max_threads=1)
    compiled = compiler.compile_json_schema(json.dumps(body["tools"][0]["function"]["parameters"]))
    judge = Draft202012Validator({"type": "object", "allOf": [schema or {}]} | rooted(schema))
    texts = [text for seed in range(60) if (text := made_up(compiled, info, seed)) is not None]
    assert len(texts) > 5
    for text in texts:
        # 1e999 is a number of JSON, and none of Python's.
        judge.validate(json.loads(text, parse_float=lambda digits: min(float(digits), 1e300)))


def rooted(schema):
    """Definitions are looked for at the root."""
    return {"$defs": schema["$defs"]} if schema and "$defs" in schema else {}


def made_up(compiled, info, seed):
    """A text that the grammar lets through; None if it does not end."""
    dice, matcher, text = random.Random(seed), xgrammar.GrammarMatcher(compiled), bytearray()
    mask = xgrammar.allocate_token_bitmask(1, info.vocab_size)
    for _ in range(300):
        matcher.fill_next_token_bitmask(mask, 0)
        bits = np.unpackbits(mask.numpy().view(np.uint8), bitorder="little")[: info.vocab_size]
        allowed = [int(token) for token in np.flatnonzero(bits)]
        assert allowed, bytes(text)
        # What ends things, and letters that need no second byte.
        plain = [token for token in allowed if token == 256 or chr(token) in '"{}[]:,']
        plain += [token for token in allowed if token < 128 and chr(token).isalnum()]
        token = dice.choice(plain or allowed)
        assert matcher.accept_token(token)
        if token == 256:
            return text.decode()
        text.append(token)
    return None


def test_the_process_ends_when_its_server_does(live):
    async def work(check):
        await check.start()
        check._process.stdin.close()
        assert await check._process.wait() == 0

    live(work)
