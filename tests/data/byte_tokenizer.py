"""A tokenizer with one token per byte, made on the spot; with or without BOS and EOS."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(bos: str | None = None, eos: str | None = "<eos>") -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([token for token in (bos, eos) if token])
    if bos:
        template = [(bos, core.token_to_id(bos))]
        core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=template)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, model_max_length=64)
