"""What the benchmarks compute from what they measure, and the weights that they give to dense peers."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from benchmarks.end_to_end import figures, weights
from benchmarks.quality import four_changes
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
# They need an engine that may not be installed, and run in a process of their own.
FOREIGN = {"llama_engine", "vllm_engine"}
SCRIPTS = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in (ROOT / "benchmarks").rglob("*.py")
    if file.stem not in FOREIGN
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_can_be_imported(name):
    importlib.import_module(name)


def decode_cell(length, **seconds):
    return {
        "work": "decode",
        "length": length,
        "seconds": {k.replace("_", " "): x for k, x in seconds.items()},
    }


def test_a_ratio_is_the_median_of_the_rounds_ratios():
    seconds = {"vllm dsa": [1.0, 2.0, 4.0], "vllm dense": [3.0, 2.0, 8.0]}
    # Ratios 3, 1 and 2; the medians' own ratio would be 1.5.
    assert figures.times_faster(seconds, "vllm dsa", "vllm dense") == 2.0


def test_decode_times_go_on_in_a_straight_line_and_are_marked():
    cells = [
        decode_cell(2, vllm_dsa=[1.0], vllm_dense=[1.0], late=[5.0]),
        decode_cell(4, vllm_dsa=[1.0], vllm_dense=[9.0]),
        decode_cell(6, vllm_dsa=[1.0], vllm_dense=[10.0]),
        decode_cell(10, vllm_dsa=[1.0]),
        decode_cell(14, vllm_dsa=[1.0]),
    ]
    done = figures.finished(cells)
    assert [cell["extrapolated"] for cell in done] == [[], [], [], ["vllm dense"], ["vllm dense"]]
    # By the two longest that were run, never by what was extrapolated; one length alone gives no line.
    assert [cell["seconds"]["vllm dense"] for cell in done[2:]] == [[10.0], [12.0], [14.0]]
    assert done[4]["ratios"]["vllm dsa over dense"] == 14.0
    assert "late" not in cells[1]["seconds"]
    table = figures.table(done, ["vllm dsa", "vllm dense", "late"])
    assert "| vllm dense | 1000.0 ms | 9000.0 ms | 10000.0 ms | ~12000.0 ms | ~14000.0 ms |" in table
    assert "| late | 5000.0 ms | - | - | - | - |" in table


def test_the_best_peers_are_dense_and_named():
    seconds = {"vllm dsa": [2.0], "transformers dsa": [0.1], "vllm dense": [6.0], "llama.cpp Q4_1": [4.0]}
    ratios = figures.compare(seconds)
    assert (ratios["best peer"], ratios["vllm dsa over best peer"]) == ("llama.cpp Q4_1", 2.0)
    assert (ratios["best 16-bit peer"], ratios["vllm dsa over best 16-bit peer"]) == ("vllm dense", 3.0)
    assert "transformers dsa over dense" not in ratios


def test_a_gguf_file_is_the_same_model(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path / "dense")
    weights.write_gguf(tmp_path / "dense", tmp_path / "model.gguf", Type.BF16, Type.BF16)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.bfloat16)
    assert read.config.rope_parameters == config.rope_parameters
    assert read.config.num_key_value_heads == 2
    for (name, found), (wanted_name, wanted) in zip(
        read.named_parameters(), model.named_parameters(), strict=True
    ):
        assert name == wanted_name
        assert torch.equal(found, wanted), name


def test_a_run_on_a_gpu_goes_on_where_it_stopped_and_tries_again_what_failed(tmp_path, capsys):
    from benchmarks.gpu.run import run_parts

    ran = []

    def part(name, result):
        def run():
            ran.append(name)
            if isinstance(result, Exception):
                raise result
            return result

        return run

    parts = {
        "check of a": part("a", {"failure": None}),
        "check of b": part("b", {"failure": "3 of 9 queries differ"}),
        "decode, 8 tokens": part("c", {"ms": {"dsa": 1.0}}),
        "prefill": part("d", MemoryError("no room")),
    }
    assert run_parts(parts, tmp_path, 100)
    assert run_parts(parts, tmp_path, 100)
    assert ran == [*"abcd", *"bd"]
    assert '"error": "MemoryError: no room"' in capsys.readouterr().out
    assert not run_parts({**parts, "late": part("e", {})}, tmp_path, 0)
    assert ran == [*"abcd", *"bd"]
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["missing"] == ["check of b", "prefill", "late"]
    assert written["results"] == {"check of a": {"failure": None}, "decode, 8 tokens": {"ms": {"dsa": 1.0}}}


def test_the_toys_of_the_four_changes_show_what_the_pages_say():
    fresh, *stale = four_changes.kl_rows(3)
    assert fresh["recomputed"] == pytest.approx(0.0, abs=1e-12)
    assert all(row["unbiased"] < 1e-12 < 0.05 < min(row["recomputed"], row["unweighted"]) for row in stale)
    near, far = four_changes.mask_rows((0.0, 0.96))
    assert near["masked with"] == far["masked without"] == 0.0
    assert far["masked with"] > 0.3
    assert near["with"] == near["without"] < far["with"] < 0.9 * far["without"]
    first, *later = four_changes.routing_rows(2)
    assert first == {"updates": 0, "own": 0.0, "replay": 0.0}
    assert all(row["own"] > 0.0 == row["replay"] for row in later)
    for row in four_changes.sampling_rows((0.7, 1.0)):
        assert row["with"] == pytest.approx(1.0, abs=1e-5)
        assert row["without"] == pytest.approx(row["top_p"], abs=0.03)
        assert row["reply without"] <= row["without"] + 1e-6
