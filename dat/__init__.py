"""Vision Transformer with Deformable Attention: a sampling op, layers, and backbones registered with timm.

`import dat` registers the backbones with timm, if timm is imported already, or as soon as it is. Neither torch nor
timm is imported before something needs it, so that the command `dat` starts at once.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dat import models as models
    from dat import ops as ops

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("models", "ops"):
        return importlib.import_module(f"dat.{name}")
    raise AttributeError(f"module 'dat' has no attribute {name!r}")


class _Register:
    """Imports dat.models, which registers the backbones, once timm is imported.

    A finder of modules, which sees every import of timm and of this package's modules. It waits for the outermost of
    them to end: dat.models needs modules that themselves import timm, and would find them half initialised.
    """

    running = 0

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "timm" and not name.startswith("dat."):
            return None
        finders = [finder for finder in sys.meta_path if finder is not cls]
        spec = next((found for finder in finders if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                cls.running += 1
                try:
                    execute(module)
                finally:
                    cls.running -= 1
                if not cls.running and "timm" in sys.modules and cls in sys.meta_path:
                    sys.meta_path.remove(cls)  # type: ignore[arg-type]
                    importlib.import_module("dat.models")

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "timm" in sys.modules:
    importlib.import_module("dat.models")
else:
    sys.meta_path.insert(0, _Register)  # type: ignore[arg-type]
