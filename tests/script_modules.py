"""Scripts of the repository as modules, for tests of their parts."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


@contextmanager
def script(repository: Path, name: str) -> Iterator[ModuleType]:
    """Lend `scripts/<name>.py` as the module ``name``."""
    spec = importlib.util.spec_from_file_location(name, repository / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]
