"""What `import fulmen` offers, and what it leaves alone."""

import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fulmen
from fulmen import errors
from fulmen.modeling.families import all_families, vision_names

ROOT = Path(__file__).parents[1]
UNASKED = ["datasets", "matplotlib", "vllm", "typer"]
# Triton comes with Transformers' models, where it is installed: torch's compiler looks for it.
HEAVY = ["torch", "transformers", "accelerate", "rich", "triton", *UNASKED]


def run(code):
    """Run `code` in a fresh interpreter; return what it prints."""
    environment = {"PYTHONPATH": str(Path(fulmen.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True
    )
    return done.stdout.split()


FUNCTIONS = {"ask", "convert", "distill", "evaluate", "inspect", "load", "recipe", "rl", "set_topk"}
FUNCTIONS |= {"export_rl", "sft", "specialize", "train"}
CLASSES = {"Conversion", "DsaConfig", "FolderAnswer", "ModelDescription", "ParityReport", "SuiteReport"}
CLASSES |= {"LineReporter", "Reporter", "SilentReporter"}


def test_all_names_exist_and_are_the_functions_with_what_they_take_and_give():
    every_error = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert set(fulmen.__all__) == every_error | FUNCTIONS | CLASSES | {"__version__"}
    assert all(getattr(fulmen, name) is not None for name in fulmen.__all__)
    assert set(fulmen.__all__) <= set(dir(fulmen))
    assert (Path(fulmen.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_functions_say_what_they_take_and_raise(name):
    function = getattr(fulmen, name)
    words = function.__doc__
    parameters = inspect.signature(function).parameters
    assert "Raises" in words
    if name != "set_topk":
        documented = set(
            re.findall(r"^        (\w+): ", words[words.index("Args:") : words.index("Raises:")], re.M)
        )
        assert documented == set(parameters)
        # A folder and a question about it stand side by side.
        later = list(parameters.values())[2 if name == "ask" else 1 :]
        assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in later)


def test_every_error_is_a_value_error():
    assert all(issubclass(value, ValueError) for value in vars(errors).values() if isinstance(value, type))


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = fulmen.nothing


def test_version_is_the_projects():
    assert fulmen.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_import_brings_no_library():
    assert run(f"import sys, fulmen; print(*(set({HEAVY}) & set(sys.modules)))") == []


@pytest.mark.parametrize(
    "order",
    ["import fulmen; import transformers", "import transformers.models.auto; import fulmen"],
    ids=["fulmen first", "transformers first"],
)
def test_auto_classes_know_our_types_in_either_order(order):
    code = f"""
import sys
{order}
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
print("fulmen.modeling.families.llama" in sys.modules)
print(*sorted(name for name in CONFIG_MAPPING if name.endswith("_dsa") and name != "glm_moe_dsa"))
dsa = dict(topk=4, index_n_heads=2, index_n_kv_heads=1, index_head_dim=8, layers=[0])
small = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32, vocab_size=10)
config = AutoConfig.for_model("llama_dsa", dsa=dsa, **small)
print(type(config).__name__, type(AutoModelForCausalLM.from_config(config)).__name__)
print(*(finder.module for finder in sys.meta_path if "Watch" in type(finder).__name__))
print(*set({UNASKED}) & set(sys.modules))
"""
    assert run(code) == [
        "False",
        *sorted(
            [
                *(f"{family.source_types[0]}_dsa" for family in all_families() if not family.is_stock),
                *(f"{name}_dsa" for name in vision_names()),
            ]
        ),
        *("LlamaDsaConfig", "LlamaDsaForCausalLM"),
        # Waits for PEFT, which nobody has imported; the other has gone.
        "peft.utils.constants",
    ]


def test_python_runs_the_program_by_the_packages_name():
    told = subprocess.run([sys.executable, "-m", "fulmen", "--version"], capture_output=True, text=True)
    assert (told.returncode, told.stdout.split()[-1]) == (0, fulmen.__version__)
