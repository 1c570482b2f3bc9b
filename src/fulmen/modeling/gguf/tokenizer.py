"""The tokenizer that a GGUF file describes: byte-level BPE ("gpt2") or SentencePiece's BPE ("llama").

Ids, splits and BOS are llama.cpp's (src/llama-vocab.cpp), which the file was made for. Built here and not by
Transformers, because that reads neither `add_bos_token` nor `add_space_prefix`, splits text as GPT-2 does
where it does not know `tokenizer.ggml.pre`, and gives control tokens like DeepSeek's ids behind all others.
"""

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from fulmen.errors import CheckpointError, UnsupportedModelError, first_line
from fulmen.modeling.gguf.file import GgufModel

_BYTE_LEVEL, _SENTENCEPIECE = "gpt2", "llama"
_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "▁"
# Of a SentencePiece file that names none.
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# One after another, each cutting what the ones before it left.
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
_DIGITS = (r"\p{N}", _GPT2)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")
_SPLITS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "olmo", "mpt"), (_GPT2,)),
    **dict.fromkeys(
        ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"), _DIGITS
    ),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0", "lfm2"), (_LLAMA3,)
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
    "deepseek-coder": _DEEPSEEK_CODER,
}
# A word that is a token is that token, whatever the merges say; texts begin with BOS if the file is silent.
_WHOLE_WORDS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0", "lfm2", "tekken"}


def special_ids(model: GgufModel) -> dict[str, Any]:
    """The config's `bos_token_id`, `eos_token_id` (a list where several end a text) and `pad_token_id`."""
    ends = [_special_id(model, name) for name in ("eos", "eot", "eom")]
    distinct = list(dict.fromkeys(end for end in ends if end is not None))
    return {
        "bos_token_id": _special_id(model, "bos"),
        "eos_token_id": distinct if len(distinct) > 1 else next(iter(distinct), None),
        "pad_token_id": _special_id(model, "padding"),
    }


def gguf_tokenizer(model: GgufModel) -> PreTrainedTokenizerFast:
    """The tokenizer, with the file's chat template.

    Raises:
        CheckpointError: there is none in the file, or its tokens and ids do not fit together.
        UnsupportedModelError: another kind, or text is split in a way that is not known.
    """
    kind, tokens = model.metadata.get("tokenizer.ggml.model"), model.metadata.get("tokenizer.ggml.tokens")
    if not tokens or len(set(tokens)) < len(tokens):
        raise CheckpointError(
            f"{model.path} has no readable tokenizer (no tokens, or some twice); get it anew"
        )
    if kind not in (_BYTE_LEVEL, _SENTENCEPIECE):
        raise UnsupportedModelError(
            f"{model.path} has a tokenizer of the kind {kind!r}; known are {_BYTE_LEVEL} and {_SENTENCEPIECE}"
        )
    try:
        backend = (_byte_level if kind == _BYTE_LEVEL else _sentencepiece)(model, tokens)
    except (UnsupportedModelError, CheckpointError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{model.path} has no readable tokenizer ({first_line(error)}); get it anew"
        ) from error
    types = model.metadata.get("tokenizer.ggml.token_type", ())
    for special, wanted in ((True, _CONTROL), (False, _USER_DEFINED)):
        texts = [text for text, type_ in zip(tokens, types, strict=False) if type_ == wanted]
        added = [AddedToken(text, normalized=False, special=special) for text in texts]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    return _with_special_tokens(model, backend, tokens)


def _with_special_tokens(model: GgufModel, backend: Tokenizer, tokens: list[str]) -> PreTrainedTokenizerFast:
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: _special_id(model, key) for name, key in named.items()}
    special = {name: tokens[id_] for name, id_ in ids.items() if id_ is not None}
    adds = {"add_bos_token": _adds_bos(model), "add_eos_token": _flag(model, "add_eos_token", default=False)}
    for name in ("bos", "eos"):
        if adds[f"add_{name}_token"] and f"{name}_token" not in special:
            raise CheckpointError(
                f"{model.path} wants {name.upper()} in every text and names none; get it anew"
            )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **special, **adds, clean_up_tokenization_spaces=False
    )
    if template := _chat_template(model):
        tokenizer.chat_template = template
    return tokenizer


