"""What is packed for other machines: the wheel by itself, without the checkout, and the source package."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import fulmen
from fulmen.ops.cpp.abi import CPP_LEVELS
from fulmen.ops.cpp.library import cpp_reason
from tests.modeling.gqa.tiny_gqa import make_dense

ROOT = Path(fulmen.__file__).parents[2]
KERNELS = "fulmen/ops/cpp"
# For this machine; an old compiler may lack a level.
BUILT = [path for name in CPP_LEVELS.values() if (path := ROOT / "src" / KERNELS / f"{name}.so").is_file()]
# Its parent opens no library; each child opens that of one level, as if the CPU had no more than this.
EACH_LEVEL = """
import json, os, sys
import torch
import fulmen
from fulmen import ops
from fulmen.errors import BackendError
from fulmen.ops.cpp.library import cpp_simd

q, k, w = torch.randn(1, 40, 4, 16), torch.randn(1, 90, 2, 16), torch.rand(1, 40, 4)
for level in (*sys.argv[1:], ""):
    sys.stdout.flush()
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, level
        continue
    os.environ["FULMEN_CPP_LEVEL"] = level
    try:
        with ops.pin_backend("cpp"):
            indices = ops.index_topk(q, k, w, topk=8)
            out = ops.sparse_attention(q, k, k, indices)
        with ops.pin_backend("reference"):
            assert torch.equal(indices, ops.index_topk(q, k, w, topk=8)), level
            assert torch.allclose(out, ops.sparse_attention(q, k, k, indices), atol=1e-5), level
        found = " ".join(cpp_simd())
    except BackendError as error:
        found = str(error)
    print(json.dumps([level, found, fulmen.__file__]))
    sys.stdout.flush()
    os._exit(0)
"""


def sources() -> list[str]:
    """Files of the checkout that git knows, or would take."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip("needs a checkout of git")
    return [name for name in found.stdout.splitlines() if (ROOT / name).is_file()]


def installed_sources() -> set[str]:
    """What of them belongs into a wheel."""
    data = {"src/fulmen/py.typed", "src/fulmen/ops/README.md"}
    inside = (name for name in sources() if name.startswith("src/fulmen/"))
    return {
        name.removeprefix("src/")
        for name in inside
        if name.endswith(".py") or name in data or re.search(r"serving/page/\w+\.(html|css|js)$", name)
    }


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources alone, in which the kernels count as built: they were, from these sources."""
    if reason := cpp_reason():
        pytest.skip(f"cpp: {reason}")
    folder = tmp_path_factory.mktemp("checkout")
    for name in sources():
        if name.startswith(("src/", "tests/test_")) or "/" not in name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    build = f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    (folder / build / KERNELS).mkdir(parents=True)
    for library in BUILT:
        shutil.copy(library, folder / build / KERNELS)
    # As a folder `build` has them that is older than the sources.
    (folder / build / "fulmen" / "moved.py").touch()
    (folder / build / KERNELS / "_native.so").touch()
    return folder


def packed(checkout, kind):
    """setuptools' own hook, as pip and build call it, without their fresh environment."""
    hook = f"from setuptools import build_meta; print(build_meta.build_{kind}('dist'))"
    run = subprocess.run(
        [sys.executable, "-c", hook], cwd=checkout, capture_output=True, text=True, check=True
    )
    return checkout / "dist" / run.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(checkout):
    return packed(checkout, "wheel")


def test_the_wheel_has_what_is_needed_and_nothing_else(wheel):
    assert re.fullmatch(rf"fulmen-{fulmen.__version__}-py3-none-\w+\.whl", wheel.name)
    names = set(zipfile.ZipFile(wheel).namelist())
    meta = {name for name in names if ".dist-info/" in name}
    assert {name.partition("/")[2] for name in meta} == {
        *("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    }
    assert names - meta == installed_sources() | {f"{KERNELS}/{path.name}" for path in BUILT}


@pytest.mark.skipif("FULMEN_SLOW_TESTS" not in os.environ, reason="minutes; FULMEN_SLOW_TESTS=1 runs it")
def test_the_source_package_builds_the_same_wheel(checkout, wheel, tmp_path):
    with tarfile.open(packed(checkout, "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    again = packed(folder, "wheel")
    assert again.name == wheel.name
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


def test_every_level_of_this_kind_of_machine_is_in_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    levels = CPP_LEVELS if sysconfig.get_platform().endswith(("x86_64", "amd64")) else ["plain"]
    assert {f"{KERNELS}/{CPP_LEVELS[level]}.so" for level in levels} <= names


def test_the_source_package_has_what_building_needs_and_nothing_else(checkout):
    with tarfile.open(packed(checkout, "sdist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    made = {name for name in names if name.startswith("src/fulmen.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    cpp = {name for name in sources() if name.startswith("src/fulmen/ops/cpp/src/")}
    build = {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}
    assert names - made == {f"src/{name}" for name in installed_sources()} | cpp | build


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel alone in a folder; runs a program beside it, which sees no checkout."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*command, str(folder), str(wheel)], check=True)
    hidden = ("FULMEN_BACKEND", "FULMEN_CPP_LEVEL", "FULMEN_NATIVE_LEVEL")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(*command):
        outside = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
        found = subprocess.run([sys.executable, *command], check=False, **outside)
        assert found.returncode == 0, found.stderr
        return found.stdout

    run.folder = folder
    return run


def test_the_installed_wheel_computes_at_each_level(installed):
    lines = installed("-c", EACH_LEVEL, *CPP_LEVELS).splitlines()
    found = {level: built_for for level, built_for, _ in map(json.loads, lines)}
    assert {Path(where).parents[1] for _, _, where in map(json.loads, lines)} == {installed.folder}
    runs = [level for level in CPP_LEVELS if "cannot run here" not in found[level]]
    assert runs[0] == "plain"
    # Left to itself it takes the best. What runs of the others has less; what does not, names what it lacks.
    assert found[""] == found[runs[-1]]
    assert len({found[level] for level in runs}) == len(runs)
    assert all("lacks" in found[level] for level in CPP_LEVELS if level not in runs)


def test_the_installed_commands_run(installed, tmp_path):
    make_dense("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    script = str(installed.folder / "bin" / "fulmen")
    assert fulmen.__version__ in installed(script, "--version")
    assert "llama" in installed(script, "inspect", str(tmp_path)).lower()
