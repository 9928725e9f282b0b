"""Registers the plugin with transformers wherever it is installed, without an import of its own.

transformers has no discovery of quantization plugins: a program that does not import
`hf_adaptive_sparse` would load a compressed checkpoint with its pruned weights filled at random.
torch has one: it calls what the entry point ``torch.backends`` names when it is imported
(``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` switches that off). `install` is what it calls here. It imports
nothing: it waits until a program loads ``transformers.modeling_utils``, without which no model can
be loaded, and imports the plugin right behind it. That is what lets other programs, such as
lm-evaluation-harness, read compressed checkpoints through their own command lines.

This module lies beside the package, because importing anything inside the package imports torch.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

PLUGIN = "hf_adaptive_sparse"
AWAITED = "transformers.modeling_utils"


def install() -> None:
    """Import the plugin once transformers can load models; at once if it can already."""
    if PLUGIN in sys.modules or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if AWAITED in sys.modules:
        _import_plugin()
    else:
        sys.meta_path.insert(0, _Finder())


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
    """Finds the awaited module as everyone else does, once, and has the plugin follow it."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Return the spec of the awaited module with a loader around its own; else None."""
        if fullname != AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads as the loader it wraps, then imports the plugin."""

    def __init__(self, wrapped: Loader) -> None:
        self.wrapped = wrapped

    def __getattr__(self, name: str) -> object:
        # Readers of sources and resources ask a loader for more than Loader names.
        return getattr(self.wrapped, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module as the wrapped loader does."""
        return self.wrapped.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, and then import the plugin."""
        module.__loader__ = self.wrapped
        if module.__spec__ is not None:
            module.__spec__.loader = self.wrapped
        self.wrapped.exec_module(module)
        _import_plugin()
