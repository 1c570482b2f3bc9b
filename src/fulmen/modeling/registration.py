"""Makes Transformers' auto classes and PEFT know our model types; imports model code when one is used."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from fulmen.modeling.families import family_names, import_family, vision_names
from fulmen.modeling.vision import import_vision

AUTO_CONFIG_MODULE = "transformers.models.auto.configuration_auto"
PEFT_TABLES_MODULE = "peft.utils.constants"
# Types of models that are another's, weight for weight, and which Transformers does not know by their name.
OTHERS_TYPES = {"kimi_k2": "deepseek_v3"}


def register_model_types() -> None:
    """Register stand-ins for our config classes, and what PEFT adapts in them: at once where the libraries'
    tables are imported, else as soon as they are.

    Importing them takes seconds; `import fulmen` must not.
    """
    for module, register in (
        (AUTO_CONFIG_MODULE, _register_stand_ins),
        (PEFT_TABLES_MODULE, _register_targets),
    ):
        if module in sys.modules:
            register()
        else:
            sys.meta_path.insert(0, _ImportWatch(module, register))


class _ImportWatch(MetaPathFinder):
    """Registers right after the import of a module, once, and leaves."""

    def __init__(self, module: str, register: Callable[[], None]) -> None:
        self.module, self._register = module, register

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        loader: Any = spec.loader if spec else None
        if loader is not None:
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                self._register()

            loader.exec_module = execute_and_register
        return spec


def _register_stand_ins() -> None:
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

    def stand_in(model_type: str, config_class: Callable[[], Any]) -> None:
        if model_type not in CONFIG_MAPPING:
            AutoConfig.register(model_type, _stand_in(PreTrainedConfig, model_type, config_class))

    importers: dict[str, Callable[[str], Any]] = dict.fromkeys(family_names(), import_family)
    importers |= dict.fromkeys(vision_names(), import_vision)
    for name, importer in importers.items():
        if name in CONFIG_MAPPING:
            stand_in(f"{name}_dsa", partial(_dsa_config_class, importer, name))
    for name, other in OTHERS_TYPES.items():
        stand_in(name, partial(CONFIG_MAPPING.__getitem__, other))


def _dsa_config_class(importer: Callable[[str], Any], name: str) -> type:
    """Imports and registers the family, or the model that reads images."""
    config_class: type = importer(name).config_class
    return config_class


def _stand_in(base: type, model_type: str, config_class: Callable[[], Any]) -> type:
    """A config class of this `model_type` whose instances are of another class."""

    def __new__(cls: type, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("model_type", None)  # the class has its own
        return config_class()(*args, **kwargs)

    body = {"__module__": __name__, "__new__": __new__, "model_type": model_type}
    return type("ConfigStandIn", (base,), body)


def _register_targets() -> None:
    """PEFT's tables of what each method adapts in a model by default: ours is as its dense model."""
    tables = vars(sys.modules[PEFT_TABLES_MODULE])
    for name, table in tables.items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict):
            known = {f"{family}_dsa": table[family] for family in family_names() if family in table}
            table.update(
                {model_type: targets for model_type, targets in known.items() if model_type not in table}
            )
