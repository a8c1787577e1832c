"""Build the stand-in: the runtime's library, the driver's, and the overlay of torch's operators."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import nvcc
from ptx.machine import MACHINE, _flags
from simt.bridge import CACHE, SHARED, cache, compiled, linked

HERE = Path(__file__).resolve().parent
# Entries of tests/ptx that the runtime's own ones stand before.
RENAMED = {
    "cudaLaunchKernelExC": "machine_launch",
    "cudaFuncSetAttribute": "machine_set_attribute",
    "__cudaRegisterFunction": "machine_register_function",
    "__cudaRegisterFatBinary": "machine_register_binary",
    "__cudaRegisterFatBinaryEnd": "machine_register_end",
    "__cudaUnregisterFatBinary": "machine_unregister",
    "__cudaPushCallConfiguration": "machine_push",
    "__cudaPopCallConfiguration": "machine_pop",
    "__cudaGetKernel": "machine_kernel",
    "__cudaLaunchKernel": "machine_launch_kernel",
}
# What the driver answers; all its other entries refuse.
DRIVER = """extern "C" int cuInit(unsigned) { return 0; }
extern "C" int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
extern "C" int cuDeviceGet(int* device, int) { return *device = 0, 0; }
extern "C" int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { return *flags = 0, *active = 1, 0; }
extern "C" int cuCtxGetCurrent(void** context) { return *context = reinterpret_cast<void*>(16), 0; }
extern "C" int cuCtxSetCurrent(void*) { return 0; }
"""
# Libraries of CUDA whose names begin like the driver's.
OTHERS = re.compile(r"cu(blas|dnn|fft|sparse|solver|File|rand|tensor|pti)")


def site() -> Path:
    """The folder in which torch and CUDA's libraries are."""
    return Path(torch.__file__).parents[1]


def undefined(libraries: Sequence[Path]) -> set[str]:
    """What libraries want of others, with the version behind an @."""
    command = ["nm", "-D", "--undefined-only", *map(str, libraries)]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return {line.split()[-1] for line in said.splitlines() if line.strip() and not line.endswith(":")}


def defined(objects: Sequence[Path]) -> set[str]:
    said = subprocess.run(["nm", *map(str, objects)], capture_output=True, text=True, check=True).stdout
    return {parts[2] for line in said.splitlines() if len(parts := line.split()) == 3 and parts[1] == "T"}


def libraries() -> list[Path]:
    import bn_ext

    folders = (site() / "torch" / "lib", site() / "nvidia", Path(bn_ext.__file__).parent)
    return sorted(p for folder in folders for p in folder.rglob("*.so*") if p.is_file())


def written(name: str, text: str) -> Path:
    """A generated source, in the cache."""
    path = CACHE / name
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


def refusals(wanted: set[str], have: set[str]) -> str:
    """An entry of each name that torch may call and the stand-in has not."""
    names = sorted({w.split("@")[0] for w in wanted if w.endswith("@libcudart.so.13")} - have)
    lines = [f'API int {name}() {{ return standin_refused("{name}"); }}' for name in names]
    api = 'extern "C" __attribute__((visibility("default")))'
    return f"{api} int standin_refused(const char*);\n#define API {api}\n" + "\n".join(lines) + "\n"


def driver(wanted: set[str]) -> str:
    """The driver's source: what libraries link and what torch looks up by name."""
    binary = (site() / "torch" / "lib" / "libc10_cuda.so").read_bytes()
    names = {m.decode() for m in re.findall(rb"\0(cu[A-Z][A-Za-z0-9]+)(?=\0)", binary)}
    names |= {w for w in wanted if re.fullmatch(r"cu[A-Z][A-Za-z]+(_v\d+)?(_ptsz)?", w) and not OTHERS.match(w)}
    names -= set(re.findall(r"int (cu\w+)\(", DRIVER))
    return DRIVER + "".join(f'extern "C" int {name}() {{ return 801; }}\n' for name in sorted(names))


def build() -> tuple[Path, Path, Path]:
    """Return the libraries of the runtime, the driver and the overlay; unchanged ones come from build/simt."""
    home = nvcc.toolkit_or_skip()
    torch_home, includes = site() / "torch", home / "include"
    machine = [*_flags(), *(f"-D{old}={new}" for old, new in RENAMED.items()), f"-I{HERE.parent / 'ptx'}"]
    plain = ["-std=c++20", "-O1", "-g1", "-fPIC", "-w", f"-isystem{includes}", f"-I{HERE}"]
    of_torch = [f"-isystem{torch_home / 'include' / part}" for part in ("", "torch/csrc/api/include")]
    headers = sorted([*HERE.glob("*.h"), *(HERE.parent / "ptx").glob("*.h")])
    runtime_sources = [HERE / name for name in ("runtime.cpp", "streams.cpp", "queries.cpp")]
    with cache():
        objects = compiled([*MACHINE, *SHARED, HERE / "device.cpp"], machine, headers)
        objects += compiled(runtime_sources, [*plain, "-fvisibility=hidden", "-Wall", "-Wextra"], headers)
        wanted = undefined(libraries())
        objects += compiled([written("standin_refusals.cpp", refusals(wanted, defined(objects)))], plain)
        exported = written("standin.map", "libcudart.so.13 { global: cuda*; __cuda*; standin_*; local: *; };\n")
        options = [f"-Wl,--version-script,{exported}", "-Wl,-Bsymbolic", "-lpthread"]
        runtime = linked("standin_cudart", objects, "-Wl,-soname,libcudart.so.13", *options)
        of_driver = compiled([written("standin_driver.cpp", driver(wanted))], plain)
        cuda = linked("standin_cuda", of_driver, "-Wl,-soname,libcuda.so.1")
        over = compiled([HERE / "overlay.cpp"], [*plain, *of_torch])
        parts = ["-Wl,--no-as-needed", f"-L{torch_home / 'lib'}", "-ltorch_cpu", "-lc10", "-lc10_cuda", str(runtime)]
        overlay = linked("standin_overlay", over, *parts)
    return runtime, cuda, overlay


def ptx_files() -> list[Path]:
    """nvcc's PTX of the kernels for sm_90, an element type each."""
    sources = sorted((nvcc.ROOT / "csrc" / "cuda").glob("*.cu"))
    folders = nvcc.compile_all(nvcc.toolkit_or_skip(), dict.fromkeys(sources, (90,)))
    return [folder / "90.ptx" for folder in folders.values()]


def environment() -> dict[str, str]:
    """The variables under which a process has the stand-in."""
    runtime, cuda, overlay = build()
    return {
        **os.environ,
        "LD_PRELOAD": f"{runtime}:{cuda}",
        "STANDIN_PTX": ":".join(map(str, ptx_files())),
        "STANDIN_OVERLAY": str(overlay),
        "NUMBA_DISABLE_CUDA": "1",  # torch's own testing tools ask it, and it asks the driver
        "PYTHONPATH": os.pathsep.join(
            [str(HERE.parent), str(HERE / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }


if __name__ == "__main__":  # python -m standin.build COMMAND...: runs it there
    os.execvpe(sys.argv[1], sys.argv[1:], environment())
