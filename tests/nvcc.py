"""nvcc without a GPU: where it is, and CUDA sources as PTX, compiled once for tests that read, run or assemble it."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "cuda"
# PTX of a generation and the machine code made from it.
FAMILIES = {75: (75,), 80: (80, 86), 90: (90,), 100: (100, 120)}
# What `make test` takes of them, by type: compilers need most of a minute for each. `make test-ptx` takes all.
FEW = {"float32": (75, 90, 100), "float16": (75, 90), "bfloat16": (90,), "float64": (90,)}
EVERY = bool(os.environ.get("BN_EXT_PTX") or os.environ.get("BN_EXT_EVERY_ARCH"))
# One release of the compiler as packages, for machines without a toolkit.
PACKAGES = (
    *("nvidia-cuda-nvcc==13.0.88", "nvidia-cuda-crt==13.0.88", "nvidia-nvvm==13.0.88"),
    *("nvidia-cuda-runtime==13.0.96", "nvidia-cuda-cccl==13.0.85"),
)


def _toolkit_from_packages() -> Path | None:
    target = CACHE / "toolkit"
    home = target / "nvidia" / "cu13"
    if not (home / "bin" / "nvcc").exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), *PACKAGES]
        try:
            subprocess.run(command, capture_output=True, check=True, timeout=240)
        except (OSError, subprocess.SubprocessError):
            return None
    return home if (home / "bin" / "nvcc").exists() else None


@functools.cache
def find_toolkit() -> Path | None:
    """The toolkit's folder: from the environment, from PATH, or installed from packages; None where there is none."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if path := shutil.which("nvcc"):
        said = subprocess.run([path, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
        top = re.search(r"^#\$ TOP=(.+)$", said.stderr, re.M)  # nvcc on PATH may be a script beside no toolkit
        homes.append(top[1] if top else None)
    for home in (*homes, "/usr/local/cuda"):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return Path(home).resolve()
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "toolkit.lock"):
        return _toolkit_from_packages()


def toolkit_or_skip() -> Path:
    """The toolkit's folder; the test is skipped where there is none."""
    home = find_toolkit()
    if home is None:
        pytest.skip("no nvcc on this machine, and its packages could not be installed")
    return home


@functools.cache
def _version(home: Path) -> bytes:
    return subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, check=True).stdout


def families_of(source: Path) -> tuple[int, ...]:
    """Of which PTX is looked at."""
    return tuple(FAMILIES) if EVERY else FEW.get(source.stem, tuple(FAMILIES))


def _without_comments(text: str) -> str:
    return re.sub(r"(^|\s)//.*$", "", text, flags=re.M)


def _with_headers(source: Path, csrc: Path) -> list[Path]:
    """The source and all of csrc that it includes, and that these include."""
    found, todo = {source}, [source]
    while todo:
        path = todo.pop()
        for name in re.findall(r'^#include "(.+)"', path.read_text(), re.M):
            for header in (path.parent / name, csrc / name):
                if header.exists() and header not in found:
                    found.add(header)
                    todo.append(header)
    return sorted(found)


def digest_of(home: Path, source: Path, csrc: Path, *more: object) -> str:
    """Of the compiler, the source and the headers that it includes, but for their comments."""
    digest = hashlib.sha256(_version(home))
    for path in _with_headers(source, csrc):
        digest.update(_without_comments(path.read_text()).encode())
    digest.update(repr(more).encode())
    return digest.hexdigest()[:20]


def compile_ptx(home: Path, source: Path, families: Sequence[int], csrc: Path = ROOT / "csrc") -> Path:
    """A folder with the PTX of these families (75.ptx) and the host object (host.o), kept until source or nvcc change.

    Nothing is assembled: that is the larger part of nvcc's work, and only ptxas' report needs it.
    """
    flags = ["-std=c++17", "-O3", f"-I{csrc}", "-Xcompiler=-fPIC", "-cudart=none", "-Werror=all-warnings"]
    folder = CACHE / f"{source.stem}-{digest_of(home, source, csrc, [f for f in flags if str(csrc) not in f])}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f"{folder.name}.lock"):
        missing = [f for f in families if not (folder / f"{f}.ptx").exists()]
        if not missing:
            return folder
        flags += [f"-gencode=arch=compute_{f},code=compute_{f}" for f in missing]
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        command = [home / "bin" / "nvcc", "-c", source, "-o", part / "host.o", *flags, "--keep", f"--keep-dir={part}"]
        said = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
        if said.returncode != 0:
            raise AssertionError(f"nvcc refuses {source.name}:\n{said.stdout[-3000:]}{said.stderr[-6000:]}")
        for path in list(part.glob("*.ptx")):
            target = re.search(r"^\.target sm_(\d+)", path.read_text(), re.M)
            assert target is not None, f"{path.name} has no .target"
            path.rename(part / f"{target[1]}.ptx")
        folder.mkdir(exist_ok=True)
        if not (folder / "host.o").exists():
            (part / "host.o").rename(folder / "host.o")
        for family in missing:
            (part / f"{family}.ptx").rename(folder / f"{family}.ptx")
        shutil.rmtree(part)
    return folder


def compile_all(home: Path, wanted: Mapping[Path, Sequence[int]]) -> dict[Path, Path]:
    """Folders as of compile_ptx by source, two compilers side by side; wanted: families by source."""
    with ThreadPoolExecutor(2) as pool:
        folders = pool.map(lambda s: compile_ptx(home, s, wanted[s]), wanted)
        return dict(zip(wanted, folders, strict=True))
