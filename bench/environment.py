"""What a measurement was made with and on: versions, processor, threads, commit."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import platform
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

import bn_ext

_HERE = Path(__file__).resolve().parent
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def cpu_name() -> str:
    """The processor's name as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """What BENCH_COMMIT says, else the checkout's commit, with "-dirty" behind it when a tracked file is changed.

    "unknown" outside a checkout. BENCH_COMMIT is for sources copied without their history, and for a series of runs,
    the first of which writes a tracked result file.
    """
    if told := os.environ.get("BENCH_COMMIT"):
        return told
    command = ["git", "-C", str(_HERE), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def driver() -> str | None:
    """The version of NVIDIA's driver, or None where there is none or it does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def huge_pages() -> str:
    """The system's setting for transparent huge pages ("always", "madvise", "never"), or "unknown"."""
    try:
        return _HUGE_PAGES.read_text(encoding="ascii").split("[", 1)[1].split("]", 1)[0]
    except (OSError, IndexError):
        return "unknown"


def load_average() -> float | None:
    """How many processes wanted to run over the last minute, where the system tells."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def busy_share(seconds: float = 2.0) -> float | None:
    """Return which part of all processors' time others take just now, or None where the system does not tell.

    The load average cannot say that between measurements: it still holds the one before. Waiting for a disk counts as
    idle, time that the host takes away as busy.
    """

    def counted() -> tuple[int, int]:
        values = [int(word) for word in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]]
        return sum(values), values[3] + values[4]  # idle, iowait

    try:
        total, idle = counted()
        time.sleep(seconds)
        total_after, idle_after = counted()
    except (OSError, ValueError, IndexError):
        return None
    passed = total_after - total
    return 1 - (idle_after - idle) / passed if passed else None


def tcmalloc() -> str | None:
    """Return where tcmalloc is, as LD_PRELOAD takes it, or None."""
    for name in ("tcmalloc_minimal", "tcmalloc"):
        if found := ctypes.util.find_library(name):
            return found
    return None


def cache_bytes(device: torch.device) -> int:
    """The size of the cache that all of the device shares: a GPU's L2, a processor's last level; 0 where unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes)


MEMORY = ("default", "fresh", "recycled")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # glibc's malloc.h


def set_memory(policy: str) -> None:
    """Let the C library serve large tensors as `policy` says, for every contender alike.

    By default glibc gives outputs of a few to some 60 MB sometimes recycled memory, sometimes fresh pages, by what was
    allocated before; the same call then differs by a factor of four. "fresh" maps every tensor from 1 MB up anew, as
    happens at the start of a process and for the largest ones always; "recycled" keeps all memory that was freed, as
    pooling allocators do. Raises OSError where there is no glibc.
    """
    if policy == "default":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError) as error:
        raise OSError(f"--memory {policy} needs glibc's mallopt: {error}") from error
    settings = {_M_MMAP_THRESHOLD: 1 << 20} if policy == "fresh" else {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1}
    for option, value in settings.items():
        if mallopt(option, value) != 1:
            raise OSError(f"--memory {policy}: mallopt({option}, {value}) was refused")


def facts(device: torch.device, memory: str = "default") -> dict[str, object]:
    """The keys that every measurement of this run shares."""
    cuda = device.type == "cuda"
    return {
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "driver": driver() if cuda else None,
        "bn_ext": bn_ext.__version__,
        "isa": bn_ext._C.isa_level(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "huge_pages": huge_pages(),
        "memory": memory,
        "cache_bytes": cache_bytes(device),
        "allocator": os.path.basename(os.environ.get("LD_PRELOAD", "")),
        "load_average": load_average(),
        "busy_share": busy_share(0.5),
        "python": platform.python_version(),
        "commit": commit(),
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
