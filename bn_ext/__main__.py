"""`python -m bn_ext`: what is installed, how it was built, and what it runs on here."""

from __future__ import annotations

import argparse
import json
import os
import sys

import torch

from . import _C, __version__, _guard


def cuda_state(record: _guard.BuildRecord) -> str:
    """Return "yes" or "no", and why: kernels were built or not, a GPU is there or not."""
    if not record["cuda"]:
        return f"no: {record['cuda_reason']}; CUDA tensors go through torch.nn.BatchNorm1d's own kernels"
    if not torch.cuda.is_available():
        return f"no: the kernels are there ({record['cuda_reason']}), but torch sees no GPU"
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return f"yes: {', '.join(sorted(names))}; {record['cuda_reason']}, for {record['cuda_archs']}"


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
        "threads": torch.get_num_threads() if record["openmp"] else "1: built without OpenMP",
        "CUDA": cuda_state(record),
        "build info": _C.build_info(),
    }


def main() -> None:
    """Print the report, as aligned lines or with --json as one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m bn_ext", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    lines = report()
    if parser.parse_args().json:
        print(json.dumps(lines, indent=2))
        return
    for heading, value in lines.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}={item}" for key, item in value.items())
        print(f"{heading:<15} {value}")


if __name__ == "__main__":
    main()
