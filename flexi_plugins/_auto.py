"""Makes transformers' Auto classes know FlexiForCausalLM, whichever of the two packages is imported first.

``import flexi_plugins`` must stay free of torch, so registration waits until transformers itself loads the module that
the Auto classes for models live in.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AUTO_MODULE = "transformers.models.auto.modeling_auto"


def register() -> None:
    """Register at once where the Auto classes are loaded already, else as soon as they are."""
    if AUTO_MODULE in sys.modules:
        _register()
    elif not any(isinstance(finder, _AutoFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoFinder())


def _register() -> None:
    """Import the model, which registers itself; where it is being imported right now, it does so at its end."""
    import flexi_plugins.modeling  # noqa: F401


class _AutoFinder(MetaPathFinder):
    """Finds one module, by asking the other finders, and has it loaded with registration at the end."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AUTO_MODULE:
            return None
        others = (f for f in sys.meta_path if f is not self)
        spec = next((s for f in others if (s := f.find_spec(fullname, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, self)
        return spec


class _RegisteringLoader(Loader):
    """Runs a module's own loader, steps out of the way, and registers."""

    def __init__(self, loader: Loader, finder: _AutoFinder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave it to the module's own loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then register."""
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        _register()
