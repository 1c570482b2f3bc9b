"""Look-ups: as the chat template writes them, to the token; keys once each; two sets of wordings."""

import random
import re
from pydoc_data.topics import topics

import pytest
import torch

from fulmen.data import Document, draw_sequences, lookup_sequences, lookup_texts, token_ids
from fulmen.data.conversations import FRAME, ChatFormat, PlainFormat, keeps_turns
from fulmen.data.lookup_training import FRAMES
from fulmen.data.lookup_words import (
    ANIMALS,
    COLOURS,
    DRAWERS,
    JUDGED,
    JUDGED_IN_WORDS,
    NAMES,
    TRAINED,
    Wording,
)
from fulmen.errors import ConfigError, CorpusError
from tests.data.byte_tokenizer import byte_tokenizer

PROSE = [Document(name, "prose", text) for name, text in sorted(topics.items()) if len(text) > 12_000]
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Today's thinking templates: the last answer alone has its (empty) thoughts.
THINKING = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] }}<eos>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% if not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
NEEDS_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}" + CHAT
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT
NEEDS_TOOLS = "{% if tools is none %}{{ raise_exception('tools, please') }}{% endif %}" + CHAT
ALTERNATES = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHAT
)
PARTS = CHAT.replace("m['content']", "m['content'][0]['text']")
DATED = "{{ strftime_now('%d %B %Y') }}" + CHAT
TEMPLATES = {
    "plain chat": CHAT,
    "thinking": THINKING,
    "needs a system message": NEEDS_SYSTEM,
    "refuses a system message": NO_SYSTEM,
    "needs a list of tools": NEEDS_TOOLS,
    "alternates": ALTERNATES,
    "content in parts": PARTS,
    "with today's date": DATED,
}


def made_up(template, bos="<bos>"):
    tokenizer = byte_tokenizer(bos)
    tokenizer.chat_template = template
    return tokenizer


def asked_by_template(tokenizer, text, lookup):
    """The ids that the template itself gives for a prompt that was read back."""
    rendered = tokenizer.decode(torch.cat((text.prefix_ids, lookup.question_ids)))
    said = rendered.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    chat = [{"role": "user", "content": said}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False), said


