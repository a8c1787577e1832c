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

# What is to be printed after the run, as pairs of a title and lines (conftest.py).
SECTIONS = pytest.StashKey[list[tuple[str, list[str]]]]()

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps or ELF files")


def made_toolkit(folder: Path, release: str = "13.0", lacks: tuple[str, ...] = (), name: str = "toolkit") -> Path:
    """Make what looks like a CUDA toolkit, less what it lacks; its nvcc says its release, folder and architectures."""
    home = folder / name
    for part in ("bin/nvcc", "include/cuda_runtime_api.h", "lib64/libcudart.so"):
        (home / part).parent.mkdir(parents=True, exist_ok=True)
        if part not in lacks:
            (home / part).touch()
    if "bin/nvcc" not in lacks:
        archs = "\\n".join(f"compute_{n}" for n in (75, 80, 86, 89, 90, 100, 120))
        (home / "bin/nvcc").write_text(
            f"""#!/bin/sh
case "$*" in
  *--version*) echo 'Cuda compilation tools, release {release}, V{release}.88' ;;
  *--list-gpu-arch*) printf '{archs}\\n' ;;
  *--dryrun*) echo '#$ TOP={home}/bin/..' >&2 ;;
esac
"""
        )
        (home / "bin/nvcc").chmod(0o755)
    return home


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
