"""Compile CUDA sources to PTX with nvcc, and link a library with the machine that interprets it."""

from __future__ import annotations

import copy
import ctypes
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nvcc
from simt.backend import ARCHITECTURES, Backend
from simt.bridge import COMMON, FLAGS, SHARED, LaunchError, Library, cache, compiled, linked

HERE = Path(__file__).resolve().parent
MACHINE = sorted(HERE.glob("*.cpp"))
# No contraction but what PTX says; integers wrap around.
_FLAGS = [*COMMON, "-O2", "-ffp-contract=off", "-fwrapv", f"-I{HERE.parent / 'simt'}"]


def _flags() -> list[str]:
    """With the processor's own fused multiply and add, if it has one: the library's is slow."""
    try:
        has = " fma " in Path("/proc/cpuinfo").read_text()
    except OSError:
        has = False
    return [*_FLAGS, *["-mfma"] * has]


class Machine(Library):
    """A library whose launches take the PTX of one architecture.

    The modelled device is at most of that generation: an H200 without clusters, for PTX that knows none.
    """

    _places: dict[tuple[Path, tuple[Path, ...]], int] = {}  # noqa: RUF012

    def __init__(self, path: Path, backend: Backend, folders: Sequence[Path]) -> None:
        """folders: with the architecture's PTX. Machines of one path share the library, and what is in it."""
        super().__init__(path)
        self.backend, self.folders = backend, folders
        files = [folder / f"{backend.architecture}.ptx" for folder in folders]
        self.files = [file for file in files if file.exists()]
        self._bind("ptx_load", ctypes.c_int, ctypes.c_int, ctypes.c_char_p)
        self._bind("ptx_choose", None, *[ctypes.c_int] * 3)
        self._bind("ptx_decode", ctypes.c_long, ctypes.c_int)
        self._bind("ptx_count", None, ctypes.c_int)
        self._bind("ptx_counts", ctypes.c_char_p)
        self._bind("ptx_launch", ctypes.c_int, ctypes.c_char_p, *[ctypes.c_uint] * 3, ctypes.c_int, ctypes.c_void_p)
        self._place = self._put(self.files, backend.architecture)

    def _put(self, files: Sequence[Path], place: int) -> int:
        key = self.path, tuple(files)
        if key not in self._places:
            self.functions.simt_reset()
            for file in files:
                if not self.functions.ptx_load(place, str(file).encode()):
                    raise LaunchError(self.functions.simt_error().decode())
            self._places[key] = place
        return self._places[key]

    def with_ptx(self, file: Path) -> Machine:
        """A machine that looks for kernels in this file first."""
        other = copy.copy(self)
        other._place = self._put([file], 1000 + len(self._places))
        return other

    def _settle(self) -> None:
        architecture = self.backend.architecture
        self.functions.ptx_choose(self._place, architecture, self.backend.contract)
        later = [a for a in ARCHITECTURES if a > architecture]
        capability = 10 * self.functions.simt_get(b"cc_major") + self.functions.simt_get(b"cc_minor")
        if later and capability >= later[0]:
            self.functions.simt_set(b"cc_major", architecture // 10)
            self.functions.simt_set(b"cc_minor", architecture % 10)

    @contextmanager
    def counting(self) -> Iterator[list[dict[str, Any]]]:
        """What each launch executes, in a list that is filled at the end."""
        counts: list[dict[str, Any]] = []
        self.functions.ptx_count(1)
        try:
            yield counts
            counts += json.loads(self.functions.ptx_counts())
        finally:
            self.functions.ptx_count(0)

    def decode(self) -> int:
        """How many instructions all kernels have; raises LaunchError where one is not known."""
        self.functions.simt_reset()
        count = int(self.functions.ptx_decode(self._place))
        if count < 0:
            raise LaunchError(self.functions.simt_error().decode())
        return count


def build(name: str, sources: Sequence[Path], host: Sequence[Path], backend: Backend) -> Machine:
    """A machine for .cu files and host files. Types of which the architecture is left out have no kernels in it."""
    arch = backend.architecture
    wanted = {source: [f for f in nvcc.families_of(source) if f == arch] or [90] for source in sources}
    folders = list(nvcc.compile_all(nvcc.toolkit_or_skip(), wanted).values())
    return link(name, folders, host, backend)


def link(name: str, folders: Sequence[Path], host: Sequence[Path], backend: Backend) -> Machine:
    """As build, of folders as nvcc.compile_ptx leaves them."""
    with cache():
        objects = compiled(MACHINE, _flags(), sorted(HERE.glob("*.h")))
        objects += compiled([*SHARED, *host], FLAGS)
        objects += [folder / "host.o" for folder in folders]
        library = linked(f"{name}_ptx", objects, "-Wl,-Bsymbolic")
    return Machine(library, backend, folders)
