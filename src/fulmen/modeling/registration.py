"""Makes Transformers' auto classes and PEFT know our model types; imports model code when one is used."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from fulmen.modeling.families import family_names, import_family, vision_names
from fulmen.modeling.vision import import_vision

AUTO_CONFIG_MODULE = "transformers.models.auto.configuration_auto"
PEFT_TABLES_MODULE = "peft.utils.constants"


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

    importers: dict[str, Callable[[str], Any]] = dict.fromkeys(family_names(), import_family)
    importers |= dict.fromkeys(vision_names(), import_vision)
    for name, importer in importers.items():
        if name in CONFIG_MAPPING and f"{name}_dsa" not in CONFIG_MAPPING:
            AutoConfig.register(f"{name}_dsa", _stand_in(PreTrainedConfig, name, importer))


def _stand_in(base: type, family_name: str, importer: Callable[[str], Any]) -> type:
    """A config class whose instances are the family's own; its first use imports and registers the family."""

    def __new__(cls: type, *args: Any, **kwargs: Any) -> Any:
        return importer(family_name).config_class(*args, **kwargs)

    body = {"__module__": __name__, "__new__": __new__, "model_type": f"{family_name}_dsa"}
    return type("DsaConfigStandIn", (base,), body)


def _register_targets() -> None:
    """PEFT's tables of what each method adapts in a model by default: ours is as its dense model."""
    tables = vars(sys.modules[PEFT_TABLES_MODULE])
    for name, table in tables.items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict):
            known = {f"{family}_dsa": table[family] for family in family_names() if family in table}
            table.update(
                {model_type: targets for model_type, targets in known.items() if model_type not in table}
            )
