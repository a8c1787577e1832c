"""`python -m bn_ext`: what is installed, how it was built, and what it runs on here."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable

import torch

from . import _C, __version__, _guard, devices


def cuda_state(record: _guard.BuildRecord) -> str:
    """Return "yes" or "no", and why: kernels were built or not, a GPU is there or not."""
    why = devices.why_not_cuda(None)
    if why is not None:
        return f"no: {why if torch.version.cuda else record['cuda_reason']}"
    if not torch.cuda.is_available():
        return f"no: the kernels are there ({record['cuda_reason']}), but torch sees no GPU"
    return f"yes: {record['cuda_reason']}"


def gpus() -> dict[str, str]:
    """Return what each GPU runs: heading -> its name, and why it is torch's own batch norm where that is so."""
    found = {}
    for index in range(torch.cuda.device_count()):
        why = devices.why_not_cuda(torch.cuda.get_device_capability(index))
        found[f"GPU {index}"] = torch.cuda.get_device_name(index) + (f": torch's own batch norm, {why}" if why else "")
    return found


def threads(record: _guard.BuildRecord) -> object:
    """Return the number of threads that the CPU kernels use, and why it is one where the build decided that."""
    if record["openmp"]:
        return torch.get_num_threads()
    return f"1: {record['one_thread_reason']}, then {_guard.install_command()}"


def report() -> dict[str, object]:
    """Return all that is printed, as a dict of plain values: heading -> value."""
    record = _guard.read_record()
    wish = os.environ.get("ATEN_CPU_CAPABILITY")
    return {
        "bn_ext": __version__,
        "installed in": str(_guard.HERE),
        "Python": sys.version.split()[0],
        "torch running": str(torch.__version__),
        "torch at build": record["torch"],
        "compiler": record["compiler"],
        "ISA level": f"{_C.isa_level()} (ATEN_CPU_CAPABILITY={wish})" if wish else _C.isa_level(),
        "torch's level": torch.backends.cpu.get_cpu_capability(),
        "threads": threads(record),
        "CUDA": cuda_state(record),
        "GPU code": record["cuda_codes"] or "none",
        **gpus(),
        "build info": _C.build_info(),
    }


def main() -> None:
    """Print the report, as aligned lines or with --json as one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m bn_ext", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--version", action="version", version=f"bn_ext {__version__}")
    as_json = parser.parse_args().json
    lines = report()
    if as_json:
        print(json.dumps(lines, indent=2))
        return
    for heading, value in lines.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}={item}" for key, item in value.items())
        print(f"{heading:<15} {value}")


def quietly(run: Callable[[], object]) -> int:
    """Run a command; return its exit status. A reader that closes the pipe, as head does, ends it without a word."""
    try:
        status = run()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 0
    return int(status) if isinstance(status, int) else 0


if __name__ == "__main__":
    sys.exit(quietly(main))
