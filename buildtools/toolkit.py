"""Find a whole CUDA toolkit: nvcc, the runtime's headers and its library, of one place."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

HEADER = "cuda_runtime_api.h"
USUAL = ("usr/local/cuda", "usr/local/cuda-*", "opt/cuda", "usr/lib/cuda", "usr/lib/nvidia-cuda-toolkit", "usr")


class Toolkit(NamedTuple):
    """A CUDA toolkit: its folder, nvcc's (major, minor), where its headers are, and what was passed over to get here.

    passed_over holds a clause for each place that somebody has named and that is no toolkit.
    """

    home: Path
    version: tuple[int, int]
    include: Path
    passed_over: tuple[str, ...] = ()


class Missing(NamedTuple):
    """There is no whole toolkit; why, as a clause."""

    reason: str


def nvcc_version(nvcc: Path) -> tuple[int, int] | None:
    """Return (major, minor) of an nvcc, or None where it does not answer."""
    try:
        said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    match = re.search(r"release (\d+)\.(\d+)", said)
    return (int(match[1]), int(match[2])) if match else None


def examine(home: Path) -> Toolkit | str:
    """Return the toolkit in a folder, or what it lacks, as a clause."""
    if not home.is_dir():
        return f"{home} is not there"
    nvcc = home / "bin" / "nvcc"
    if not nvcc.is_file():
        return f"{home} holds no bin/nvcc"
    version = nvcc_version(nvcc)
    if version is None:
        return f"{nvcc} does not run"
    places = [home / "include", *sorted(home.glob("targets/*/include"))]
    include = next((place for place in places if (place / HEADER).is_file()), None)
    if include is None:
        return f"{home} holds nvcc {version[0]}.{version[1]} and no include/{HEADER}"
    libraries = ("lib64", "lib", "lib/*-linux-gnu", "targets/*/lib")
    if not any(path for folder in libraries for path in home.glob(f"{folder}/libcudart.so")):
        return f"{home} holds nvcc {version[0]}.{version[1]} and no lib64/libcudart.so"
    return Toolkit(home, version, include)


def _own_answer(nvcc: Path) -> Path | None:
    """Return the folder that nvcc itself takes its headers from: a wrapper's or a link's place says nothing."""
    command = [str(nvcc), "--dryrun", "-E", "-x", "cu", os.devnull]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    match = re.search(r"^#\$ TOP=(.+)$", said.stderr + said.stdout, re.M)
    return Path(match[1].strip()).resolve() if match else None


def _implied(environ: Mapping[str, str], root: Path) -> Iterator[Path]:
    """The places that nobody has named, likeliest first."""
    on_path = shutil.which("nvcc", path=environ.get("PATH", ""))
    if on_path:
        nvcc = Path(on_path)
        answer = _own_answer(nvcc)
        yield from [answer] if answer else []
        yield nvcc.resolve().parent.parent
        yield nvcc.parent.parent
    if environ.get("CONDA_PREFIX"):
        yield Path(environ["CONDA_PREFIX"])
    yield Path(sys.prefix)
    for folder in sys.path:
        yield from sorted(Path(folder or ".").glob("nvidia/cu[0-9]*"), reverse=True)
    for pattern in USUAL:
        yield from sorted(root.glob(pattern), reverse=True)


def find_toolkit(environ: Mapping[str, str], major: int, root: Path = Path("/")) -> Toolkit | Missing:
    """Return the CUDA toolkit to build with: what CUDA_HOME or CUDA_PATH names, else the first of this major release.

    major is that of torch's CUDA. A variable that names no toolkit is passed over. A toolkit of another major release
    is returned where there is no better one, for the caller to say so. root is where the usual places lie.
    """
    passed_over: list[str] = []
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            found = examine(Path(environ[variable]))
            if isinstance(found, Toolkit):
                return found._replace(passed_over=tuple(passed_over))
            passed_over.append(f"{variable}={environ[variable]}: {found}")
    others: list[Toolkit] = []
    lacking: list[str] = []
    for home in dict.fromkeys(_implied(environ, root)):
        found = examine(home)
        if isinstance(found, Toolkit):
            found = found._replace(passed_over=tuple(passed_over))
            if found.version[0] == major:
                return found
            others.append(found)
        elif (home / "bin" / "nvcc").is_file():
            lacking.append(found)
    if others:
        return others[0]
    clauses = passed_over + lacking or ["CUDA_HOME is not set, nvcc is not on PATH, and the usual places hold none"]
    return Missing("no whole CUDA toolkit was found (" + "; ".join(clauses) + ")")
