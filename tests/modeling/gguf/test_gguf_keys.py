"""Every key that gguf-py knows: what becomes of it in a file of one of our architectures."""

import math

import pytest
from gguf.constants import Keys

from fulmen import UnsupportedModelError
from fulmen.modeling.gguf.config import GGUF_ARCHITECTURES
from fulmen.modeling.gguf.file import GgufModel, read_gguf
from fulmen.modeling.gguf.keys import require_known_keys
from fulmen.modeling.gguf.tokenizer import gguf_tokenizer
from fulmen.modeling.gguf.weights import read_sound_gguf
from tests.modeling.gguf.tiny_gguf import TOKENS, make_source, shape_keys, tokenizer_keys, write_gguf

# Values that differ from what a file without the key means: they change config or tokenizer, or contradict.
READ = {
    "vocab_size": 96,
    "context_length": 1024,
    "embedding_length": 128,
    "block_count": 2,
    "feed_forward_length": 128,
    "attention.head_count": 8,
    "attention.head_count_kv": 4,
    "attention.key_length": 32,
    "attention.value_length": 32,
    "attention.layer_norm_rms_epsilon": 0.5,
    "attention.sliding_window": 64,
    "attention.scale": 0.5,
    "rope.dimension_count": 8,
    "rope.freq_base": 5e5,
    "rope.scale_linear": 2.0,
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 2.0,
    "rope.scaling.attn_factor": 1.5,
    "rope.scaling.original_context_length": 64,
    "rope.scaling.yarn_ext_factor": 0.5,
    "rope.scaling.yarn_attn_factor": 1.5,
    "rope.scaling.yarn_beta_fast": 16.0,
    "rope.scaling.yarn_beta_slow": 2.0,
}
# Of one architecture alone; refused in the others.
READ_OF = {"gemma3": {"attention.sliding_window_pattern": 2, "rope.freq_base_swa": 7e3}}
INERT = {"tensor_data_layout": "Meta AI original pth", "rope.scaling.finetuned": True}
# Everything else in the architecture's namespace is refused; these values are not zero and yet say "no".
NEUTRAL = {
    "attention.causal": True,
    "attention.output_scale": 1.0,
    "embedding_scale": 1.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "rope.scaling.alpha": 1.0,
}
CHANGED = {"attention.causal": False}
TOKENIZER_READ = {
    "tokenizer.ggml.model": "bert",
    "tokenizer.ggml.pre": "unheard-of",
    "tokenizer.ggml.tokens": [*TOKENS[:-1], "other"],
    "tokenizer.ggml.token_type": [1] * len(TOKENS),
    "tokenizer.ggml.merges": ["h e"],
    "tokenizer.ggml.bos_token_id": 2,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.eot_token_id": 5,
    "tokenizer.ggml.eom_token_id": 5,
    "tokenizer.ggml.unknown_token_id": 5,
    "tokenizer.ggml.padding_token_id": 5,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.add_eos_token": True,
    "tokenizer.chat_template": "{{ messages }}",
    "tokenizer.chat_template.{name}": "{{ tools }}",
}
# Read of SentencePiece files, as in test_gguf_tokenizer.
SENTENCEPIECE_READ = {"tokenizer.ggml.scores", "tokenizer.ggml.add_space_prefix"}
TOKENIZER_INERT = {
    "tokenizer.ggml.token_type_count": 2,
    "tokenizer.ggml.seperator_token_id": 5,
    "tokenizer.ggml.mask_token_id": 5,
    "tokenizer.huggingface.json": "{}",
    "tokenizer.rwkv.world": "a",
    "tokenizer.chat_templates": ["name"],
    **{f"tokenizer.ggml.fim_{kind}_token_id": 5 for kind in ("pre", "suf", "mid", "pad", "rep", "sep")},
    **{f"tokenizer.ggml.{kind}_token_id": 5 for kind in ("prefix", "suffix", "middle")},
}
TOKENIZER_REFUSED = {
    "tokenizer.ggml.add_sep_token": True,
    "tokenizer.ggml.remove_extra_whitespaces": True,
    "tokenizer.ggml.precompiled_charsmap": [1, 2],
}
# Namespaces that say nothing of a language model's numbers, or belong to a file of another kind.
DESCRIPTIVE = ("general.", "split.", "imatrix.")
FOREIGN = ("adapter.", "clip.", "diffusion.", "xielu.")


