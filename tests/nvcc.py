"""nvcc without a GPU: where it is, and CUDA sources as PTX, compiled once for tests that read, run or assemble it."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "cuda"
# PTX of a generation and the machine code made from it.
FAMILIES = {75: (75,), 80: (80, 86), 90: (90,), 100: (100, 120)}
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


def _without_comments(text: str) -> str:
    return re.sub(r"(^|\s)//.*$", "", text, flags=re.M)


def digest_of(home: Path, source: Path, csrc: Path, *more: object) -> str:
    """Of the compiler, the source and all headers that it may include, but for their comments."""
    digest = hashlib.sha256(_version(home))
    headers = sorted(p for p in csrc.rglob("*") if p.suffix in (".h", ".cuh", ".inc"))
    for path in (source, *headers):
        digest.update(_without_comments(path.read_text()).encode())
    digest.update(repr(more).encode())
    return digest.hexdigest()[:20]


def compile_ptx(
    home: Path, source: Path, families: Sequence[int] = tuple(FAMILIES), csrc: Path = ROOT / "csrc"
) -> Path:
    """A folder with the PTX of each family (75.ptx) and the host object (host.o), kept until a source or nvcc changes.

    Nothing is assembled: that is the larger part of nvcc's work, and only ptxas' report needs it.
    """
    flags = ["-std=c++17", "-O3", f"-I{csrc}", "-Xcompiler=-fPIC", "-cudart=none", "-Werror=all-warnings"]
    flags += [f"-gencode=arch=compute_{f},code=compute_{f}" for f in families]
    where = [flag.replace(str(csrc), "") for flag in flags]
    folder = CACHE / f"{source.stem}-{digest_of(home, source, csrc, where)}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f"{folder.name}.lock"):
        if (folder / "host.o").exists():
            return folder
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
        for path in part.iterdir():
            if path.suffix != ".ptx" and path.name != "host.o":
                path.unlink()
        part.rename(folder)
    return folder


def compile_all(
    home: Path, sources: Sequence[Path], families: Sequence[int] = tuple(FAMILIES), csrc: Path = ROOT / "csrc"
) -> dict[Path, Path]:
    """Folders as of compile_ptx by source, two compilers side by side."""
    with ThreadPoolExecutor(2) as pool:
        folders = pool.map(lambda s: compile_ptx(home, s, families, csrc), sources)
        return dict(zip(sources, folders, strict=True))
