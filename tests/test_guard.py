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
        "version": "0.2.0",
        "torch": "2.13.0+cu130",
        "torch_cuda": "13.0",
        "cxx11_abi": True,
        "python": "cpython-311-x86_64-linux-gnu",
        "compiler": "g++ 12",
        "openmp": True,
        "one_thread_reason": "",
        "cuda": True,
        "cuda_reason": "built with nvcc 13.0",
        "cuda_codes": "sm_90",
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
    assert "type: pip install --force-reinstall --no-deps --no-cache-dir ." in said
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
        f"bn_ext +{re.escape(bn_ext.__version__)}",
        "GPU code +(none|sm_.+)",
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


# --- where it came from, and what stands before it -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "source"),
    [
        ({"url": "file:///a/b c", "dir_info": {}}, "'/a/b c'"),
        ({"url": "file:///a/b%20c", "dir_info": {"editable": False}}, "'/a/b c'"),
        (
            {"url": "https://x.invalid/bn.git", "vcs_info": {"vcs": "git", "commit_id": "12"}},
            "git+https://x.invalid/bn.git",
        ),
        (
            {"url": "file:///r", "vcs_info": {"vcs": "git", "commit_id": "12", "requested_revision": "main"}},
            "git+file:///r@main",
        ),
        ({"url": "https://x.invalid/bn_ext-0.2.0.tar.gz", "archive_info": {}}, "https://x.invalid/bn_ext-0.2.0.tar.gz"),
        (
            {"url": "https://x.invalid/bn_ext-0.2.0-cp311-cp311-linux_x86_64.whl", "archive_info": {}},
            ".   (in a checkout",
        ),
        ({"nothing": 1}, ".   (in a checkout of bn_ext)"),
    ],
)
def test_remedy_names_where_it_came_from(said: dict[str, Any], source: str, tmp_path: Path) -> None:
    (tmp_path / "bn_ext-0.2.0.dist-info").mkdir()
    (tmp_path / "bn_ext-0.2.0.dist-info" / "direct_url.json").write_text(json.dumps(said))
    command = _guard.install_command(tmp_path / "bn_ext")
    assert command.startswith(f"pip install --force-reinstall --no-deps --no-cache-dir {source}")


def test_a_source_folder_hands_over_to_the_installed_package(tmp_path: Path) -> None:
    """As after `pip install .` in a checkout, with Python started there."""
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    libraries = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
    shutil.copytree(PACKAGE, checkout / "bn_ext", ignore=libraries)
    shutil.copytree(PACKAGE, site / "bn_ext", ignore=shutil.ignore_patterns("__pycache__"))
    with open(checkout / "bn_ext" / "modules.py", "w") as file:
        file.write("raise AssertionError('the source folder was imported')\n")
    done = run(sys.executable, "-m", "bn_ext", cwd=checkout, PYTHONPATH=str(site))
    assert f"installed in    {site / 'bn_ext'}" in done.stdout
    assert done.stdout.count("is a source folder without the compiled library") == 1
    code = (
        "import bn_ext, torch, pickle; from bn_ext import FusedBatchNorm1d; from bn_ext.functional import batch_norm\n"
        "print(bn_ext.__file__); pickle.loads(pickle.dumps(FusedBatchNorm1d(3)))(torch.randn(4, 3))"
    )
    done = run(sys.executable, "-W", "ignore", "-c", code, cwd=checkout, PYTHONPATH=str(site))
    assert done.stdout.strip() == str(site / "bn_ext" / "__init__.py")
    others = tmp_path / "others"  # what is installed here, without bn_ext
    others.mkdir()
    for part in Path(torch.__file__).parent.parent.iterdir():
        if "bn_ext" not in part.name:
            (others / part.name).symlink_to(part)
    alone = run(sys.executable, "-S", "-c", "import bn_ext", cwd=checkout, check=False, PYTHONPATH=str(others))
    assert "source folder without the compiled library" in alone.stdout.splitlines()[-1]


@pytest.mark.parametrize("module", [["bn_ext"], ["bn_ext.launches", "--shape", "64", "64"]])
def test_a_closed_pipe_ends_quietly(module: list[str], tmp_path: Path) -> None:
    line = " ".join([sys.executable, "-u", "-m", *module])
    done = run("bash", "-o", "pipefail", "-c", f"{line} | true", cwd=tmp_path, PYTHONPATH=str(PACKAGE.parent))
    assert done.stdout == ""


def test_version(tmp_path: Path) -> None:
    done = run(sys.executable, "-m", "bn_ext", "--version", cwd=tmp_path, PYTHONPATH=str(PACKAGE.parent))
    assert done.stdout.strip() == f"bn_ext {bn_ext.__version__}"


def test_a_record_of_another_build_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    (tmp_path / "_build.json").write_text(json.dumps({k: v for k, v in record().items() if k != "cuda_codes"}))
    with pytest.raises(ImportError, match="it lacks cuda_codes"):
        _guard.read_record(tmp_path)
