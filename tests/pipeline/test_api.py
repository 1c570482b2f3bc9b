"""convert, train, evaluate, load and inspect as a Python program calls them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import fulmen
from fulmen.modeling.families import accelerated
from fulmen.modeling.mla.attention import FulmenV32Attention
from fulmen.pipeline.reporter import SilentReporter
from tests.modeling.gqa.tiny_gqa import make_dense
from tests.modeling.mla.tiny_mla import make_mla
from tests.pipeline.tiny_runs import LENGTH, VOCAB, save_tiny, tiny_tokenizer

MADE = {"llama": lambda: make_dense("llama"), "mla": lambda: make_mla("v3", vocab_size=VOCAB)}
SMALL = {"topk": 8, "length": LENGTH, "stages": ("inherit",)}


@pytest.fixture(scope="module")
def texts(corpus_dir) -> list[str]:
    return [file.read_text() for file in sorted(corpus_dir.iterdir())]


@pytest.fixture(scope="module")
def conversion(tmp_path_factory, llama_dir, corpus_dir) -> fulmen.Conversion:
    out = tmp_path_factory.mktemp("api") / "out"
    return fulmen.convert(llama_dir, out=out, data=corpus_dir, **SMALL)


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class TestConvert:
    def test_what_comes_back(self, conversion):
        assert conversion.path.is_absolute()
        assert conversion.record == json.loads((conversion.path / "conversion.json").read_text())
        assert "record" not in repr(conversion)
        model, tokenizer = conversion.load()
        assert (model.config.dsa["topk"], model.training) == (8, False)
        assert tokenizer("w3 w4").input_ids == [3, 4]

    @pytest.mark.parametrize("name", MADE)
    def test_a_model_in_memory_is_converted_as_its_directory_is(self, name, tmp_path, corpus_dir):
        dense = MADE[name]().train()
        source = save_tiny(dense, tmp_path / "dense")
        before = weights_of(dense)
        dense.lm_head.weight.requires_grad_(False)
        options = {"data": corpus_dir, **SMALL, "stages": ("inherit", "warmup"), "steps": 2}
        ours = fulmen.convert(dense, tokenizer=tiny_tokenizer(), out=tmp_path / "ours", **options)
        theirs = fulmen.convert(source, out=tmp_path / "theirs", **options)
        assert_equal(ours.load()[0].state_dict(), theirs.load()[0].state_dict())
        assert_equal(before, dense.state_dict())
        assert dense.training
        frozen = [name for name, weight in dense.named_parameters() if not weight.requires_grad]
        assert frozen == ["lm_head.weight"]
        assert type(dense).__name__ in ours.record["source"]

    def test_stages_that_change_all_weights_leave_the_callers_alone(self, tmp_path, texts):
        dense = make_dense("llama")
        before = weights_of(dense)
        options = {"topk": 8, "length": LENGTH, "steps": 1, "sparse_steps": 1, "texts": texts}
        stages = "inherit, warmup, sparse"
        made = fulmen.convert(
            dense, tokenizer=tiny_tokenizer(), out=tmp_path / "out", stages=stages, **options
        )
        assert made.record["stages"] == ["inherit", "warmup", "sparse"]
        assert_equal(before, dense.state_dict())

    def test_another_dtype_is_that_of_a_copy(self, tmp_path, texts):
        dense = make_dense("llama")
        out, options = tmp_path / "out", {"texts": texts, "dtype": torch.bfloat16, **SMALL}
        model, _ = fulmen.convert(dense, tokenizer=tiny_tokenizer(), out=out, **options).load()
        assert (dense.dtype, model.dtype) == (torch.float32, torch.bfloat16)

    def test_texts_are_what_a_folder_of_them_is_in_any_order(self, tmp_path, llama_dir, texts):
        options = {"out": tmp_path / "out", "overwrite": True, **SMALL}
        records = [
            fulmen.convert(llama_dir, **given, **options).record["corpus"]
            for given in (
                {"texts": texts},
                {"texts": tuple(reversed(texts))},
                {"data": [f"{text}\n" for text in texts]},
                {"data": [f"{text}\n" for text in texts[::-1]]},
            )
        ]
        assert records[0] == records[1] != records[2] == records[3]

    def test_a_run_in_memory_resumes_only_with_the_same_weights(self, tmp_path, texts):
        dense, out = make_dense("llama"), tmp_path / "out"
        options = {"tokenizer": tiny_tokenizer(), "out": out, "texts": texts, **SMALL}
        with pytest.raises(KeyboardInterrupt):
            fulmen.convert(dense, reporter=InterruptedAt("Inherit"), **options)
        before = dense.model.norm.weight.detach().clone()
        with torch.no_grad():
            dense.model.norm.weight[0] += 1
        with pytest.raises(fulmen.ResumeError, match=r"source_weights was .*, or pass overwrite$"):
            fulmen.convert(dense, **options)
        with torch.no_grad():
            dense.model.norm.weight.copy_(before)
        fulmen.convert(dense, **options)


class InterruptedAt(SilentReporter):
    """Ctrl-C in a notebook, while a stage is at a step."""

    def __init__(self, name: str, step: int = 1) -> None:
        self._name, self._step, self._under_way = name, step, ""

    def stage(self, name, counted=True):
        self._under_way = name
        return super().stage(name, counted)

    def advance(self, done, total, detail=""):
        if self._under_way == self._name and done == self._step and "validation" not in detail:
            raise KeyboardInterrupt


@pytest.mark.parametrize("moment", [("Warm-up", 3), ("Sparse", 2)])
def test_ctrl_c_leaves_a_run_that_the_same_call_resumes(moment, tmp_path, llama_dir, corpus_dir, whole_run):
    out = tmp_path / "out"
    options = {**EVERY_STAGE, "data": corpus_dir, "out": out}
    with pytest.raises(KeyboardInterrupt):
        fulmen.convert(llama_dir, reporter=InterruptedAt(*moment), **options)
    assert not out.exists()
    notes = Notes()
    resumed = fulmen.convert(llama_dir, reporter=notes, **options)
    assert "Resuming an interrupted conversion" in notes.texts
    assert_equal(whole_run, resumed.load()[0].state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


EVERY_STAGE = {"topk": 8, "length": LENGTH, "steps": 4, "sparse_steps": 3, "stages": "inherit,warmup,sparse"}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, llama_dir, corpus_dir) -> dict[str, torch.Tensor]:
    out = tmp_path_factory.mktemp("whole") / "out"
    return weights_of(fulmen.convert(llama_dir, out=out, data=corpus_dir, **EVERY_STAGE).load()[0])


class Notes(SilentReporter):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text):
        self.texts.append(text)


class TestLoad:
    @pytest.fixture(scope="class")
    def mla(self, tmp_path_factory, corpus_dir) -> fulmen.Conversion:
        out = tmp_path_factory.mktemp("mla") / "out"
        return fulmen.convert(MADE["mla"](), tokenizer=tiny_tokenizer(), out=out, data=corpus_dir, **SMALL)

    def test_mla_computes_by_our_ops_from_then_on(self, mla, tmp_path):
        model, tokenizer = fulmen.load(mla)
        assert not model.training
        attentions = [layer.self_attn for layer in model.model.layers]
        assert all(isinstance(attention, FulmenV32Attention) for attention in attentions)
        ids = tokenizer("w3 w4 w5 w6 w7 w8 w9 w10 w11 w12", return_tensors="pt").input_ids
        stock = AutoModelForCausalLM.from_pretrained(mla.path).eval()
        with torch.no_grad(), accelerated(stock):
            expected = stock(ids).logits
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected)
            assert torch.equal(model(ids).logits, expected)
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, ids.shape[1] + 3)
        model.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        assert (again.config.model_type, again.config.architectures) == (
            "deepseek_v32",
            ["DeepseekV32ForCausalLM"],
        )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
    def test_dtype_and_device(self, mla, conversion, dtype):
        for made in (mla, conversion):
            assert fulmen.load(str(made.path), dtype=dtype, device="cpu")[0].dtype == torch.bfloat16

    def test_topk_at_the_length_is_dense(self, conversion, llama_dir):
        model, tokenizer = fulmen.load(conversion.path)
        dense = AutoModelForCausalLM.from_pretrained(llama_dir)
        ids = tokenizer(" ".join(f"w{n}" for n in range(3, 40)), return_tensors="pt").input_ids
        fulmen.set_topk(model, 64)
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, dense(ids).logits, atol=2e-5, rtol=1e-4)


class TestEvaluate:
    def test_parity_writes_nothing(self, conversion, corpus_dir, llama_dir):
        before = sorted(conversion.path.rglob("*"))
        report = fulmen.evaluate(
            conversion, dense=llama_dir, data=[corpus_dir], length=64, quick=True, needles=False
        )
        assert isinstance(report, fulmen.ParityReport)
        assert report.topk == 8
        assert json.loads(json.dumps(report.to_dict()))["length"] == 64
        assert report.verdict() in report.to_markdown()
        assert report.to_html().startswith("<!")
        assert sorted(conversion.path.rglob("*")) == before

    def test_suites_write_what_they_are_given_a_folder_for(
        self, conversion, corpus_dir, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        before = sorted(conversion.path.rglob("*"))
        options = {"suites": "keyloss", "lengths": (128,), "samples": 1, "data": corpus_dir}
        report = fulmen.evaluate(conversion, **options)
        assert isinstance(report, fulmen.SuiteReport)
        assert sorted(conversion.path.rglob("*")) == before
        assert not list(tmp_path.iterdir())
        kept = fulmen.evaluate(conversion, out=tmp_path / "kept", **options)
        assert [file.name for file in (tmp_path / "kept").iterdir()] == ["samples.jsonl"]
        assert kept.to_dict()["suites"] == report.to_dict()["suites"]


def test_train(conversion, corpus_dir, tmp_path):
    made = fulmen.train(conversion, out=tmp_path / "out", steps=1, data=corpus_dir, length=LENGTH)
    assert made.record["stages"] == ["inherit", "sparse"]
    assert made.record == json.loads((made.path / "conversion.json").read_text())


def test_inspect(conversion, llama_dir):
    dense, converted = fulmen.inspect(llama_dir), fulmen.inspect(conversion)
    assert (dense.converted, converted.converted, converted.dsa.topk) == (False, True, 8)
    assert "- **state**: converted" in converted.to_markdown()
    assert "| 8K" in converted.to_markdown()
    assert json.loads(json.dumps(converted.to_dict()))["dsa"]["topk"] == 8


SILENT = """
import json, sys, fulmen
from transformers import AutoModelForCausalLM, AutoTokenizer
source, data, rows, out = sys.argv[1:]
made = fulmen.convert(source, out=out + "/a", topk=8, length=64, steps=2, data=data)
model, tokenizer = made.load()
fulmen.train(made, out=out + "/b", steps=1, length=64, data=rows)
fulmen.evaluate(made, length=64, quick=True, needles=False, data=data)
fulmen.evaluate(made, suites="keyloss", lengths=[128], samples=1, data=data)
fulmen.inspect(source)
riddle = lambda index: {"prompt": f"w{2 + index % 90} w{2 + index // 90 % 90}", "answer": "w5"}
fulmen.rl(made, tasks=riddle, out=f"{out}/rl", steps=1, prompts=1, group=2, max_new_tokens=2, held_out=1)
"""


def test_nothing_is_printed_by_default(tmp_path, llama_dir, corpus_dir):
    """Neither by us nor by a library, with nothing set in the environment to keep it quiet."""
    quiet = ("VERBOSITY", "PROGRESS_BARS", "TQDM_DISABLE", "PYTHONWARNINGS")
    environment = {name: value for name, value in os.environ.items() if not name.endswith(quiet)}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    rows = tmp_path / "rows.jsonl"
    line = json.dumps({"text": " ".join(f"w{2 + n * 7 % 95}" for n in range(60))})
    rows.write_text("".join(f'{line[:-2]} w{n % 90}"}}\n' for n in range(400)))
    done = subprocess.run(
        [sys.executable, "-c", SILENT, str(llama_dir), str(corpus_dir), str(rows), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


class Nothing:
    """No model, no reporter, no path."""

    def __repr__(self):
        return "<Nothing>"  # names of tests must not have an address, which differs from process to process


BAD_CONVERSIONS = [
    ({"out": None}, r"^out=None cannot be; name a directory$"),
    ({"out": ""}, r"^out='' cannot be"),
    ({"source": 5}, r"^source=5 cannot be; give a model's directory or name, or a model of Transformers$"),
    ({"source": None}, r"^source=None cannot be"),
    ({"source": ""}, r"^source='' cannot be"),
    ({"topk": "x"}, r"^topk='x' cannot be; use an integer of at least 1$"),
    ({"topk": 8.0}, r"^topk=8\.0 cannot be"),
    ({"topk": True}, r"^topk=True cannot be"),
    ({"stages": 3}, r"^stages=3 cannot be; use some of inherit, warmup, sparse, from the first on$"),
    ({"stages": ()}, r"^stages='' are repeated, incomplete or out of order"),
    ({"stages": ("warmup",)}, r"^stages='warmup' are repeated, incomplete"),
    ({"stages": (None,)}, r"^stages=\(None,\) cannot be"),
    ({"data": 5}, r"^data=5 cannot be; name a file, a directory or hf:name, or several in a list$"),
    ({"data": [5]}, r"^data=5 cannot be; name a file, a directory or hf:name$"),
    ({"data": "no/such/text"}, r"^data='no/such/text' does not exist"),
    ({"data": "x" * 5000}, r"^data='x+' does not exist"),
    ({"texts": "one text"}, r"^texts='one text' cannot be; give a list of texts$"),
    ({"texts": []}, r"^texts=\[\] cannot be"),
    ({"texts": ["a", 5]}, r"^texts\[1\]=5 cannot be"),
    ({"texts": ["a"], "data": "."}, r"^data and texts exclude each other; give one of them$"),
    ({"budget": "soon"}, r"^budget: duration 'soon' cannot be read"),
    ({"budget": -1}, r"^budget=-1 cannot be; use seconds above 0"),
    ({"budget": float("nan")}, r"^budget=nan cannot be"),
    ({"budget": [8]}, r"^budget=\[8\] cannot be"),
    ({"budget": 60, "steps": 5}, r"^budget and steps exclude each other; give one of them$"),
    ({"steps": 0}, r"^steps=0 cannot be"),
    ({"stages": "inherit", "steps": 5}, r"^stages=inherit trains nothing, so budget and steps do not apply"),
    ({"sparse_steps": 5}, r"^stages have no sparse, so sparse_budget and sparse_steps do not apply"),
    ({"length": "long"}, r"^length='long' cannot be"),
    ({"dtype": "int8"}, r"^dtype='int8' is not known"),
    ({"dtype": torch.int8}, r"^dtype='int8' is not known"),
    ({"seed": "x"}, r"^seed='x' cannot be; use an integer of 0 to"),
    ({"seed": 2**32}, r"^seed=4294967296 cannot be"),
    ({"index_heads": -1}, r"^index_heads=-1 cannot be"),
    ({"overwrite": "yes"}, r"^overwrite='yes' cannot be; use True or False$"),
    ({"reporter": Nothing()}, r"^reporter=<.*Nothing.*> cannot be; give an object with the methods"),
    ({"tokenizer": 5}, r"^tokenizer is for a model in memory; source has its own, leave it out$"),
]


@pytest.mark.parametrize(
    ("changes", "words"), BAD_CONVERSIONS, ids=[str(bad[0])[:60] for bad in BAD_CONVERSIONS]
)
def test_conversions_that_cannot_be(changes, words, tmp_path, llama_dir):
    """Before any work: nothing that takes time is even imported by then."""
    given = {"source": llama_dir, "out": tmp_path / "out", **changes}
    with pytest.raises(fulmen.ConfigError, match=words):
        fulmen.convert(given.pop("source"), **given)
    assert not list(tmp_path.iterdir())


def test_models_in_memory_that_cannot_be_converted(tmp_path):
    model, tokenizer, out = make_dense("llama"), tiny_tokenizer(), tmp_path / "out"

    def refused(source, words, error=fulmen.ConfigError, tokenizer=tokenizer):
        with pytest.raises(error, match=words):
            fulmen.convert(source, tokenizer=tokenizer, out=out)

    refused(model, "^tokenizer=None cannot be with a model in memory", tokenizer=None)
    refused(model, r"^tokenizer='gpt2' cannot be; a model in memory needs its tokenizer", tokenizer="gpt2")
    refused(torch.nn.Linear(2, 2), "^source='Linear' cannot be; give a model's directory")
    unsupported = fulmen.UnsupportedModelError
    refused(model.model, "^source is a LlamaModel, no language model; give a LlamaForCausalLM$", unsupported)
    quantized = make_dense("llama")
    quantized.config.quantization_config = {"quant_method": "fp8"}
    refused(quantized, "^source, a LlamaForCausalLM, is quantized", unsupported)
    offloaded = make_dense("llama")
    offloaded.lm_head.to("meta")
    refused(offloaded, "has its weights on cpu, meta; load it whole on one device", unsupported)
    spoilt = make_dense("llama")
    with torch.no_grad():
        spoilt.model.norm.weight[0] = float("nan")
    refused(spoilt, "has NaN or infinite values in model.norm.weight", fulmen.CheckpointError)
    small = make_dense("llama", vocab_size=50)
    refused(small, "its embedding ends at 49", fulmen.CheckpointError)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda made, out: fulmen.train(5, out=out), "^source=5 cannot be; name a directory"),
        (lambda made, out: fulmen.train(made, out=None), "^out=None cannot be"),
        (lambda made, out: fulmen.train(made, out=out, learning_rate="x"), "^learning_rate='x' cannot be"),
        (
            lambda made, out: fulmen.train(made, out=out, indexer_learning_rate=-1),
            "^indexer_learning_rate=-1 ",
        ),
        (lambda made, out: fulmen.train(made, out=out, alpha="x"), "^alpha='x' cannot be"),
        (lambda made, out: fulmen.train(made, out=out, alpha=2), "^alpha=2 cannot be"),
        (lambda made, out: fulmen.train(made, out=out, bf16=1), "^bf16=1 cannot be; use True or False"),
        (lambda made, out: fulmen.train(made, out=out, lora=0), "^lora=0 cannot be"),
        (lambda made, out: fulmen.train(made, out=out, sequences="x"), "^sequences='x' cannot be"),
        (lambda made, out: fulmen.train(made, out=out, teacher=5), "^teacher=5 cannot be"),
        (lambda made, out: fulmen.train(made, out=out, k_schedule="x"), "^k_schedule='x' is not known"),
        (lambda made, out: fulmen.train(made, out=out, report_to=[]), r"^report_to=\[\] is not known"),
        (lambda made, out: fulmen.evaluate(None), "^source=None cannot be"),
        (lambda made, out: fulmen.evaluate(made, length=8), "^length=8 is too short"),
        (
            lambda made, out: fulmen.evaluate(made, length=513),
            "^length=513 exceeds the model's context of 512",
        ),
        (lambda made, out: fulmen.evaluate(made, kinds=5), "^kinds=5 cannot be"),
        (lambda made, out: fulmen.evaluate(made, needles=None), "^needles=None cannot be; use True or False"),
        (lambda made, out: fulmen.evaluate(made, out=Path(__file__)), "^out=.* is a file; name a folder"),
        (lambda made, out: fulmen.evaluate(made, needle_length=0), "^needle_length=0 cannot be"),
        (
            lambda made, out: fulmen.evaluate(made, needles=False, needle_length=1024),
            "^needle_length does not apply without needles",
        ),
        (
            lambda made, out: fulmen.evaluate(made, suites="ruler", needle_length=1024),
            "^needle_length=1024 does not apply to",
        ),
        (lambda made, out: fulmen.evaluate(made, url="http://x"), "^url='http://x' does not apply without"),
        (
            lambda made, out: fulmen.evaluate(made, suites="ruler", quick=True),
            "^quick=True does not apply to",
        ),
        (lambda made, out: fulmen.evaluate(made, suites="ruler", length=64), "^length=64 does not apply to"),
        (lambda made, out: fulmen.evaluate(made, suites="x"), "^suite='x' is not known; choose from"),
        (lambda made, out: fulmen.evaluate(made, suites=5), "^suites=5 cannot be"),
        (
            lambda made, out: fulmen.evaluate(made, suites="parity"),
            "^suites='parity' cannot be; parity is what",
        ),
        (lambda made, out: fulmen.evaluate(made, suites="ruler", lengths=[0]), "length='0' cannot be read"),
        (lambda made, out: fulmen.evaluate(made, suites="ruler", samples="x"), "^samples='x' cannot be"),
        (lambda made, out: fulmen.evaluate(made, suites="ruler", seed="x"), "^seed='x' cannot be"),
        (lambda made, out: fulmen.evaluate(made, suites="ruler", url="x"), "^url and model go together"),
        (
            lambda made, out: fulmen.load(made, dtype="int8"),
            "^dtype='int8' cannot be; choose from auto, float32",
        ),
        (lambda made, out: fulmen.load(made, device="moon"), "^device='moon' cannot be; name a device"),
        (lambda made, out: fulmen.load(made, device="meta"), "^device='meta' cannot be"),
        (lambda made, out: fulmen.load(3), "^source=3 cannot be"),
        (lambda made, out: fulmen.inspect(["a"]), r"^source=\['a'\] cannot be"),
    ],
)
def test_other_calls_that_cannot_be(call, words, conversion, tmp_path):
    with pytest.raises(fulmen.ConfigError, match=words):
        call(conversion, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_loaded(llama_dir, tmp_path):
    with pytest.raises(fulmen.UnsupportedModelError, match="'llama' is not a DSA model"):
        fulmen.load(llama_dir)
    with pytest.raises(fulmen.CheckpointError, match="does not exist"):
        fulmen.load(Path(tmp_path, "no", "such"))
