"""PEP 517 / 660 backend: setuptools, building against the torch that is already installed.

pip builds in an environment of its own that lacks torch. Listing torch as a build requirement would fetch another
torch, and the extension would then fit that one instead of the user's. So torch is asked for only where there is none.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import setuptools
from setuptools import build_meta

import locate_torch
import plan

Settings = Mapping[str, Any] | None

build_sdist = build_meta.build_sdist
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist


def _torch_fits(found: locate_torch.TorchLocation) -> None:
    if locate_torch.too_old(found.version):
        raise plan.Cannot(
            f"it needs torch 2.11 or later and this environment holds torch {found.version}, "
            f'type pip install "{locate_torch.TORCH_REQUIREMENT}" first.'
        )


def _with_torch(requires: list[str]) -> list[str]:
    found = locate_torch.locate_torch()
    if found is None:
        return [*requires, locate_torch.TORCH_REQUIREMENT]
    _torch_fits(found)
    return requires


def _check_tools() -> None:
    """Without build isolation, what is there is what there is: say what is missing before setuptools trips over it."""
    found = locate_torch.locate_torch()
    if found is None:
        raise plan.Cannot(
            f'there is no torch in this environment, type pip install "{locate_torch.TORCH_REQUIREMENT}" first.'
        )
    _torch_fits(found)
    major, minor = (int(n) for n in setuptools.__version__.split(".")[:2])
    if (major, minor) < (70, 1) and find_spec("wheel") is None:
        raise plan.Cannot(f"setuptools {setuptools.__version__} needs the package wheel, type pip install wheel first.")


@contextmanager
def _ready_to_build() -> Iterator[None]:
    _check_tools()
    with locate_torch.torch_importable():
        plan.settle(os.environ, any(Path("csrc", "cuda").glob("*.cu")))
        yield


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """Return what the build needs beyond pyproject.toml's list: torch, where the environment has none."""
    return _with_torch(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """Return what an editable build needs beyond pyproject.toml's list: torch, where the environment has none."""
    return _with_torch(build_meta.get_requires_for_build_editable(config_settings))


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings = None) -> str:
    """Write the wheel's metadata into metadata_directory and return its folder's name."""
    _check_tools()
    return str(build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings))


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Settings = None) -> str:
    """Write the editable wheel's metadata into metadata_directory and return its folder's name."""
    _check_tools()
    return str(build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings))


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    """Build a wheel in wheel_directory and return its file name."""
    # setuptools packs whatever lies in build/lib*, modules that are gone from the sources included.
    for stale in Path("build").glob("lib*"):
        shutil.rmtree(stale)
    with _ready_to_build():
        return str(build_meta.build_wheel(wheel_directory, config_settings, metadata_directory))


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Build the library into the source tree, an editable wheel in wheel_directory, and return the wheel's name."""
    with _ready_to_build():
        return str(build_meta.build_editable(wheel_directory, config_settings, metadata_directory))
