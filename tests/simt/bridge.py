"""Build CUDA sources against the stand-in runtime, run their launchers on guarded memory, read the counters."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "simt"
RUNTIME = [HERE / name for name in ("fibers.cpp", "scheduler.cpp", "threads.cpp", "signals.cpp")]
SHARED = [HERE / name for name in ("memory.cpp", "traffic.cpp", "device_model.cpp")]  # with tests/ptx
COMMON = [
    *("-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-fno-ipa-icf"),
    *("-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas", "-Wno-attributes"),
    *("-DBN_EXT_SIMT", f"-I{HERE / 'include'}", f"-I{ROOT / 'csrc'}"),
]
FLAGS = [
    *COMMON,
    "-O1",
    # a fault in a kernel is a trap, which the runtime turns into an error
    *("-fsanitize=bounds,signed-integer-overflow,shift,integer-divide-by-zero", "-fsanitize-undefined-trap-on-error"),
]


class LaunchError(AssertionError):
    """A launch that ended in an error, with the runtime's report."""


def digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()[:20]


def _headers() -> list[Path]:
    folders = (HERE, HERE / "include", ROOT / "csrc" / "core", ROOT / "csrc" / "cuda")
    found = {p for folder in folders for p in folder.glob("*") if p.suffix in (".h", ".cuh", ".inc")}
    return sorted(found | set((HERE / "include").rglob("*.h")))


