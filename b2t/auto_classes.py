"""transformers' Auto classes know b2t's models once b2t is imported, whichever comes first.

Importing transformers takes seconds, which `b2t --help` need not spend: the registration waits for
the import of the Auto classes.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_PLACE = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Register the config now if transformers is there, else as soon as it is imported."""
    if _PLACE in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Watch())


class _Watch(MetaPathFinder):
    """Finds one module as the other finders do, and registers after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _PLACE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    """Register the config alone; the first config that is made brings the model."""
    from transformers.models.auto.configuration_auto import AutoConfig

    from b2t.model.configuration import BrainToTextConfig

    AutoConfig.register(BrainToTextConfig.model_type, BrainToTextConfig, exist_ok=True)