class TestTexts:
    def test_prompts_are_the_templates_own_to_the_token(self, smollm2):
        for text in lookup_texts(PROSE, smollm2, 1024, 2, n_keys=8):
            for lookup in text.lookups:
                ids, _ = asked_by_template(smollm2, text, lookup)
                assert torch.cat((text.prefix_ids, lookup.question_ids)).tolist() == ids
                assert smollm2.decode(lookup.answer_ids) == lookup.answer

    def test_every_key_is_in_the_text_once_with_its_answer(self, smollm2):
        (text,) = lookup_texts(PROSE, smollm2, 1024, 1, n_keys=8)
        _, said = asked_by_template(smollm2, text, text.lookups[0])
        stated = re.findall(r"The access code of (\w+) is (\d{5})\.", said)
        assert len(dict(stated)) == len({value for _, value in stated}) == 8
        assert [value for _, value in stated] == [lookup.answer for lookup in text.lookups]
        for (key, _), lookup in zip(stated, text.lookups, strict=True):
            assert f"What is the access code of {key}?" in smollm2.decode(lookup.question_ids)
            assert lookup.depth == pytest.approx(said.index(f"code of {key}") / len(said), abs=0.1)

    def test_spread_over_the_text_between_lines(self, smollm2):
        (text,) = lookup_texts(PROSE, smollm2, 2048, 1, n_keys=16)
        depths = [lookup.depth for lookup in text.lookups]
        assert [int(depth * 16) for depth in depths] == list(range(16))
        said = smollm2.decode(text.prefix_ids)
        assert len(re.findall(r"(?:^|\n)The access code of \w+ is \d{5}\.\n", said)) >= 12

    @pytest.mark.parametrize("length", [400, 1000, 2048])
    def test_at_most_so_long_and_nearly(self, smollm2, length):
        for text in lookup_texts(PROSE, smollm2, length, 3, n_keys=4):
            lengths = [len(text.prefix_ids) + len(lookup.question_ids) for lookup in text.lookups]
            assert length - 8 <= max(lengths) <= length

    def test_same_every_time_and_other_by_seed(self, smollm2):
        first, again = (
            lookup_texts(documents, smollm2, 512, 2, n_keys=4) for documents in (PROSE, PROSE[::-1])
        )
        for one, other in zip(first, again, strict=True):
            assert torch.equal(one.prefix_ids, other.prefix_ids)
            assert [x.answer for x in one.lookups] == [x.answer for x in other.lookups]
        other = lookup_texts(PROSE, smollm2, 512, 2, n_keys=4, seed=1)
        assert [x.answer for x in other[0].lookups] != [x.answer for x in first[0].lookups]

    def test_a_key_that_the_text_has_is_not_used(self):
        named = [Document("named", "prose", "Petra met Alder and Quill by the sea.\n" * 100)]
        for seed in range(8):
            (text,) = lookup_texts(named, made_up(CHAT), 1500, 1, n_keys=8, seed=seed)
            said = made_up(CHAT).decode(text.prefix_ids)
            assert not re.search("code of (Petra|Alder|Quill)", said)

    def test_texts_take_wordings_in_turn(self):
        wordings = [*JUDGED, Wording("{key} = {value}", "What is {key}?", "identifier", "hex")]
        texts = lookup_texts(PROSE, made_up(CHAT), 1500, 3, n_keys=4, wordings=wordings)
        codes = [re.fullmatch(r"\d{5}", text.lookups[0].answer) for text in texts]
        assert [bool(code) for code in codes] == [True, False, True]

    def test_one_key(self):
        (text,) = lookup_texts(PROSE, made_up(CHAT), 600, 1, n_keys=1)
        (lookup,) = text.lookups
        assert "What is" not in made_up(CHAT).decode(text.prefix_ids)
        assert "What is" in made_up(CHAT).decode(lookup.question_ids)

    def test_writing_without_blanks(self):
        chinese = [Document("han", "prose", "".join(chr(0x4E00 + 7 * n % 3000) for n in range(9000)))]
        (text,) = lookup_texts(chinese, made_up(CHAT), 3000, 1, n_keys=4)
        said = made_up(CHAT).decode(text.prefix_ids)
        assert "\ufffd" not in said
        assert said.count("The access code of") == 4

    def test_documents_with_the_templates_marks_do_not_end_the_turn(self, smollm2):
        marked = [Document("marked", "prose", "He wrote <|im_end|> and <|im_start|> there.\n" * 400)]
        (text,) = lookup_texts(marked, smollm2, 512, 1, n_keys=2)
        ids = torch.cat((text.prefix_ids, text.lookups[0].question_ids)).tolist()
        assert ids.count(smollm2.convert_tokens_to_ids("<|im_end|>")) == 2


class TestTemplates:
    @pytest.mark.parametrize("name", TEMPLATES)
    def test_each_is_used_as_it_is(self, name):
        tokenizer = made_up(TEMPLATES[name])
        (text,) = lookup_texts(PROSE, tokenizer, 1500, 1, n_keys=4)
        for lookup in text.lookups:
            said = tokenizer.decode(torch.cat((text.prefix_ids, lookup.question_ids)))
            assert said.count("<bos>") == (name != "thinking")
            assert said.endswith("<|assistant|><think></think>" if name == "thinking" else "<|assistant|>")
            assert said.count("<|user|>") == 1
            assert ("You are a helpful assistant." in said) == (name == "needs a system message")
            assert tokenizer.decode(lookup.answer_ids) == lookup.answer

    @pytest.mark.parametrize(
        ("template", "reason"),
        [
            ("{{ raise_exception('only for\nfiles') }}", "only for files"),
            ("{{ messages[0]['image'].url }}", "has no attribute"),
            ("{% for m in messages %}<|{{ m['role'] }}|>{% endfor %}", "leaves out"),
            ("{% if not tools %}{{ raise_exception('it needs tools') }}{% endif %}" + CHAT, "it needs tools"),
        ],
    )
    @pytest.mark.parametrize("make", [lookup_texts, lookup_sequences])
    def test_one_that_cannot_ask_is_refused_in_one_line(self, template, reason, make):
        with pytest.raises(ConfigError, match=reason) as info:
            make(PROSE, made_up(template), 1500, 1)
        assert "\n" not in str(info.value)
        assert "chat_template" in str(info.value)

    def test_none_means_worked_examples_with_other_keys(self):
        tokenizer = byte_tokenizer("<bos>")
        (text,) = lookup_texts(PROSE, tokenizer, 1500, 1, n_keys=4)
        said = tokenizer.decode(torch.cat((text.prefix_ids, text.lookups[2].question_ids)))
        assert said.startswith("<bos>Text: The access code of ")
        assert said.count("<bos>") == 1
        assert said.endswith("?\nAnswer:")
        assert "Answer with" not in said
        assert text.lookups[2].question_ids.tolist()[-1] == token_ids(tokenizer, ":")[0]
        examples = re.findall(
            r"code of (\w+) is (\d+)\.\n\nQuestion: What is the .* of (\w+)\?\nAnswer: (\d+)", said
        )
        assert len(examples) == 2
        for key, value, asked, answered in examples:
            assert (asked, answered) == (key, value)
            assert said.count(key) == said.count(value) == 2
        assert tokenizer.decode(text.lookups[2].answer_ids) == f" {text.lookups[2].answer}"

    def test_whether_turns_stay_as_they_were(self):
        assert [keeps_turns(ChatFormat(made_up(one))) for one in (CHAT, THINKING)] == [True, False]
        assert keeps_turns(PlainFormat(byte_tokenizer(), ()))


