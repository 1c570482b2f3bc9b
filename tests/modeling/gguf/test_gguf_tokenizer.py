"""The tokenizer of a GGUF file: ids, splits, BOS; whether calibration and training see it; save and load."""

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from fulmen import CheckpointError, UnsupportedModelError
from fulmen.data import Document, iter_sequences
from fulmen.data.sequences import opening_ids
from fulmen.modeling.checkpoint import load_dense, save_converted
from fulmen.modeling.gguf.file import GgufModel
from fulmen.modeling.gguf.tokenizer import gguf_tokenizer
from tests.modeling.gguf.tiny_gguf import TEMPLATE, TOKENS, write_gguf
from tests.modeling.gqa.tiny_gqa import make_dense, make_dsa

ID = {token: id_ for id_, token in enumerate(TOKENS)}
PIECES = {"<unk>": 0.0, "<s>": 0.0, "</s>": 0.0, "<0x0A>": 0.0, "<0xC3>": 0.0, "<0xBC>": 0.0}
PIECES |= {"▁": -9.0, "t": -9.1, "h": -9.2, "e": -9.3, "x": -9.4, "▁t": -1.0, "he": -2.0, "▁the": -3.0}
PIECES |= {"th": -2.5, "the": -4.0, "ex": -5.0, "▁x": -6.0, "<|user|>": 0.0}
PIECE_ID = {piece: id_ for id_, piece in enumerate(PIECES)}


def byte_level(**keys):
    values = {"model": "gpt2", "pre": "gpt-2", "tokens": TOKENS, "merges": ["Ġ t", "h e"]}
    values["token_type"] = [3 if token[0] == "<" and len(token) > 1 else 1 for token in TOKENS]
    values |= {"bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 0, **keys}
    return as_model(values)


def sentencepiece(**keys):
    types = [2, 3, 3, 6, 6, 6, *[1] * (len(PIECES) - 7), 4]
    return as_model(
        {
            "model": "llama",
            "tokens": list(PIECES),
            "scores": list(PIECES.values()),
            "token_type": types,
            **keys,
        }
    )


def as_model(values):
    named = {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}
    return GgufModel("m.gguf", {"general.architecture": "llama", **named}, {})


def ids(model, text):
    return gguf_tokenizer(model)(text).input_ids


def pieces(model, text, **options):
    tokenizer = gguf_tokenizer(model)
    return tokenizer.convert_ids_to_tokens(tokenizer(text, **options).input_ids)


class TestByteLevel:
    def test_ids_are_the_files(self):
        tokenizer = gguf_tokenizer(byte_level())
        assert len(tokenizer) == len(TOKENS)
        assert tokenizer.get_vocab() == ID
        assert tokenizer("the he").input_ids == [ID[token] for token in ("t", "he", "Ġ", "he")]
        assert tokenizer("the the").input_ids[2:] == [ID["Ġt"], ID["he"]]
        assert tokenizer.decode(tokenizer("the 12, the").input_ids) == "the 12, the"
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)

    def test_a_control_token_of_other_letters_keeps_its_id(self):
        """As DeepSeek's <｜begin▁of▁sentence｜>: in no byte's spelling."""
        model = byte_level(bos_token_id=ID["<｜start▁here｜>"])
        tokenizer = gguf_tokenizer(model)
        assert tokenizer.bos_token_id == ID["<｜start▁here｜>"] < len(tokenizer)
        assert len(tokenizer) == len(TOKENS)
        assert tokenizer("a<｜start▁here｜>b").input_ids == [ID["a"], ID["<｜start▁here｜>"], ID["b"]]

    @pytest.mark.parametrize(
        ("pre", "parts"),
        [
            ("gpt-2", ["a", " 123", "45", "x", "!?", "  ", " b"]),
            ("smollm", ["a", " ", "1", "2", "3", "4", "5", "x", "!?", "  ", " b"]),
            ("llama-bpe", ["a", " ", "123", "45", "x", "!?", "  ", " b"]),
            ("qwen2", ["a", " ", "1", "2", "3", "4", "5", "x", "!?", "  ", " b"]),
            ("tekken", ["a", " ", "1", "2", "3", "4", "5", "x", "!?", "  ", " b"]),
            ("deepseek-coder", ["a", " ", "1", "2", "3", "4", "5", "x", "!?", "  ", " b"]),
        ],
    )
    def test_splits(self, pre, parts):
        text = "".join(parts)
        splitter = gguf_tokenizer(byte_level(pre=pre)).backend_tokenizer.pre_tokenizer
        assert [text[begin:end] for _, (begin, end) in splitter.pre_tokenize_str(text)] == (
            parts if pre != "gpt-2" else ["a", " 12345", "x", "!?", "  ", " b"]
        )

    def test_the_split_of_smollm_is_the_one_that_it_was_trained_with(self):
        """Its tokenizer.json: every digit by itself, then GPT-2's split."""
        trained = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        ours = gguf_tokenizer(byte_level(pre="smollm")).backend_tokenizer.pre_tokenizer
        text = "I'll pay  12.50 in 2024,\n\n\tthe    rest (x_1 += 3)  "
        assert ours.pre_tokenize_str(text) == trained.pre_tokenize_str(text)

    def test_words_that_are_tokens(self):
        """llama-bpe takes them whole though no merge leads there."""
        tokens = [*TOKENS[:10], "tex", *TOKENS[11:]]
        types = [1] * len(tokens)
        assert pieces(
            byte_level(pre="llama-bpe", tokens=tokens, token_type=types, add_bos_token=False), "tex"
        ) == ["tex"]
        assert pieces(byte_level(pre="gpt-2", tokens=tokens, token_type=types), "tex") == ["t", "e", "x"]

    @pytest.mark.parametrize("pre", ["unheard-of", "deepseek-v3", "falcon"])
    def test_an_unknown_split_is_refused(self, pre):
        with pytest.raises(UnsupportedModelError, match=f"tokenizer.ggml.pre='{pre}'"):
            gguf_tokenizer(byte_level(pre=pre))


