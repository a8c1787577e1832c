"""Find the torch of the environment that bn_ext is being installed into, from inside pip's isolated build."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

OLDEST_TORCH = (2, 11)
TORCH_REQUIREMENT = "torch>=2.11"

# Run by the same interpreter without the isolation: what it can import is what the environment holds.
_PROBE = """
import importlib.metadata, importlib.util, json, os, sys
sys.path[:] = [p for p in sys.path if p not in ("", os.getcwd())]
spec = importlib.util.find_spec("torch")
found = None
if spec is not None and spec.origin:
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    found = {"version": version, "path": sys.path + [os.path.dirname(os.path.dirname(spec.origin))]}
print(json.dumps(found))
"""


class TorchLocation(NamedTuple):
    """Where torch was found.

    version is what its metadata says ("" if it has none); path is the sys.path that makes it importable, empty when
    it already is.
    """

    version: str
    path: list[str]


def _importable_here() -> TorchLocation | None:
    if importlib.util.find_spec("torch") is None:
        return None
    from importlib.metadata import PackageNotFoundError, version

    try:
        return TorchLocation(version("torch"), [])
    except PackageNotFoundError:
        return TorchLocation("", [])


def locate_torch() -> TorchLocation | None:
    """Return where torch is, or None where neither this process nor its environment has one."""
    here = _importable_here()
    if here is not None:
        return here
    # pip isolates a build with these two variables, around the very interpreter that is being installed into.
    environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    probe = subprocess.run(
        [sys.executable, "-c", _PROBE], env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    lines = probe.stdout.strip().splitlines()
    found = json.loads(lines[-1]) if probe.returncode == 0 and lines else None
    return None if found is None else TorchLocation(found["version"], found["path"])


def too_old(version: str) -> bool:
    """Say whether a torch version string is below the oldest supported one; an unreadable one is given the benefit."""
    numbers = version.split("+")[0].split(".")[:2]
    if len(numbers) < 2 or not all(n.isdigit() for n in numbers):
        return False
    return (int(numbers[0]), int(numbers[1])) < OLDEST_TORCH


@contextmanager
def torch_importable() -> Iterator[TorchLocation | None]:
    """Make the environment's torch importable in here and in child processes' sys.path order, for the time of a build.

    Its folders go last, so that the isolated build's own setuptools and ninja stay in front.
    """
    found = locate_torch()
    before = list(sys.path)
    if found is not None:
        sys.path.extend(p for p in found.path if p not in before)
    try:
        yield found
    finally:
        sys.path[:] = before
