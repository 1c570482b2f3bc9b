"""Families: who is known, what may be converted, what the errors say."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GemmaConfig,
    MistralConfig,
)

from fulmen import AlreadyConvertedError, ConfigError, DsaConfig, UnsupportedModelError, set_topk
from fulmen.modeling import families
from fulmen.modeling.families import (
    all_families,
    dsa_family_for,
    family_for,
    family_for_type,
    full_attention_layers,
    known_types,
    vision_names,
)
from fulmen.modeling.gqa.family import GqaFamily
from fulmen.modeling.gqa.model import require_dsa
from fulmen.modeling.missing_family import entry_keywords
from fulmen.ops.common.rope import apply_rope
from tests.fork_server import Forked
from tests.modeling.gqa.tiny_gqa import (
    CONFIGS,
    SHAPE,
    make_config,
    make_dense,
    make_dsa,
    make_v32,
    random_ids,
)

GQA = [family for family in all_families() if isinstance(family, GqaFamily)]
INDEX = {"topk": 4, "index_n_heads": 2, "index_n_kv_heads": 1, "index_head_dim": 8}


def test_every_module_of_the_folder_is_a_family():
    modules = {path.stem for path in Path(families.__file__).parent.glob("[!_]*.py")}
    assert modules >= {"llama", "qwen2", "qwen3", "mistral", "deepseek"}
    assert len(all_families()) == len(modules)
    assert {family.source_types[0] for family in GQA} <= modules


def test_every_gqa_family_has_a_tiny_model():
    assert {(model_type,) for model_type, _ in CONFIGS.values()} == {family.source_types for family in GQA}


@pytest.mark.parametrize("family", all_families(), ids=lambda family: family.source_types[0])
def test_serving_classes_are_those_of_the_models(family):
    made = [
        AutoModelForCausalLM._model_mapping[AutoConfig.for_model(name).__class__] for name in family.dsa_types
    ]
    assert [model.__name__ for model in made] == list(family.serving_classes)
    assert all(model.__module__.startswith("transformers.") == family.is_stock for model in made)


@pytest.mark.parametrize("family", GQA, ids=lambda family: family.source_types[0])
def test_names_follow_one_pattern(family):
    assert family.dsa_types == (family.config_class.model_type,) == (f"{family.source_types[0]}_dsa",)
    stem = family.source_class.__name__.removesuffix("ForCausalLM")
    assert family.causal_lm_class.__name__ == f"{stem}DsaForCausalLM"
    assert family.model_class.__name__ == f"{stem}DsaModel"
    assert family.config_class.__name__ == f"{stem}DsaConfig"


def turned_heads(dense, layer, ids):
    """q_BHTD, k_BGTD, v_BGTD that a stock layer gives to its attention, and what the layer got."""
    heads, inputs = {}, {}

    def note(module, query, key, value, mask, **kwargs):
        heads[module.layer_idx] = (query, key, value)
        return query.transpose(1, 2), None

    def keep(module, args, kwargs):
        inputs.update(kwargs)

    AttentionInterface.register("note", note)
    dense.config._attn_implementation = "note"
    hook = dense.model.layers[layer].self_attn.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        dense.model(ids, use_cache=False)
    hook.remove()
    return heads[layer], inputs


@pytest.mark.parametrize("name", CONFIGS)
def test_project_gives_what_stock_attention_turns(name):
    """Turned by the layer's own table the projected heads have the stock ones' logits, and its values."""
    dense = make_dense(name)
    family = family_for(dense.config)
    for layer in family.full_attention_layers(dense.config):
        (q_BHTD, k_BGTD, v_BGTD), inputs = turned_heads(dense, layer, random_ids(2, 9))
        x_BTC, ours = inputs["hidden_states"], make_dsa(dense).model.layers[layer].self_attn
        with torch.no_grad():
            stock = family.project(dense.model.layers[layer].self_attn, x_BTC)
            assert all(map(torch.equal, stock, ours.project(x_BTC)))
            heads = ours.heads(**inputs)
        q_BTHD, k_BTGD = (apply_rope(x_BTXD, *heads.rotary) for x_BTXD in heads[:2])
        shared = q_BTHD.shape[2] // k_BTGD.shape[2]
        expected = q_BHTD @ k_BGTD.repeat_interleave(shared, 1).mT
        logits = torch.einsum("bthd,bshd->bhts", q_BTHD, k_BTGD.repeat_interleave(shared, 2))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(heads[2].transpose(1, 2), v_BGTD)


def test_full_attention_layers():
    assert full_attention_layers(make_config("llama")) == [0, 1, 2]
    assert full_attention_layers(make_config("qwen2-mixed")) == [0, 1]
    assert full_attention_layers(make_config("mistral")) == [0, 1, 2]


def test_a_model_with_windows_everywhere_has_nothing_to_convert():
    config = MistralConfig(**{**SHAPE, "sliding_window": 64})
    with pytest.raises(
        UnsupportedModelError, match="'mistral' with sliding_window=64 has no full-attention layer"
    ):
        full_attention_layers(config)


def test_unknown_architecture_names_itself_the_known_ones_and_what_it_would_take():
    with pytest.raises(UnsupportedModelError) as info:
        family_for(GemmaConfig())
    assert str(info.value).startswith(
        f"model_type 'gemma' has no family; supported: {', '.join(known_types())}; "
    )
    assert "families/gemma.py, about ten lines with project=project_heads, as far as" in str(info.value)
    assert {"deepseek_v3", "gemma3_text", "llama", "qwen3_moe"} < set(known_types())
    for model_type, words in (
        ("cohere", "project=project_interleaved_heads"),
        ("afmoe", r"parts of AfmoeAttention tell \(not what gate_proj does\)"),
        ("falcon", "from FalconAttention as no projection of fulmen's does"),
        ("qwen3_vl", r"language model \(qwen3_vl_text\) is inside it: .*modeling/vision/qwen3_vl.py"),
        ("llava", r"\(the config's text_config says which\) is inside it: .*modeling/vision/llava.py"),
    ):
        with pytest.raises(UnsupportedModelError, match=words):
            family_for_type(model_type)
    with pytest.raises(UnsupportedModelError, match="it has no attention that DSA could take the place"):
        family_for_type("mamba")
    for model_type in ("vit", "no_such", None, ["llama"]):
        with pytest.raises(UnsupportedModelError, match="Transformers has no language model of that type"):
            family_for_type(model_type)


@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2", "phi3", "glm4", "qwen3-5", "hunyuan"])
def test_what_a_stock_attention_says_of_its_entry_is_what_the_entry_says(name):
    dense = make_dense(name)
    family = family_for(dense.config)
    attention = dense.model.layers[family.full_attention_layers(dense.config)[0]].self_attn
    keywords = dict(one.split("=") for one in entry_keywords(attention).split(", "))
    prepare = family.model_class.attention_class.prepare
    assert keywords.get("prepare", "take_heads") == prepare.__name__
    assert keywords["project"] == family.project.__name__


def test_only_the_family_that_is_asked_for_is_imported():
    code = """
