"""Files that are written atomically."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from fulmen.errors import OutputError
from fulmen.files import atomic_write, write_folder


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_file_follows_the_umask_whoever_writes_it(tmp_path, umask):
    """Safetensors are written for their owner alone."""
    tensors = {"one": torch.ones(3)}
    before = os.umask(umask)
    try:
        atomic_write(tmp_path / "weights.safetensors", lambda temporary: save_file(tensors, temporary))
        atomic_write(tmp_path / "text.json", lambda temporary: temporary.write_text("{}"))
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in tmp_path.iterdir()} == {oct(0o666 & ~umask)}
    assert torch.equal(load_file(tmp_path / "weights.safetensors")["one"], tensors["one"])


def test_what_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    file = tmp_path / "kept.txt"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError):
        atomic_write(file, lambda temporary: temporary.write_text("half") / 0)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "made" / "run"
    write_folder(target, {"a.txt": "ä", "b.sh": "b"})
    assert {file.name: file.read_text(encoding="utf-8") for file in target.iterdir()} == {
        "a.txt": "ä",
        "b.sh": "b",
    }
    with pytest.raises(OutputError, match="run"):
        write_folder(target, {"c.txt": "c"})
    with pytest.raises(UnicodeEncodeError):
        write_folder(tmp_path / "made" / "other", {"a.txt": "a", "b.txt": "\ud800"})
    assert list(target.parent.iterdir()) == [target]
    assert len(list(target.iterdir())) == 2