class TestSentencePiece:
    def test_pairs_are_merged_by_score(self):
        """Worked out by hand: ▁t (-1), he (-2), ▁the; without the prefix he, the."""
        assert pieces(sentencepiece(), "the", add_special_tokens=False) == ["▁the"]
        assert pieces(sentencepiece(add_space_prefix=False), "the", add_special_tokens=False) == ["the"]
        assert pieces(sentencepiece(), "tex x", add_special_tokens=False) == ["▁t", "ex", "▁x"]

    def test_bytes_stand_for_what_is_no_piece(self):
        assert pieces(sentencepiece(), "x\nü", add_special_tokens=False) == [
            "▁x",
            "<0x0A>",
            "<0xC3>",
            "<0xBC>",
        ]
        tokenizer = gguf_tokenizer(sentencepiece())
        assert tokenizer.decode(tokenizer("the x\nü", add_special_tokens=False).input_ids) == "the x\nü"

    def test_user_defined_pieces_stay_whole(self):
        assert pieces(sentencepiece(), "x<|user|>", add_special_tokens=False) == ["▁x", "<|user|>"]

    def test_runs_of_spaces_are_pieces_as_long_as_they_can_be(self):
        """As in Gemma's files, which hold them as spaces: found before any pair is merged."""
        runs = ["  ", "   ", "\n\n"]
        tokens, scores = [*PIECES, *runs], [*PIECES.values(), *[-1000.0] * len(runs)]
        types = [2, 3, 3, 6, 6, 6, *[1] * (len(PIECES) - 7), 4, *[4] * len(runs)]
        model = sentencepiece(tokens=tokens, scores=scores, token_type=types, add_space_prefix=False)
        text = "x x  the     x\n\n\n"
        expected = ["x", "▁x", "  ", "the", "   ", "  ", "x", "\n\n", "<0x0A>"]
        assert pieces(model, text, add_special_tokens=False) == expected
        tokenizer = gguf_tokenizer(model)
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text

    def test_default_ids(self):
        tokenizer = gguf_tokenizer(sentencepiece())
        assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
        assert len(tokenizer) == len(PIECES)


