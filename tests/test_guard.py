"""The guard at import, what bn_ext tells about itself, and what its library needs."""

from __future__ import annotations

import json
import re
import shutil
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch

import bn_ext
from bn_ext import _guard
from processes import PACKAGE, ROOT, on_linux, run


def record(**changes: Any) -> _guard.BuildRecord:
    return {
        "version": "0.1.0",
        "torch": "2.13.0+cu130",
        "torch_cuda": "13.0",
        "cxx11_abi": True,
        "python": "cpython-311-x86_64-linux-gnu",
        "compiler": "g++ 12",
        "openmp": True,
        "cuda": True,
        "cuda_reason": "built with nvcc 13.0",
        "cuda_archs": "9.0",
        **changes,
    }  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    ("built", "running"),
    [
        (record(), ("2.13.0+cu130", "13.0", True)),
        (record(), ("2.13.1+cu130", "13.0", True)),
        (record(), ("2.13.0+cu132", "13.2", True)),
        (record(cuda=False), ("2.13.0+cpu", None, True)),
        (record(torch="2.14.0a0+git12", cuda=False), ("2.14.0a0+git12", None, True)),
    ],
)
def test_guard_lets_pass(built: _guard.BuildRecord, running: tuple[str, str | None, bool]) -> None:
    assert _guard.complaint(built, *running) is None


@pytest.mark.parametrize(
    ("built", "running", "words"),
    [
        (
            record(),
            ("2.14.0+cu130", "13.0", True),
            ["built against torch 2.13.0+cu130", "torch 2.14.0+cu130 is running"],
        ),
        (record(), ("2.1.30+cu130", "13.0", True), ["torch 2.1.30+cu130 is running"]),
        (record(), ("2.13.0a0+git1", "13.0", True), ["torch 2.13.0a0+git1 is running"]),
        (record(), ("2.13.0+cu130", "13.0", False), ["_GLIBCXX_USE_CXX11_ABI=1", "uses 0"]),
        (record(), ("2.13.0+cpu", None, True), ["built for CUDA 13.0", "2.13.0+cpu has no CUDA"]),
        (record(), ("2.13.0+cu126", "12.6", True), ["built for CUDA 13.0", "has CUDA 12.6"]),
    ],
)
def test_guard_complains(
    built: _guard.BuildRecord, running: tuple[str, str | None, bool], words: list[str], tmp_path: Path
) -> None:
    said = _guard.complaint(built, *running, folder=tmp_path / "bn_ext")
    assert said is not None
    assert all(word in said for word in words)
    assert "type: pip install --force-reinstall --no-deps ." in said
    in_checkout = _guard.complaint(built, *running, folder=ROOT / "bn_ext")
    assert in_checkout is not None
    assert in_checkout.endswith(f"type: pip install -e {ROOT}")


@on_linux
def test_guard_speaks_before_the_library_is_loaded(tmp_path: Path) -> None:
    package = tmp_path / "bn_ext"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    changed = {**_guard.read_record(), "torch": "2.1.0"}
    (package / "_build.json").write_text(json.dumps(changed))
    code = (
        "import torch\ntry:\n    import bn_ext\nexcept ImportError as error:\n    print(error)\n"
        "print(any('/bn_ext/_C.' in line for line in open('/proc/self/maps')))"
    )
    done = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    said, loaded = done.stdout.splitlines()[-2:]
    assert said.startswith(f"bn_ext was built against torch 2.1.0, but torch {torch.__version__} is running.")
    assert loaded == "False"


def test_guard_tells_a_source_folder_and_another_python_apart(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match="source folder without the compiled library"):
        _guard.read_record(tmp_path)
    (tmp_path / "_C.cpython-27-x86_64-linux-gnu.so").touch()
    with pytest.raises(ImportError, match=r"built for another Python \(_C\.cpython-27"):
        _guard.read_record(tmp_path)
    (tmp_path / "_C.abi3.so").touch()
    with pytest.raises(ImportError, match="library without a readable record"):
        _guard.read_record(tmp_path)


# --- the installed library -------------------------------------------------------------------------------------------


def test_python_m_bn_ext(tmp_path: Path) -> None:
    environ = {"PYTHONPATH": str(PACKAGE.parent), "ATEN_CPU_CAPABILITY": "default"}
    lines = run(sys.executable, "-m", "bn_ext", cwd=tmp_path, **environ).stdout
    for words in (
        f"bn_ext +{bn_ext.__version__}",
        f"torch running +{re.escape(torch.__version__)}",
        "CUDA +(yes|no): .+",
    ):
        assert re.search(f"^{words}$", lines, re.M), lines
    assert re.search(r"^ISA level +default \(ATEN_CPU_CAPABILITY=default\)$", lines, re.M)
    done = run(sys.executable, "-m", "bn_ext", "--json", cwd=tmp_path, **environ)
    told = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert told["installed in"] == str(PACKAGE)
    assert told["torch at build"] == told["torch running"] == torch.__version__
    assert torch.__version__.startswith(told["build info"]["torch"])


@on_linux
def test_one_openmp_runtime_in_the_process(tmp_path: Path) -> None:
    code = (
        "import torch, bn_ext\ntorch.set_num_threads(2)\n"
        "bn_ext.FusedBatchNorm1d(64)(torch.randn(65536, 64)).sum().backward()\n"
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.split('/')[-1]}, sep='\\n')"
    )
    done = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(PACKAGE.parent))
    runtimes = [p for p in done.stdout.splitlines() if re.search(r"/lib(g|i)?omp[^/]*\.so", p)]
    assert len(runtimes) == 1, runtimes


@on_linux
@pytest.mark.skipif(not shutil.which("readelf"), reason="readelf (binutils) is not installed")
def test_library_needs_torch_and_the_system_only() -> None:
    library = next(p for suffix in EXTENSION_SUFFIXES if (p := PACKAGE / f"_C{suffix}").is_file())
    dynamic = run("readelf", "-d", library, cwd=ROOT).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    allowed = (
        r"lib(c10|torch|torch_cpu|torch_python|c10_cuda|torch_cuda|cudart|stdc\+\+|gcc_s|m|c|dl|pthread|rt)\.so|ld-"
    )
    assert {"libc10.so", "libtorch_cpu.so"} <= needed
    assert [name for name in needed if not re.match(allowed, name)] == []
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic), "the library must find torch's libraries loaded, not by path"
