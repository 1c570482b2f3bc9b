"""Makes Transformers' auto classes know fulmen's model types; imports model code only when one is used."""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from fulmen.modeling.families import family_names, import_family

AUTO_CONFIG_MODULE = "transformers.models.auto.configuration_auto"


def register_model_types() -> None:
    """Register stand-ins for our config classes, at once or as soon as Transformers' table is imported.

    Importing that table takes seconds; `import fulmen` must not.
    """
    if AUTO_CONFIG_MODULE in sys.modules:
        _register_stand_ins()
    else:
        sys.meta_path.insert(0, _AutoConfigWatch())


class _AutoConfigWatch(MetaPathFinder):
    """Registers the stand-ins right after the import of the table, once, and leaves."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AUTO_CONFIG_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        loader: Any = spec.loader if spec else None
        if loader is not None:
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register_stand_ins()

            loader.exec_module = execute_and_register
        return spec


def _register_stand_ins() -> None:
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

    for name in family_names():
        if name in CONFIG_MAPPING and f"{name}_dsa" not in CONFIG_MAPPING:
            AutoConfig.register(f"{name}_dsa", _stand_in(PreTrainedConfig, name))


def _stand_in(base: type, family_name: str) -> type:
    """A config class whose instances are the family's own; its first use imports and registers the family."""

    def __new__(cls: type, *args: Any, **kwargs: Any) -> Any:
        return import_family(family_name).config_class(*args, **kwargs)

    body = {"__module__": __name__, "__new__": __new__, "model_type": f"{family_name}_dsa"}
    return type("DsaConfigStandIn", (base,), body)