import sys
from fulmen.modeling.families import family_for_type
family_for_type("qwen3_moe")
print(*sorted(name for name in sys.modules if name.startswith("fulmen.modeling.families.")))
"""
    printed, said = Forked(code).communicate()
    assert printed.split() == ["fulmen.modeling.families.qwen3_moe"], said


def test_a_model_of_images_in_memory_is_to_be_saved_first():
    for name in vision_names():
        with pytest.raises(UnsupportedModelError, match=f"'{name}' reads images too, and is converted"):
            family_for_type(name)
        assert name in known_types()


@pytest.mark.parametrize(
    "change",
    [
        {"use_bidirectional_attention": True},
        {"attn_logit_softcapping": 50.0},
        {"final_logit_softcapping": 30.0},
    ],
)
def test_gemma3_with_what_no_language_model_of_it_has(change):
    config = make_config("gemma3")
    config.update(change)
    ((key, value),) = change.items()
    with pytest.raises(UnsupportedModelError, match=f"'gemma3_text' with {key}={value} is not supported"):
        full_attention_layers(config)
    with pytest.raises(UnsupportedModelError, match=f"{key}={value}"):
        make_dsa(make_dense("gemma3", **change))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_layout_is_the_attentions(name):
    dense = make_dense(name)
    layout = family_for(dense.config).attention_layout(dense.config)
    attention = dense.model.layers[full_attention_layers(dense.config)[0]].self_attn
    assert layout.scale == attention.scaling
    assert layout.key_width == layout.value_width == attention.head_dim
    assert layout.heads // layout.key_heads == attention.num_key_value_groups


@pytest.mark.parametrize("name", CONFIGS)
def test_what_the_attention_says_of_its_way_to_the_residual_stream(name):
    """`to_stream` and `output_weight` against what the decoder layer adds where its MLP gives nothing."""
    dsa = make_dsa(make_dense(name), topk=64)
    layer, seen = dsa.model.layers[dsa.config.dsa["layers"][-1]], {}
    mlp = getattr(layer, "mlp", None) or layer.block_sparse_moe

    def note(module, args, kwargs):
        seen[module] = args[0] if args else kwargs["hidden_states"]

    layer.register_forward_pre_hook(note, with_kwargs=True)
    layer.self_attn.o_proj.register_forward_pre_hook(note, with_kwargs=True)
    layer.register_forward_hook(lambda module, args, added: seen.update(after=added))
    mlp.register_forward_hook(lambda module, args, out: torch.zeros_like(args[0]))
    with torch.no_grad():
        dsa(random_ids(2, 30), use_cache=False)
        added = seen["after"] - seen[layer]
        heads = seen[layer.self_attn.o_proj]
        output = layer.self_attn.o_proj(heads)
        torch.testing.assert_close(layer.self_attn.to_stream(output), added, rtol=1e-4, atol=1e-5)
        if (bias := layer.self_attn.o_proj.bias) is not None:
            added = added - bias
        weighed = heads @ layer.self_attn.output_weight().T
        cosine = torch.nn.functional.cosine_similarity(weighed, added, dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama_dsa", "qwen3_dsa", "deepseek_v32", "glm_moe_dsa"])
def test_converted_types_are_not_converted_again(name):
    with pytest.raises(AlreadyConvertedError, match=f"'{name}' has DSA already"):
        family_for_type(name)


def test_family_of_a_converted_model():
    dsa = make_dsa(make_dense("qwen3"))
    assert dsa_family_for(dsa.config) is family_for_type("qwen3")
    with pytest.raises(UnsupportedModelError, match="'llama' is not a DSA model"):
        dsa_family_for(make_config("llama"))


@pytest.mark.parametrize("name", CONFIGS)
def test_from_dense_shares_weights_and_keeps_config(name):
    dense = make_dense(name, torch.bfloat16)
    dsa = make_dsa(dense)
    ours = dict(dsa.named_parameters())
    for parameter_name, parameter in dense.named_parameters():
        assert ours[parameter_name].data_ptr() == parameter.data_ptr()
    assert {parameter.dtype for parameter in ours.values()} == {torch.bfloat16}
    assert not any(tensor.is_meta for tensor in [*dsa.parameters(), *dsa.buffers()])
    skipped = {"model_type", "dsa", "architectures"}
    theirs = dense.config.to_dict()
    assert {k: v for k, v in dsa.config.to_dict().items() if k not in skipped} == {
        k: v for k, v in theirs.items() if k not in skipped
    }


@pytest.mark.parametrize("family", GQA, ids=lambda family: family.source_types[0])
def test_auto_classes_make_our_models(family):
    config = AutoConfig.for_model(
        family.dsa_types[0],
        **{**SHAPE, "head_dim": 32, "sliding_window": None, "layer_types": ["full_attention"] * 3},
        num_experts=16,
        n_routed_experts=16,
        dsa={**INDEX, "layers": [0, 2]},
    )
    assert type(config) is family.config_class
    model = AutoModelForCausalLM.from_config(config).eval()
    assert type(model) is family.causal_lm_class
    assert type(AutoModel.from_config(config)) is family.model_class
    assert "model.layers.2.self_attn.indexer.wq.weight" in model.state_dict()
    assert "model.layers.1.self_attn.indexer.wq.weight" not in model.state_dict()
    assert model.model.layers[0].self_attn.indexer.rope_pairs.tolist() == [[0, 1, 2, 3]]
    model.generate(random_ids(1, 6), max_new_tokens=2)


@pytest.mark.parametrize(
    ("dsa", "words"),
    [
        (None, "'llama_dsa' has no key 'dsa'"),
        ({**INDEX, "layers": [3]}, r"layers \[3\] do not fit num_hidden_layers=3; list some of 0 to 2"),
        ({**INDEX, "topk": 0, "layers": [0]}, "topk=0 cannot be"),
        ({**INDEX, "layers": [2, 0]}, r"layers \[2, 0\] do not fit"),
        ({**INDEX, "layers": [1, 1]}, r"layers \[1, 1\] do not fit"),
        (INDEX, "misses or does not know"),
    ],
)
def test_a_config_that_cannot_be_is_refused(dsa, words):
    family = family_for_type("llama")
    config = family.config_class(**SHAPE, dsa=dsa)
    with pytest.raises(ConfigError, match=words):
        require_dsa(config)
    with pytest.raises(ConfigError, match=words):
        family.causal_lm_class(config)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}),
    ],
)
def test_a_sliding_layer_cannot_be_converted(name, config):
    family = family_for_type(name)
    made = family.config_class(**{**SHAPE, **config}, dsa={**INDEX, "layers": [0, 2]})
    with pytest.raises(ConfigError, match="have a sliding window; list full-attention layers only"):
        family.model_class(made)


def test_a_layer_with_linear_attention_cannot_be_converted():
    assert full_attention_layers(make_config("qwen3-5")) == [1, 3]
    with pytest.raises(ConfigError, match=r"dsa layers \[0\] have linear attention; list full-attention"):
        make_dsa(make_dense("qwen3-5"), layers=[0, 1])


@pytest.mark.parametrize("topk", [0, -1, 2.5, True, "8", None])
def test_set_topk_refuses_what_is_no_positive_integer(topk):
    with pytest.raises(ConfigError, match="topk="):
        set_topk(make_dsa(make_dense("llama")), topk)


def test_set_topk_refuses_a_dense_model():
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no DSA to set topk=4 on"):
        set_topk(make_dense("llama"), 4)


def test_set_topk_on_a_stock_dsa_model():
    model = make_v32()
    ids = random_ids(1, 12)
    with torch.no_grad():
        sparse = model(ids).logits
        set_topk(model, 12)
        full = model(ids).logits
        set_topk(model, 100)
        torch.testing.assert_close(model(ids).logits, full)
        set_topk(model, 4)
        torch.testing.assert_close(model(ids).logits, sparse)
    assert model.config.index_topk == 4
    assert (full - sparse).abs().max() > 1e-3


def test_dsa_config_round_trip():
    dsa = DsaConfig(**INDEX, layers=(0, 2))
    assert require_dsa(family_for_type("llama").config_class(**SHAPE, dsa=dsa.to_dict())) == dsa