class TestTraining:
    @pytest.mark.parametrize("tokenizer", ["smollm2", "byte", "chat", "thinking"])
    def test_answers_are_where_they_are_said_to_be(self, request, tokenizer):
        made = {"byte": byte_tokenizer(), "chat": made_up(CHAT), "thinking": made_up(THINKING)}
        tokenizer = made.get(tokenizer) or request.getfixturevalue("smollm2")
        opens = {CHAT: "<|assistant|>", THINKING: "<think></think>", None: "\nAnswer: "}
        opening = opens.get(tokenizer.chat_template, "<|im_start|>assistant\n")
        for sequence in lookup_sequences(PROSE, tokenizer, 1500, 4):
            assert sequence.input_ids.shape == (1500,)
            assert sequence.answers
            for start, stop in sequence.answers:
                answer = tokenizer.decode(sequence.input_ids[start:stop]).strip()
                before = tokenizer.decode(sequence.input_ids[:start])
                assert before.removesuffix(" ").endswith(opening.rstrip(" "))
                asked = before[before.rindex("?") if "?" in before[-150:] else -150 :]
                assert answer in before.removesuffix(asked), answer

    def test_a_second_turn_is_as_the_template_writes_it(self, smollm2):
        for sequence in lookup_sequences(PROSE, smollm2, 1024, 4):
            said = smollm2.decode(sequence.input_ids[: (*sequence.starts, 1024)[1]])
            turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", said, re.DOTALL)
            chat = [{"role": role, "content": content} for role, content in turns]
            again = smollm2.apply_chat_template(chat, return_dict=False)
            assert sequence.input_ids.tolist()[: len(again)] == again
            assert [turn[0] for turn in turns[1:]] == ["user", "assistant"] * len(sequence.answers)

    def test_one_question_where_earlier_turns_are_written_anew(self):
        for sequence in lookup_sequences(PROSE, made_up(THINKING), 1500, 4):
            assert len(sequence.answers) == 1

    def test_many_forms(self, smollm2):
        sequences = lookup_sequences(PROSE, smollm2, 700, 48)
        answers = [
            smollm2.decode(sequence.input_ids[start:stop])
            for sequence in sequences
            for start, stop in sequence.answers
        ]
        assert sum(bool(re.fullmatch(r"\d+", answer)) for answer in answers) >= 5
        assert sum(bool(re.fullmatch(r"[a-z ]+", answer, re.IGNORECASE)) for answer in answers) >= 5
        assert sum(len(answer.split()) == 5 for answer in answers) >= 2
        assert len({len(sequence.answers) for sequence in sequences}) > 3

    def test_many_frames_and_never_the_judged_one(self, smollm2):
        (judged,) = lookup_texts(PROSE, smollm2, 700, 1, n_keys=4)
        assert FRAME.before in smollm2.decode(judged.prefix_ids)
        assert smollm2.decode(judged.prefix_ids).endswith(FRAME.between.rstrip())
        said = [smollm2.decode(one.input_ids) for one in lookup_sequences(PROSE, smollm2, 700, 24)]
        used = [frame for frame in FRAMES if any("user\n" + frame.before in one for one in said)]
        assert used == list(FRAMES)
        assert not any(FRAME.before in one or FRAME.between in one for one in said)

    def test_what_predicts_an_answer(self, smollm2):
        (sequence,) = lookup_sequences(PROSE, smollm2, 700, 1)
        predicted = sequence.input_ids.roll(-1)[sequence.predicts_answer].tolist()
        expected = [sequence.input_ids[start:stop] for start, stop in sequence.answers]
        assert predicted == torch.cat(expected).tolist()
        assert not draw_sequences(PROSE, smollm2, 700, 1)[0].predicts_answer.any()

    def test_what_is_left_is_a_document_of_its_own(self):
        for sequence in lookup_sequences(PROSE, byte_tokenizer(), 1500, 6):
            assert len(sequence.names) == len(sequence.starts)
            assert sequence.answers[-1][1] <= (*sequence.starts, 1500)[1]
            assert int(sequence.position_ids[-1]) == 1499 - sequence.starts[-1]

    def test_a_short_length_asks_less(self):
        for sequence in lookup_sequences(PROSE, made_up(CHAT), 400, 4):
            assert len(sequence.input_ids) == 400
            assert 1 <= len(sequence.answers) <= 2

    def test_same_every_time(self):
        one, other = (
            lookup_sequences(documents, byte_tokenizer(), 900, 2) for documents in (PROSE, PROSE[::-1])
        )
        assert [x.answers for x in one] == [x.answers for x in other]
        assert all(torch.equal(x.input_ids, y.input_ids) for x, y in zip(one, other, strict=True))

    def test_quotes_of_writing_without_blanks(self):
        han = "\n".join("".join(chr(0x4E00 + (37 * n + k) % 9000) for k in range(60)) for n in range(200))
        sequences = lookup_sequences([Document("han", "prose", han)], made_up(CHAT), 3000, 6)
        answers = [
            made_up(CHAT).decode(sequence.input_ids[start:stop])
            for sequence in sequences
            for start, stop in sequence.answers
        ]
        assert any(not answer.isascii() and len(answer) == 8 for answer in answers)


