"""What the tests of the build share: where things are, and running another process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import bn_ext

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(bn_ext.__file__).resolve().parent

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps or ELF files")


def run(*command: str | Path, cwd: Path, check: bool = True, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command with the given variables added to the environment; its output is in .stdout, errors included."""
    clean = {k: v for k, v in os.environ.items() if k not in ("FORCE_CPU", "FORCE_CUDA", "PYTHONPATH")}
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**clean, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0 or not check, done.stdout
    return done