@functools.cache
def compiler() -> str:
    """The C++ compiler's path; raises RuntimeError where there is none."""
    for name in (os.environ.get("CXX", ""), "g++", "c++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise RuntimeError("no C++ compiler")


def _run(command: Sequence[str | Path]) -> None:
    said = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if said.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{said.stderr[-6000:]}")


@contextmanager
def cache() -> Iterator[None]:
    """Have build/simt alone: tests in other processes wait instead of compiling the same."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "lock"):
        yield


def build(name: str, sources: Sequence[Path], flags: Sequence[str] = ()) -> Library:
    """Compile .cu and .cpp files with g++ and link them with the runtime; unchanged ones come from build/simt."""
    with cache():
        objects = compiled([*RUNTIME, *SHARED, *sources], [*FLAGS, *flags])
        return Library(linked(name, objects))


def compiled(sources: Sequence[Path], flags: Sequence[str], headers: Sequence[Path] = ()) -> list[Path]:
    """The objects of sources; unchanged ones come from build/simt. Within `cache`. headers: of the sources alone."""
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    common = [version, *flags, *(p.read_bytes() for p in (*_headers(), *headers))]

    def compile_one(source: Path) -> Path:
        target = CACHE / f"{source.stem}-{digest(*common, str(source), source.read_bytes())}.o"
        if not target.exists():
            part = target.with_suffix(f".{os.getpid()}.part")
            _run([compiler(), *flags, "-x", "c++", "-c", source, "-o", part])
            part.replace(target)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


def linked(name: str, objects: Sequence[Path], *options: str) -> Path:
    """A library of objects, whose names tell their contents. Within `cache`."""
    library = CACHE / f"{name}-{digest(*map(str, objects), *options)}.so"
    if not library.exists():
        part = library.with_suffix(f".{os.getpid()}.part")
        _run([compiler(), "-shared", "-Wl,-z,defs", *options, *objects, "-o", part, "-ldl"])
        part.replace(library)
    return library


class Library:
    """A built library: its launchers by attribute, and sessions to run them in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.functions = ctypes.CDLL(str(path))
        self._bind("simt_alloc", ctypes.c_void_p, ctypes.c_char_p, *[ctypes.c_size_t] * 2, *[ctypes.c_int] * 2)
        self._bind("simt_free", None, ctypes.c_void_p)
        self._bind("simt_filled", None, ctypes.c_void_p, ctypes.c_int)
        self._bind("simt_error", ctypes.c_char_p)
        self._bind("simt_report", ctypes.c_char_p)
        self._bind("simt_reset", None)
        self._bind("simt_seed", None, ctypes.c_uint64)
        self._bind("simt_device", ctypes.c_int, ctypes.c_char_p)
        self._bind("simt_set", ctypes.c_int, ctypes.c_char_p, ctypes.c_long)
        self._bind("simt_get", ctypes.c_long, ctypes.c_char_p)

    def _bind(self, name: str, result: Any, *arguments: Any) -> None:
        function = getattr(self.functions, name)
        function.restype, function.argtypes = result, list(arguments)

    @functools.cached_property
    def _symbols(self) -> dict[int, str]:
        said = subprocess.run(
            ["nm", "-C", "--defined-only", str(self.path)], capture_output=True, text=True, check=True
        )
        lines = [line.split(maxsplit=2) for line in said.stdout.splitlines()]
        return {int(at, 16): name for at, kind, name in lines if kind in "tTwW"}

    def resolve(self, text: str) -> str:
        """Put names and lines in place of the addresses in the runtime's text."""
        base = ctypes.cast(self.functions.simt_error, ctypes.c_void_p).value - self._offset("simt_error")

        def kernel(match: re.Match[str]) -> str:
            name = self._symbols.get(int(match[1], 16) - base, match[1]).replace("(anonymous namespace)::", "")
            return without_parameters(name.removeprefix("void "))

        def line(match: re.Match[str]) -> str:
            command = ["addr2line", "-e", str(self.path), match[1]]
            said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
            return "at " + said.rpartition("/")[2].split(" ")[0]

        text = re.sub(r"\{kernel (0x[0-9a-f]+)\}", kernel, text)
        return re.sub(r"\{pc (0x[0-9a-f]+)\}", line, text)

    def _offset(self, name: str) -> int:
        return next(at for at, symbol in self._symbols.items() if symbol == name)

    def _settle(self) -> None:
        """The model is set: what a machine for some devices only makes of it."""

    @contextmanager
    def session(self, device: str = "H200", seed: int = 0, **model: int) -> Iterator[Session]:
        """A fresh device model, schedule and memory; keywords change figures of the model, e.g. sms=4."""
        if not self.functions.simt_device(device.encode()):
            raise ValueError(f"no device {device}")
        for key, value in model.items():
            if not self.functions.simt_set(key.encode(), value):
                raise ValueError(f"the device model has no {key}")
        self._settle()
        self.functions.simt_seed(seed)
        self.functions.simt_reset()
        session = Session(self)
        try:
            yield session
        finally:
            session.close()


class Session:
    """Guarded tensors and launches on one modelled device."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._functions = library.functions
        self._owned: dict[str, int] = {}
        self._views: list[torch.Tensor] = []

    def empty(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        strides: Sequence[int] | None = None,
        *,
        align: int = 16,
        left: bool = False,
        sparse: bool = False,
    ) -> torch.Tensor:
        """A tensor of NaNs, its last element (left: its first) beside a page that must not be touched.

        align: of its first byte; a tensor whose size is no multiple of it has up to align - 1 bytes before the page,
        where writes are found and reads only if a helper makes them. Counting sectors wants 32 or more.
        sparse: zeros that take no memory until touched, for strides that reach far.
        """
        if name in self._owned:
            raise ValueError(f"there is a {name} already")
        strides = torch.empty(tuple(shape), device="meta").stride() if strides is None else tuple(strides)
        reach = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        size = reach * dtype.itemsize
        pointer = self._functions.simt_alloc(name.encode(), size, max(align, dtype.itemsize), left, sparse)
        if not pointer:
            raise MemoryError(f"{size} bytes for {name}")
        self._owned[name] = pointer
        if size == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        flat = torch.frombuffer((ctypes.c_char * size).from_address(pointer), dtype=dtype, count=reach)
        self._views.append(flat)
        return flat.as_strided(tuple(shape), strides)

    def tensor(self, name: str, value: torch.Tensor, **options: Any) -> torch.Tensor:
        """A guarded copy of a CPU tensor with its strides; options as of `empty`."""
        copy = self.empty(name, value.shape, value.dtype, value.stride(), **options)
        self.filled(name)
        return copy.copy_(value) if value.numel() else copy

    def filled(self, name: str, *, constant: bool = False) -> None:
        """All of a tensor has its value from here, as machines that look for what nobody wrote must be told.

        constant: no kernel writes it.
        """
        self._functions.simt_filled(self._owned[name], constant)

    def run(self, launcher: Callable[..., int] | str, *arguments: Any) -> list[dict[str, Any]]:
        """Call an extern "C" launcher; return its launches. Raises LaunchError with the runtime's report.

        A tensor is passed as its address, None as a null pointer, an int as int64_t, a float as double; ctypes values
        as they are. The launcher returns a cudaError_t.
        """
        function = getattr(self._functions, launcher) if isinstance(launcher, str) else launcher
        self._functions.simt_reset()
        code = function(*(_converted(a) for a in arguments))
        error = self._library.resolve(self._functions.simt_error().decode())
        if error or code:
            raise LaunchError(error or f"the launcher returned cudaError_t {code}")
        return self.launches()

    def launches(self) -> list[dict[str, Any]]:
        """What was counted, by launch: see README.md."""
        return json.loads(self._library.resolve(self._functions.simt_report().decode()))

    def device(self, key: str) -> int:
        """A figure of the device model, such as sms."""
        return int(self._functions.simt_get(key.encode()))

    def close(self) -> None:
        for pointer in self._owned.values():
            self._functions.simt_free(pointer)
        self._owned.clear()


def without_parameters(name: str) -> str:
    """Cut the last balanced pair of brackets: ns::f<(E)1>(float*) becomes ns::f<(E)1>."""
    depth = 0
    for at in range(len(name) - 1, -1, -1):
        depth += (name[at] == ")") - (name[at] == "(")
        if depth == 0:
            return name[:at] if name.endswith(")") else name
    return name


def _converted(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, bool | int):
        return ctypes.c_int64(value)
    return ctypes.c_double(value) if isinstance(value, float) else value