def known_to_gguf_py(group=Keys):
    keys = set()
    for name, value in vars(group).items():
        if isinstance(value, str) and not name.startswith("_"):
            keys.add(value)
        elif isinstance(value, type):
            keys |= known_to_gguf_py(value)
    return keys


ALL_KEYS = known_to_gguf_py()
OF_ARCHITECTURE = sorted(key.removeprefix("{arch}.") for key in ALL_KEYS if key.startswith("{arch}."))
REFUSED = sorted(set(OF_ARCHITECTURE) - READ.keys() - INERT.keys())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """architecture -> a file with no more than it needs, read."""
    folder = tmp_path_factory.mktemp("gguf")
    return {
        name: read_gguf(write_gguf(folder / f"{name}.gguf", make_source(name))) for name in GGUF_ARCHITECTURES
    }


def with_keys(model, keys):
    named = {key if "tokenizer" in key else f"{model.architecture}.{key}": keys[key] for key in keys}
    return GgufModel(model.path, {**model.metadata, **named}, model.tensors)


def outcome(model, monkeypatch):
    """What a user gets: config and tokenizer, or the refusal."""
    monkeypatch.setattr("fulmen.modeling.gguf.weights.read_gguf", lambda path: model)
    try:
        config = read_sound_gguf(model.path)[1].to_dict()
        tokenizer = gguf_tokenizer(model)
    except ValueError as error:
        return str(error)
    text = "the the 12 <|user|> <pad> other"
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return config, tokenizer(text).input_ids, special, tokenizer.chat_template, tokenizer.all_special_ids


def test_every_key_is_accounted_for():
    """A newer gguf-py with a new key fails here: say what becomes of it."""
    tokenizers = (
        TOKENIZER_READ.keys() | SENTENCEPIECE_READ | TOKENIZER_INERT.keys() | TOKENIZER_REFUSED.keys()
    )
    left = {key for key in ALL_KEYS if not key.startswith(("{arch}.", *DESCRIPTIVE, *FOREIGN))} - tokenizers
    assert not left
    assert set(OF_ARCHITECTURE) == {*READ, *INERT, *REFUSED} - {"rope.scale_linear"}
    assert set(REFUSED) == {
        *("activation_sparsity_scale", "altup.active_idx", "altup.num_inputs", "attention.causal"),
        *("attention.clamp_kqv", "attention.decay_lora_rank", "attention.gate_lora_rank"),
        *("attention.group_norm_epsilon", "attention.group_norm_groups", "attention.iclr_lora_rank"),
        *("attention.indexer.head_count", "attention.indexer.key_length", "attention.indexer.top_k"),
        *("attention.key_length_mla", "attention.key_length_swa", "attention.kv_lora_rank"),
        *("attention.layer_norm_epsilon", "attention.max_alibi_bias", "attention.output_scale"),
        *("attention.q_lora_rank", "attention.relative_buckets_count", "attention.shared_kv_layers"),
        *("attention.sliding_window_pattern", "attention.temperature_length", "attention.temperature_scale"),
        *(
            "attention.value_length_mla",
            "attention.value_length_swa",
            "attention.value_residual_mix_lora_rank",
        ),
        *("attn_logit_softcapping", "classifier.output_labels", "convnext.block_count"),
        *(
            "convnext.embedding_length",
            "decoder_block_count",
            "decoder_start_token_id",
            "embedding_length_out",
        ),
        *("embedding_length_per_layer_input", "embedding_scale", "expert_chunk_feed_forward_length"),
        *("expert_count", "expert_feed_forward_length", "expert_gating_func", "expert_group_count"),
        *("expert_group_scale", "expert_group_used_count", "expert_shared_count"),
        *("expert_shared_feed_forward_length", "expert_used_count", "expert_weights_norm"),
        *("expert_weights_scale", "experts_per_group", "features_length", "final_logit_softcapping"),
        *(
            "full_attention_interval",
            "interleave_moe_layer_step",
            "kda.head_dim",
            "leading_dense_block_count",
        ),
        *(
            "logit_scale",
            "moe_every_n_layers",
            "moe_latent_size",
            "n_deepstack_layers",
            "nextn_predict_layers",
        ),
        *("pooling_type", "posnet.block_count", "posnet.embedding_length", "rescale_every_n_layers"),
        *("residual_scale", "rope.dimension_count_swa", "rope.dimension_sections", "rope.freq_base_swa"),
        *("rope.scaling.alpha", "rope.scaling.yarn_log_multiplier", "router_logit_softcapping"),
        *("shortconv.l_cache", "ssm.conv_kernel", "ssm.dt_b_c_rms", "ssm.group_count", "ssm.inner_size"),
        *("ssm.state_size", "ssm.time_step_rank", "swiglu_clamp_exp", "swiglu_clamp_shexp", "swin_norm"),
        *("time_decay_extra_dim", "time_mix_extra_dim", "token_shift_count", "use_parallel_residual"),
        *("wkv.head_size", "{dense}_feat_in", "{dense}_feat_out"),
    }


