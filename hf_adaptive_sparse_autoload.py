"""Registers the plugin with transformers wherever it is installed, without an import of its own.

transformers has no discovery of quantization plugins: a program that does not import
`hf_adaptive_sparse` would load a compressed checkpoint with its pruned weights filled at random.
torch has one: it calls what the entry point ``torch.backends`` names when it is imported
(``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` switches that off). `install` is what it calls here. It imports
nothing: it waits until a program loads the part of transformers that loads models, or the one that
knows quantization plugins, and imports the plugin behind it. That is what lets other programs,
such as lm-evaluation-harness, read compressed checkpoints through their own command lines.

One case stays: a program whose first import is ``transformers.modeling_utils`` itself, and which
loads by a model class of its own without any further import of transformers, has to import the
plugin.

This module lies beside the package, because importing anything inside the package imports torch.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PLUGIN = "hf_adaptive_sparse"
AWAITED = ("transformers.modeling_utils", "transformers.quantizers")


def install() -> None:
    """Import the plugin once transformers may look for it; at once if it may already."""
    if PLUGIN in sys.modules or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    begun = [name for name in AWAITED if name in sys.modules]
    if begun and not _any_executes(begun):
        _import_plugin()
    else:
        sys.meta_path.insert(0, _Finder(begun))


def _any_executes(names: Sequence[str]) -> bool:
    """Return whether the import of one of these modules has not come to its end."""
    specs = [getattr(sys.modules.get(name), "__spec__", None) for name in names]
    return any(getattr(spec, "_initializing", False) for spec in specs)


def _import_plugin() -> None:
    try:
        importlib.import_module(PLUGIN)
    except Exception:  # whatever is wrong here must not stop programs that never asked for it
        logging.getLogger(__name__).warning(
            "hf_adaptive_sparse is installed but cannot be imported, so compressed checkpoints "
            "cannot be read.",
            exc_info=True,
        )


class _Finder(MetaPathFinder):
    """Finds the awaited modules as everyone else does, and has the plugin follow them.

    Nothing is removed from the list ``sys.meta_path``: other threads, which import other modules,
    may be going through it, and would miss a finder.

    Where an awaited module is the first to import torch, it executes already when the finder is
    made. Then the plugin follows any module of transformers that is executed after it.

    Args:
        begun: Awaited modules that execute already.
    """

    def __init__(self, begun: Sequence[str]) -> None:
        self.begun = begun
        self.executing: list[str] = []

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Return the spec of an awaited module with a loader around its own; else None."""
        if fullname not in AWAITED and not (self.begun and fullname.startswith("transformers.")):
            return None
        others = [f for f in sys.meta_path if f is not self and hasattr(f, "find_spec")]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec

    def executed(self, name: str) -> None:
        """Import the plugin, unless an awaited module that imported this one still executes."""
        self.executing.remove(name)
        if not self.executing and not _any_executes(self.begun) and self in sys.meta_path:
            sys.meta_path = [finder for finder in sys.meta_path if finder is not self]
            _import_plugin()


class _Loader(Loader):
    """Loads as the loader it wraps, and tells the finder."""

    def __init__(self, wrapped: Loader, finder: _Finder) -> None:
        self.wrapped, self.finder = wrapped, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module as the wrapped loader does."""
        return self.wrapped.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module as the wrapped loader does, which is also the one it keeps."""
        name = module.__name__
        module.__loader__ = self.wrapped
        if module.__spec__ is not None:
            module.__spec__.loader = self.wrapped
        self.finder.executing.append(name)
        try:
            self.wrapped.exec_module(module)
        except BaseException:
            self.finder.executing.remove(name)
            raise
        self.finder.executed(name)