class TestBos:
    @pytest.mark.parametrize(
        ("make", "keys", "expected"),
        [
            (byte_level, {}, False),
            (byte_level, {"add_bos_token": True}, True),
            (byte_level, {"add_bos_token": False}, False),
            (byte_level, {"pre": "qwen2"}, False),
            (byte_level, {"pre": "llama-bpe"}, True),
            (byte_level, {"pre": "tekken"}, True),
            (byte_level, {"pre": "llama-bpe", "add_bos_token": False}, False),
            (sentencepiece, {}, True),
            (sentencepiece, {"add_bos_token": False}, False),
        ],
    )
    def test_as_the_file_says_or_llama_cpp_takes_it(self, make, keys, expected):
        tokenizer = gguf_tokenizer(make(**keys))
        assert tokenizer.add_bos_token is expected
        assert (tokenizer("x").input_ids[0] == 1) is expected
        assert opening_ids(tokenizer) == ([1] if expected else [])

    def test_eos(self):
        assert ids(byte_level(add_eos_token=True), "xx")[-1] == 2
        assert ids(byte_level(), "xx")[-1] != 2

    @pytest.mark.parametrize("name", ["bos", "eos"])
    def test_wanted_and_not_named(self, name):
        with pytest.raises(CheckpointError, match=f"wants {name.upper()} in every text and names none"):
            gguf_tokenizer(byte_level(**{f"add_{name}_token": True, f"{name}_token_id": None}))

    @pytest.mark.parametrize("adds", [True, False])
    def test_everywhere(self, adds, tmp_path):
        """From the file to windows of text, to the saved tokenizer, to windows of that."""
        path = write_gguf(tmp_path / "m.gguf", make_dense(), keys={"tokenizer.ggml.add_bos_token": adds})
        dense, tokenizer = load_dense(path)
        folder = save_converted(make_dsa(dense), tokenizer, tmp_path / "out", "# A tiny model\n")
        again = AutoTokenizer.from_pretrained(folder)
        text = "the hex <|user|> 12 " * 20
        expected = tokenizer(text).input_ids
        assert (expected[0] == 1) is adds
        assert again(text).input_ids == expected
        assert (again.chat_template, len(again)) == (TEMPLATE, len(TOKENS))
        for made in (tokenizer, again):
            window = next(iter_sequences([Document("d", "prose", text)], made, 16))
            assert (window.input_ids[0].item() == 1) is adds


class TestEnds:
    @pytest.mark.parametrize(
        ("keys", "expected"),
        [
            ({}, 2),
            ({"eot_token_id": 5}, [2, 5]),
            ({"eot_token_id": 2}, 2),
            ({"eot_token_id": 5, "eom_token_id": 6}, [2, 5, 6]),
            ({"eos_token_id": None}, None),
        ],
    )
    def test_all_tokens_that_end_a_text(self, keys, expected, tmp_path):
        named = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
        model, _ = load_dense(write_gguf(tmp_path / "m.gguf", make_dense(), keys=named))
        assert model.config.eos_token_id == expected
        assert model.generation_config.eos_token_id == expected
        assert (model.config.bos_token_id, model.config.pad_token_id) == (1, 0)


class TestRefusals:
    @pytest.mark.parametrize(
        ("keys", "error", "words"),
        [
            ({"tokens": None}, CheckpointError, "no readable tokenizer"),
            ({"tokens": ["a", "a"]}, CheckpointError, "no readable tokenizer"),
            ({"merges": None}, CheckpointError, "no readable tokenizer"),
            ({"merges": ["q nothing"]}, CheckpointError, "no readable tokenizer"),
            ({"model": "t5"}, UnsupportedModelError, "'t5'"),
            ({"model": None}, UnsupportedModelError, "None"),
            ({"eos_token_id": 97}, CheckpointError, "eos_token_id=97 and 97 tokens"),
        ],
    )
    def test_in_one_line(self, keys, error, words):
        with pytest.raises(error, match=words) as info:
            gguf_tokenizer(byte_level(**keys))
        assert "\n" not in str(info.value)

    def test_named_templates(self):
        model = byte_level()
        more = {"tokenizer.chat_template": "a", "tokenizer.chat_template.tool_use": "b"}
        tokenizer = gguf_tokenizer(GgufModel("m.gguf", {**model.metadata, **more}, {}))
        assert tokenizer.chat_template == {"default": "a", "tool_use": "b"}