@pytest.mark.parametrize("architecture", GGUF_ARCHITECTURES)
def test_keys_that_are_read_change_the_outcome(architecture, plain, monkeypatch):
    model = plain[architecture]
    for key, value in {**READ, **READ_OF.get(architecture, {}), **TOKENIZER_READ}.items():
        base = {}
        if key.startswith("rope.scaling.") and key not in ("rope.scaling.type", "rope.scaling.factor"):
            base = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
        elif key == "rope.scaling.type":
            base = {"rope.scaling.factor": 4.0}
        without = outcome(with_keys(model, base), monkeypatch)
        assert not isinstance(without, str), without
        changed = outcome(with_keys(model, {**base, key.replace("{name}", "tool_use"): value}), monkeypatch)
        assert changed != without, key


@pytest.mark.parametrize("architecture", GGUF_ARCHITECTURES)
def test_keys_without_effect_change_nothing(architecture, plain, monkeypatch):
    model = plain[architecture]
    without = outcome(model, monkeypatch)
    assert outcome(with_keys(model, {**INERT, **NEUTRAL, **TOKENIZER_INERT}), monkeypatch) == without
    more = {
        "general.sampling.temp": 0.5,
        "quantize.imatrix.file": "x",
        "somebody.note": "y",
        "gpt2.context_length": 9,
    }
    described = GgufModel(model.path, {**model.metadata, **more}, model.tensors)
    assert outcome(described, monkeypatch) == without


@pytest.mark.parametrize("architecture", GGUF_ARCHITECTURES)
def test_keys_that_are_refused(architecture, plain):
    model = plain[architecture]
    for key in [*REFUSED, "something.new"]:
        value = CHANGED.get(key, 3)
        if key == "attention.causal" or key in READ_OF.get(architecture, {}):
            continue
        with pytest.raises(UnsupportedModelError, match=r"sets .*=3") as info:
            require_known_keys(with_keys(model, {key: value}))
        assert f"sets {architecture}.{key}=3" in str(info.value)
        for no in (0, 0.0, False, "", [], [0, 0]):
            require_known_keys(with_keys(model, {key: no}))
        with pytest.raises(UnsupportedModelError, match="2 values"):
            require_known_keys(with_keys(model, {key: [0, 1]}))
    for key, value in TOKENIZER_REFUSED.items():
        with pytest.raises(UnsupportedModelError, match=key):
            require_known_keys(with_keys(model, {key: value}))


@pytest.mark.parametrize("namespace", FOREIGN)
def test_keys_of_a_file_of_another_kind(namespace, plain):
    model = plain["llama"]
    foreign = GgufModel(model.path, {**model.metadata, f"{namespace}type": "lora"}, model.tensors)
    with pytest.raises(UnsupportedModelError, match=f"{namespace}type='lora'"):
        require_known_keys(foreign)


def test_values_that_agree_with_the_tensors_are_no_obstacle(plain, monkeypatch):
    """`attention.scale` and a window as wide as the context say what is so anyway."""
    model = plain["llama"]
    agreeing = {
        "attention.scale": 1 / math.sqrt(16),
        "attention.sliding_window": 512,
        "rope.dimension_count": 16,
    }
    agreeing |= {"vocab_size": len(TOKENS)}
    assert outcome(with_keys(model, agreeing), monkeypatch) == outcome(model, monkeypatch)


def test_the_tiny_files_have_all_that_a_converter_writes():
    for name in GGUF_ARCHITECTURES:
        written = {key.removeprefix(f"{name}.") for key in shape_keys(make_source(name), name)}
        assert written <= READ.keys() | READ_OF.get(name, {}).keys()
    assert tokenizer_keys().keys() <= TOKENIZER_READ.keys()
