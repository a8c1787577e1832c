"""PEP 517 / 660 backend: setuptools, building against the torch that is already installed.

pip builds in an environment of its own that lacks torch. Listing torch as a build requirement would fetch another
torch, and the extension would then fit that one instead of the user's. So torch is asked for only where there is none.
Metadata and source distributions are made without torch.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import locate_torch
import plan

try:
    import setuptools
    from setuptools import build_meta
except ImportError as error:
    raise plan.Cannot(
        f"setuptools is missing ({error}), type pip install {plan.BUILD_REQUIREMENTS} first, or build with isolation."
    ) from None

Settings = Mapping[str, Any] | None


def _torch_fits(found: locate_torch.TorchLocation) -> None:
    if locate_torch.too_old(found.version):
        raise plan.Cannot(
            f"it needs torch 2.11 or later and this environment holds torch {found.version}, "
            f'type pip install "{locate_torch.TORCH_REQUIREMENT}" first.'
        )


def _with_torch(requires: list[str]) -> list[str]:
    found = locate_torch.locate_torch()
    if found is None:
        print(
            "bn_ext: there is no torch in this environment, so the newest is fetched to build against: gigabytes, once "
            "for the build and once to run it. To choose it, stop here, install torch first, then bn_ext.",
            flush=True,
        )
        return [*requires, locate_torch.TORCH_REQUIREMENT]
    _torch_fits(found)
    return requires


def _check_tools() -> None:
    """Without build isolation, what is there is what there is: say what is missing before setuptools trips over it."""
    major, minor = (int(n) for n in setuptools.__version__.split(".")[:2])
    if (major, minor) < (77, 0):
        raise plan.Cannot(
            f"setuptools {setuptools.__version__} is too old, type pip install {plan.BUILD_REQUIREMENTS}."
        )
    if find_spec("ninja") is None and shutil.which("ninja") is None:
        print("bn_ext: ninja is missing, so one file is compiled at a time (pip install ninja)", flush=True)
    try:
        with tempfile.TemporaryFile(dir=Path.cwd()):
            pass
    except OSError as error:
        raise plan.Cannot(
            f"its folder {Path.cwd()} cannot be written to ({error.strerror}), copy it to one that can and build there."
        ) from None


@contextmanager
def _ready_to_build() -> Iterator[None]:
    _check_tools()
    with locate_torch.torch_importable() as found:
        if found is None:
            raise plan.Cannot(
                f'there is no torch in this environment, type pip install "{locate_torch.TORCH_REQUIREMENT}" first.'
            )
        _torch_fits(found)
        plan.settle(os.environ)
        yield


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    """Return what a source distribution needs beyond pyproject.toml's list: nothing."""
    return []


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    """Pack the sources into sdist_directory and return the archive's name."""
    _check_tools()
    return str(build_meta.build_sdist(sdist_directory, config_settings))


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """Return what the build needs beyond pyproject.toml's list: torch, where the environment has none."""
    return _with_torch([])


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """Return what an editable build needs beyond pyproject.toml's list: torch, where the environment has none."""
    return _with_torch([])


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
    with _ready_to_build():
        # setuptools packs whatever lies in build/lib*, modules that are gone from the sources included.
        for stale in Path("build").glob("lib*"):
            shutil.rmtree(stale)
        return str(build_meta.build_wheel(wheel_directory, config_settings, metadata_directory))


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Build the library into the source tree, an editable wheel in wheel_directory, and return the wheel's name."""
    with _ready_to_build():
        return str(build_meta.build_editable(wheel_directory, config_settings, metadata_directory))
