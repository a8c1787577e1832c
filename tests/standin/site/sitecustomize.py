"""In every Python with the stand-in: as soon as torch is there, its operators are the overlay's."""

from __future__ import annotations

import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class WithOverlay(Loader):
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self.inner.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        module.__spec__.loader = self.inner  # type: ignore[union-attr]
        module.backends.cudnn.enabled = False  # native's batch norm is then an operator that the CPU knows too
        module.ops.load_library(os.environ["STANDIN_OVERLAY"])


class OfTorch(MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None:
            spec.loader = WithOverlay(spec.loader)
        return spec


if "STANDIN_OVERLAY" in os.environ:
    sys.meta_path.insert(0, OfTorch())
