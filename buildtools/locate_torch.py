"""Find the torch of the environment that bn_ext is being installed into, from inside pip's isolated build.

Run as a program it prints what it finds as JSON. Nothing here imports torch: that takes seconds, and metadata is made
where there is none.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import NamedTuple

OLDEST_TORCH = (2, 11)
TORCH_REQUIREMENT = "torch>=2.11"


class TorchLocation(NamedTuple):
    """Where torch was found.

    version is torch.__version__ ("" if it cannot be read), cuda torch.version.cuda; path is the sys.path that makes it
    importable, empty when it already is.
    """

    version: str
    cuda: str | None
    path: list[str]


def _here() -> TorchLocation | None:
    """Return the torch that this process can import, with an empty path."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text()
    except OSError:
        text = ""
    said = dict(re.findall(r"^(\w+)\b[^=\n]*= *['\"](.*)['\"]", text, re.M))
    try:
        version = said.get("__version__") or version_of("torch")
    except PackageNotFoundError:
        version = ""
    return TorchLocation(version, said.get("cuda"), [])


def locate_torch() -> TorchLocation | None:
    """Return where torch is, or None where neither this process nor its environment has one."""
    here = _here()
    if here is not None:
        return here
    # pip isolates a build with these two variables, around the very interpreter that is being installed into.
    environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    probe = subprocess.run(
        [sys.executable, __file__], env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    lines = probe.stdout.strip().splitlines()
    found = json.loads(lines[-1]) if probe.returncode == 0 and lines else None
    return None if found is None else TorchLocation(*found)


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


if __name__ == "__main__":
    # Without this file's folder and the current one, what is left is what the environment holds.
    sys.path[:] = [p for p in sys.path if p not in ("", os.getcwd(), str(Path(__file__).parent))]
    seen = _here()
    if seen is not None:
        origin = importlib.util.find_spec("torch").origin  # type: ignore[union-attr]
        seen = seen._replace(path=[*sys.path, str(Path(str(origin)).parent.parent)])
    print(json.dumps(seen))