def _byte_level(model: GgufModel, tokens: list[str]) -> Tokenizer:
    merges = [_pair(merge) for merge in model.metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(
        BPE(
            {token: id_ for id_, token in enumerate(tokens)},
            merges,
            ignore_merges=_pre(model) in _WHOLE_WORDS,
        )
    )
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in _splits(model)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(model: GgufModel, tokens: list[str]) -> Tokenizer:
    """Pairs are merged by the score of the token that they make, and what is no token is written in bytes."""
    ids = {token: id_ for id_, token in enumerate(tokens)}
    unknown = tokens[_special_id(model, "unknown") or 0]
    merges = model.metadata.get("tokenizer.ggml.merges")
    pairs = [_pair(merge) for merge in merges] if merges else _merges_by_score(ids, _scores(model, tokens))
    backend = Tokenizer(BPE(ids, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = _flag(model, "add_space_prefix", default=True)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=_SPACE, prepend_scheme="first" if prefix else "never", split=False
    )
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges_by_score(ids: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, those of the best score first, of equal ones the lowest id."""
    ranked = sorted(ids, key=lambda token: (-scores[token], ids[token]))
    cuts = ((token[:cut], token[cut:]) for token in ranked for cut in range(1, len(token)))
    return [(left, right) for left, right in cuts if left in ids and right in ids]


def _scores(model: GgufModel, tokens: list[str]) -> dict[str, float]:
    scores = model.metadata["tokenizer.ggml.scores"]
    return dict(zip(tokens, scores, strict=True))


def _pair(merge: str) -> tuple[str, str]:
    """A merge's two sides; a side may begin with a space."""
    cut = merge.index(" ", 1)
    return merge[:cut], merge[cut + 1 :]


def _pre(model: GgufModel) -> str:
    return model.metadata.get("tokenizer.ggml.pre") or "default"


def _splits(model: GgufModel) -> tuple[str, ...]:
    if (pre := _pre(model)) not in _SPLITS:
        raise UnsupportedModelError(
            f"{model.path} splits text by tokenizer.ggml.pre={pre!r}, which is not known, so its tokens "
            "would be others; convert the original checkpoint instead"
        )
    return _SPLITS[pre]


def _adds_bos(model: GgufModel) -> bool:
    sentencepiece = model.metadata["tokenizer.ggml.model"] == _SENTENCEPIECE
    return _flag(model, "add_bos_token", default=sentencepiece or _pre(model) in _WHOLE_WORDS)


def _flag(model: GgufModel, name: str, *, default: bool) -> bool:
    return bool(model.metadata.get(f"tokenizer.ggml.{name}", default))


def _special_id(model: GgufModel, name: str) -> int | None:
    sentencepiece = model.metadata.get("tokenizer.ggml.model") == _SENTENCEPIECE
    id_ = model.metadata.get(f"tokenizer.ggml.{name}_token_id")
    if id_ is None:
        return _SENTENCEPIECE_IDS.get(name) if sentencepiece else None
    tokens = model.metadata.get("tokenizer.ggml.tokens", ())
    if tokens and not 0 <= id_ < len(tokens):
        raise CheckpointError(
            f"{model.path} has tokenizer.ggml.{name}_token_id={id_} and {len(tokens)} tokens; get it anew"
        )
    return id_


def _chat_template(model: GgufModel) -> str | dict[str, str] | None:
    """The template, or a dict of them by name where there are more."""
    main, prefix = "tokenizer.chat_template", "tokenizer.chat_template."
    named = {key.removeprefix(prefix): text for key, text in model.metadata.items() if key.startswith(prefix)}
    default = model.metadata.get(main)
    if not named:
        return default
    return named if default is None else {"default": default, **named}
