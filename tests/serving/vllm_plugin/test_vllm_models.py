"""Every family that needs the plugin has a class in it: read from the source, as vLLM may be missing."""

import ast
import importlib.util
from pathlib import Path

from fulmen.serving.vllm_plugin import MODELS, served_classes


def test_the_plugin_has_a_class_for_each_family_that_needs_one():
    spec = importlib.util.find_spec("fulmen.serving.vllm_plugin")
    source = Path(spec.submodule_search_locations[0], f"{MODELS.rpartition('.')[2]}.py").read_text()
    classes = [node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    assert sorted(name for name in classes if name.endswith("ForCausalLM")) == sorted(served_classes())
    assert "DeepseekV32ForCausalLM" not in served_classes()
