"""Split GGUF files, and files that are damaged."""

import shutil
import struct

import pytest
import torch

from fulmen import CheckpointError, UnsupportedModelError
from fulmen.modeling.checkpoint import find_source, load_dense
from fulmen.modeling.gguf.file import read_gguf
from fulmen.pipeline.model_config import read_config
from tests.modeling.gguf.test_gguf import logits
from tests.modeling.gguf.tiny_gguf import tensors_of, write_file, write_gguf, write_split
from tests.modeling.gqa.tiny_gqa import make_dense, random_ids

IDS = random_ids(1, 40)
LATER = {"blk.2.attn_q.weight": 1, "blk.2.ffn_up.weight": 1, "output_norm.weight": 2, "output.weight": 2}


@pytest.fixture
def parts(tmp_path):
    return write_split(tmp_path / "m", make_dense(), LATER, 3)


def refusal(path):
    messages = []
    for read in (load_dense, read_config):
        with pytest.raises(CheckpointError) as info:
            read(path)
        messages.append(str(info.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    return messages[0]


class TestSplit:
    def test_whole_whichever_part_is_named(self, parts, tmp_path):
        expected = logits(make_dense(), IDS)
        for source in (*parts, tmp_path):
            found = find_source(source)
            assert found == (str(tmp_path), parts[0].name)
            loaded, tokenizer = load_dense(source)
            assert torch.allclose(logits(loaded, IDS), expected, atol=1e-5)
            assert not loaded.config.tie_word_embeddings
            assert len(tokenizer) == 97
            assert read_config(source)[1].to_dict() == loaded.config.to_dict()

    def test_a_first_part_without_tensors(self, tmp_path):
        names = dict.fromkeys(tensors_of(make_dense("qwen2"), "qwen2"), 1)
        parts = write_split(tmp_path / "m", make_dense("qwen2"), names, 2)
        loaded, _ = load_dense(parts[0])
        assert torch.allclose(logits(loaded, IDS), logits(make_dense("qwen2"), IDS), atol=1e-5)

    @pytest.mark.parametrize("gone", [0, 1, 2])
    def test_a_missing_part_is_named(self, gone, parts, tmp_path):
        """The head lies in the last one: the model without it is not tied."""
        parts[gone].unlink()
        for source in (*(part for part in parts if part.exists()), tmp_path):
            message = refusal(source)
            assert f"{parts[gone].name} is missing" in message
            assert "truncated" not in message

    def test_a_truncated_part_is_named(self, parts):
        content = parts[1].read_bytes()
        parts[1].write_bytes(content[:-1])
        assert f"{parts[1].name} is truncated" in refusal(parts[0])

    def test_parts_in_the_wrong_order(self, parts, tmp_path):
        parts[1].rename(tmp_path / "aside")
        parts[2].rename(parts[1])
        (tmp_path / "aside").rename(parts[2])
        assert f"{parts[1].name} states that it is part 3 of 3" in refusal(parts[0])

    def test_a_renamed_part(self, parts, tmp_path):
        shutil.move(parts[1], tmp_path / "second.gguf")
        message = refusal(tmp_path / "second.gguf")
        assert "second.gguf is a part of a split model; name it NAME-00002-of-00003.gguf" in message

    def test_a_part_that_only_its_name_makes_one(self, tmp_path):
        """Its head may lie elsewhere."""
        write_gguf(tmp_path / "m-00001-of-00002.gguf", make_dense(tie_word_embeddings=True))
        assert "m-00002-of-00002.gguf is missing" in refusal(tmp_path / "m-00001-of-00002.gguf")
        shutil.copy(tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf")
        assert "against its name" in refusal(tmp_path / "m-00001-of-00002.gguf")

    def test_one_of_one(self, tmp_path):
        path = write_gguf(
            tmp_path / "m-00001-of-00001.gguf", make_dense(), keys={"split.count": 1, "split.no": 0}
        )
        assert torch.allclose(logits(load_dense(path)[0], IDS), logits(make_dense(), IDS), atol=1e-5)

    def test_parts_of_two_models(self, parts):
        keys = {"split.no": 1, "split.count": 3, "llama.block_count": 4}
        write_file(parts[1], "llama", keys, {"blk.2.attn_q.weight": torch.zeros(64, 64)})
        assert f"{parts[1].name} and {parts[0].name} differ in llama.block_count" in refusal(parts[0])

    def test_a_tensor_in_two_parts(self, parts):
        keys = {"split.no": 1, "split.count": 3}
        write_file(parts[1], None, keys, {"blk.0.attn_q.weight": torch.zeros(64, 64)})
        assert f"{parts[1].name} repeats blk.0.attn_q.weight" in refusal(parts[0])

    def test_fewer_tensors_than_stated(self, parts):
        write_file(parts[2], None, {"split.no": 2, "split.count": 3}, {"output_norm.weight": torch.ones(64)})
        assert "holds 29 tensors and states 30" in refusal(parts[0])

    def test_keys_that_stand_in_a_later_part(self, tmp_path):
        parts = write_split(tmp_path / "m", make_dense("qwen2"), {"output_norm.weight": 1}, 2)
        keys = {"split.no": 1, "split.count": 2, "qwen2.rope.scaling.factor": 2.0}
        norm = {"output_norm.weight": make_dense("qwen2").model.norm.weight}
        write_file(parts[1], None, keys, norm)
        assert read_config(parts[0])[1].rope_parameters["factor"] == 2.0

    def test_a_directory_of_two_models(self, parts, tmp_path):
        write_gguf(tmp_path / "n.gguf", make_dense())
        with pytest.raises(CheckpointError, match=r"holds no config\.json.*; name the file"):
            find_source(tmp_path)


class TestDamage:
    @pytest.fixture(scope="class")
    def content(self, tmp_path_factory):
        return write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", make_dense()).read_bytes()

    def test_cut_anywhere(self, content, tmp_path):
        path = tmp_path / "m.gguf"
        for size in (*range(5, 3000, 97), len(content) // 2, len(content) - 1):
            path.write_bytes(content[:size])
            with pytest.raises(CheckpointError, match=r"m\.gguf is truncated"):
                read_gguf(path)

    @pytest.mark.parametrize("number", [0, 1, 2**32 - 1, 2**63, 2**64 - 1])
    def test_counts_that_cannot_be(self, content, number, tmp_path):
        """Of tensors, of keys, of letters in the first key."""
        for offset in (8, 16, 24):
            broken = content[:offset] + struct.pack("<Q", number) + content[offset + 8 :]
            (tmp_path / "m.gguf").write_bytes(broken)
            with pytest.raises(CheckpointError, match=r"m\.gguf"):
                read_config(tmp_path / "m.gguf")

    @pytest.mark.parametrize("version", [0, 1, 4, 3 << 24])
    def test_versions(self, content, version, tmp_path):
        (tmp_path / "m.gguf").write_bytes(content[:4] + struct.pack("<I", version) + content[8:])
        with pytest.raises(CheckpointError, match=f"version {version}, or of a big-endian machine"):
            read_gguf(tmp_path / "m.gguf")

    @pytest.mark.parametrize("alignment", [0, 3, "wide"])
    def test_alignment(self, alignment, tmp_path):
        path = write_gguf(tmp_path / "m.gguf", make_dense())
        broken = write_gguf(tmp_path / "n.gguf", make_dense(), keys={"general.alignment": alignment})
        with pytest.raises(CheckpointError, match=r"n\.gguf is truncated"):
            read_gguf(broken)
        assert read_gguf(path)

    def test_a_type_that_cannot_be_read(self, content, tmp_path):
        """The type of a tensor stands behind its two axes; 27 is a 64-bit integer, 99 nothing."""
        name = b"blk.1.ffn_up.weight"
        at = content.index(name) + len(name) + 4 + 16
        for number, error in ((27, UnsupportedModelError), (99, CheckpointError)):
            (tmp_path / "m.gguf").write_bytes(content[:at] + struct.pack("<I", number) + content[at + 4 :])
            with pytest.raises(error, match=r"m\.gguf"):
                read_gguf(tmp_path / "m.gguf")