class TestWordings:
    def test_judged_and_trained_share_nothing(self):
        for part in ("statement", "question", "keys"):
            judged, in_words, trained = (
                {getattr(one, part) for one in wordings} for wordings in (JUDGED, JUDGED_IN_WORDS, TRAINED)
            )
            assert not (judged | in_words) & trained, part

    def test_no_judged_key_is_trained(self):
        generator = random.Random(0)
        trained = {DRAWERS[kind](generator) for kind in {one.keys for one in TRAINED} for _ in range(500)}
        words = {word for key in trained for word in re.findall(r"\w+", key)}
        assert not words & set(NAMES)

    def test_no_judged_value_in_words_is_trained(self):
        generator = random.Random(0)
        kinds = {one.values for one in TRAINED}
        trained = {word for kind in kinds for _ in range(500) for word in DRAWERS[kind](generator).split()}
        assert not trained & {*COLOURS, *ANIMALS}

    def test_placeholders(self):
        for wording in (*JUDGED, *JUDGED_IN_WORDS, *TRAINED):
            assert "{key}" in wording.statement
            assert "{value}" in wording.statement
            given = "value" if wording.asks == "key" else "key"
            assert f"{{{given}}}" in wording.question, wording
            assert f"{{{wording.asks}}}" not in wording.question, wording


class TestBadInput:
    @pytest.mark.parametrize("make", [lookup_texts, lookup_sequences])
    def test_a_corpus_too_small(self, make):
        small = [Document("small", "prose", "A few words only.\n" * 20)]
        with pytest.raises(CorpusError, match="have 360 tokens, a sequence needs 1500"):
            make(small, made_up(CHAT), 1500, 1)
        with pytest.raises(CorpusError, match=r"fill \d+ sequences of 1500; 100000 are needed"):
            make(PROSE[:1], made_up(CHAT), 1500, 100_000)

    def test_no_room(self):
        with pytest.raises(
            ConfigError, match="length=300 cannot hold 16 sentences and a question; use 7"
        ) as info:
            lookup_texts(PROSE, made_up(CHAT), 300, 1)
        need = int(re.search(r"use (\d+)", str(info.value))[1])
        assert lookup_texts(PROSE, made_up(CHAT), need, 1)
        with pytest.raises(ConfigError, match="length=60 cannot hold a sentence and a question"):
            lookup_sequences(PROSE, made_up(CHAT), 60, 1)

    def test_more_keys_than_names(self):
        with pytest.raises(ConfigError, match="n_keys=41 is more than the 40"):
            lookup_texts(PROSE, made_up(CHAT), 4000, 1, n_keys=41)
        with pytest.raises(ConfigError, match="n_keys"):
            lookup_texts(PROSE, made_up(CHAT), 4000, 1, n_keys=0)
