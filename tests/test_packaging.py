"""How bn_ext is built and packed."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch

import bn_ext
from bn_ext import _guard
from processes import PACKAGE, ROOT, made_toolkit, run

sys.path.insert(0, str(ROOT / "buildtools"))
import plan

TINY_OPS = """#include <ATen/core/Tensor.h>
#include <torch/library.h>
namespace bn_ext {
const char* isa_level() { return "default"; }
void add_entry(struct _object*) {}
int& recomputations() {
  static int none = 0;
  return none;
}
}  // namespace bn_ext
namespace {
int64_t rank(const at::Tensor& x) { return x.dim(); }
}  // namespace
TORCH_LIBRARY(bn_ext, m) { m.def("rank(Tensor x) -> int", &rank); }
"""


WITHOUT_TORCH = ("cuda/architectures", "cuda/plan", "torch/bindings")  # what these are made of needs no torch


def tiny_tree(folder: Path) -> Path:
    """Copy the build of bn_ext into folder, with one operator in place of the kernels: it compiles in seconds."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "buildtools", folder / "buildtools", ignore=shutil.ignore_patterns("__pycache__"))
    # as after a build in place, whose leavings must stay out of what is packed
    shutil.copytree(PACKAGE, folder / "bn_ext", ignore=shutil.ignore_patterns("__pycache__"))
    sources = ROOT / "csrc"
    for path in (*sources.rglob("*.h"), *(sources / f"{name}.cpp" for name in WITHOUT_TORCH)):
        to = folder / "csrc" / path.relative_to(sources)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)
    (folder / "csrc" / "torch" / "ops.cpp").write_text(TINY_OPS)
    (folder / "csrc" / "core" / "part.h").write_text("#pragma once\n")
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def build_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that, as PYTHONPATH, does what pip's build isolation does: setuptools is there, site-packages is not."""
    folder = tmp_path_factory.mktemp("isolation")
    site = Path(setuptools.__file__).parent.parent
    for part in (site / "setuptools", site / "_distutils_hack", *site.glob("setuptools-*.dist-info")):
        (folder / part.name).symlink_to(part)
    (folder / "sitecustomize.py").write_text(
        "import site, sys\nsys.path[:] = [p for p in sys.path if p not in site.getsitepackages()]\n"
    )
    return folder


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a virtual environment that holds nothing."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, with_pip=False, symlinks=True)
    return folder / "bin" / "python"


HOOKS = """
import json, sys
sys.path.insert(0, "buildtools")
import backend
print()
print(json.dumps([backend.get_requires_for_build_wheel(), backend.get_requires_for_build_editable()]))
"""


def asked_for(interpreter: Path | str, tree: Path, isolation: Path) -> list[list[str]]:
    done = run(interpreter, "-c", HOOKS, cwd=tree, PYTHONPATH=str(isolation), PYTHONNOUSERSITE="1")
    result: list[list[str]] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


# --- the backend -----------------------------------------------------------------------------------------------------


def test_isolated_build_asks_for_no_torch_where_there_is_one(tree: Path, build_environment: Path) -> None:
    hidden = run(sys.executable, "-c", "import torch", cwd=tree, check=False, PYTHONPATH=str(build_environment))
    assert "No module named 'torch'" in hidden.stdout, "the isolation of this test does not isolate"
    for requires in asked_for(sys.executable, tree, build_environment):
        assert not [r for r in requires if r.startswith("torch")]


def test_isolated_build_asks_for_torch_where_there_is_none(
    tree: Path, build_environment: Path, empty_environment: Path
) -> None:
    for requires in asked_for(empty_environment, tree, build_environment):
        assert "torch>=2.11" in requires


def test_isolated_build_uses_the_installed_torch(tree: Path, build_environment: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, 'buildtools'); import locate_torch, setuptools; before = list(sys.path)\n"
        "with locate_torch.torch_importable():\n    import torch; print(torch.__file__)\n"
        "print(sys.path == before)"
    )
    done = run(sys.executable, "-c", code, cwd=tree, PYTHONPATH=str(build_environment), PYTHONNOUSERSITE="1")
    assert done.stdout.splitlines()[-2:] == [torch.__file__, "True"]


def test_a_download_of_torch_is_announced(tree: Path, build_environment: Path, empty_environment: Path) -> None:
    done = run(empty_environment, "-c", HOOKS, cwd=tree, PYTHONPATH=str(build_environment), PYTHONNOUSERSITE="1")
    assert "there is no torch in this environment, so the newest is fetched to build against: gigabytes" in done.stdout
    done = run(sys.executable, "-c", HOOKS, cwd=tree, PYTHONPATH=str(build_environment), PYTHONNOUSERSITE="1")
    assert "gigabytes" not in done.stdout


METADATA = (
    "import sys; sys.path.insert(0, 'buildtools'); import backend; "
    "print(backend.prepare_metadata_for_build_{}(sys.argv[1]))"
)


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_metadata_needs_no_torch(
    kind: str, tmp_path: Path, tree: Path, build_environment: Path, empty_environment: Path
) -> None:
    for python, version, torch_wanted in (
        (empty_environment, "0.2.0", "torch>=2.11"),
        (sys.executable, bn_ext.__version__, f"torch=={'.'.join(torch.__version__.split('.')[:2])}.*"),
    ):
        out = tmp_path / str(torch_wanted)
        out.mkdir()
        environ = {"PYTHONPATH": str(build_environment), "PYTHONNOUSERSITE": "1", "FORCE_CPU": "1"}
        done = run(python, "-c", METADATA.format(kind), out, cwd=tree, **environ)
        text = (out / done.stdout.split()[-1] / "METADATA").read_text()
        assert re.search(r"^Version: (.+)$", text, re.M)[1] == re.sub(r"cu\d+$", "cpu", version)  # type: ignore[index]
        assert [line for line in text.splitlines() if "torch" in line and line.startswith("Requires-Dist")] == [
            f"Requires-Dist: {torch_wanted}"
        ]


def test_project_metadata_is_static() -> None:
    """uv and pip read it without a build, unless a field that they want is dynamic."""
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "dynamic" not in project
    assert project["version"] == bn_ext.__version__.split("+")[0]


def test_extras_are_what_make_installs() -> None:
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: set(listed) for name, listed in project["optional-dependencies"].items()}
    files = {name: (ROOT / "requirements" / f"{name}.txt").read_text().split("\n") for name in ("demo", "test")}
    demo, test = ({line.replace('"', "'") for line in files[name] if line} for name in ("demo", "test"))
    assert extras == {"bench": demo, "test": (test - {"-r demo.txt"}) | {"bn_ext[bench]"}}


def test_setuptools_is_missing(tree: Path, empty_environment: Path) -> None:
    done = run(empty_environment, "-c", HOOKS, cwd=tree, check=False)
    (said,) = done.stdout.strip().splitlines()
    assert done.returncode == 1
    assert said.startswith("bn_ext cannot be built: setuptools is missing")


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root writes everywhere")
def test_a_checkout_that_cannot_be_written_to(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path)
    for folder in (tree, *(p for p in tree.rglob("*") if p.is_dir())):
        folder.chmod(0o555)
    code = "import sys; sys.path.insert(0, 'buildtools'); import backend; backend.build_wheel('/tmp')"
    command = [sys.executable, "-c", code]
    if os.geteuid() == 0:  # without what lets root write there
        command = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override", *command]
    try:
        done = run(*command, cwd=tree, check=False, PYTHONDONTWRITEBYTECODE="1")
    finally:
        for folder in (tree, *(p for p in tree.rglob("*") if p.is_dir())):
            folder.chmod(0o755)
    assert done.returncode == 1
    said = done.stdout.strip().splitlines()[-1]
    assert said.startswith(f"bn_ext cannot be built: its folder {tree} cannot be written to")
    assert "Traceback" not in done.stdout


def test_too_old_torch_is_refused_by_name(tmp_path: Path, tree: Path, build_environment: Path) -> None:
    venv.create(tmp_path, with_pip=False, symlinks=True)
    site = next(tmp_path.glob("lib/python*/site-packages"))
    (site / "torch").mkdir()
    (site / "torch" / "__init__.py").touch()
    (site / "torch-2.5.1.dist-info").mkdir()
    (site / "torch-2.5.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.5.1\n")
    done = run(tmp_path / "bin/python", "-c", HOOKS, cwd=tree, check=False, PYTHONPATH=str(build_environment))
    assert done.returncode == 1
    assert "needs torch 2.11 or later and this environment holds torch 2.5.1" in done.stdout.strip().splitlines()[-1]


CUDA_PLAN = """
import json, os, sys
import torch
from torch.utils import cpp_extension
torch.version.cuda = "13.0"
torch.cuda.device_count = lambda: 0
import setuptools
from distutils.core import run_setup
command = run_setup("setup.py", stop_after="init").get_command_obj("build_ext")
command.ensure_finalized()
record = command.plan_extension()
extension = command.extensions[0]
wanted = ("sources", "libraries", "define_macros", "extra_compile_args")
print()
print(json.dumps({**record, **{name: getattr(extension, name) for name in wanted},
      "home": [cpp_extension.CUDA_HOME, os.environ["CUDA_HOME"]],
      "env": os.environ["TORCH_CUDA_ARCH_LIST"], "left": cpp_extension._get_cuda_arch_flags(
          extension.extra_compile_args["nvcc"])}))
"""


def test_cuda_sources_are_wired(tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path)
    only_cuda = {"csrc/cuda/kernels.cu", "csrc/cuda/launch.cpp", "csrc/torch/cuda_ops.cpp"}
    for name in only_cuda:
        (tree / name).touch()
    # The PATH's nvcc is a wrapper in a folder without headers, and CUDA_HOME points nowhere.
    home, wrapper = made_toolkit(tree), tree / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    environ = {"CUDA_HOME": "/nowhere", "PATH": f"{wrapper.parent}:{os.environ['PATH']}"}
    done = run(sys.executable, "-c", CUDA_PLAN, cwd=tree, TORCH_CUDA_ARCH_LIST="", **environ)
    assert f"CUDA_HOME=/nowhere: /nowhere is not there; the toolkit in {home} is used" in done.stdout
    planned: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    assert planned["cuda"] is True
    assert {f"csrc/{name}.cpp" for name in (*WITHOUT_TORCH, "torch/ops")} | only_cuda == set(planned["sources"])
    assert ["WITH_CUDA", None] in planned["define_macros"]
    assert "c10_cuda" in planned["libraries"]
    assert planned["home"] == [str(home)] * 2
    assert planned["env"] == plan.default_arch_list((13, 0))
    assert planned["cuda_codes"] == "sm_75,sm_80,sm_86,sm_90,sm_100,sm_120,compute_120"
    assert f"-DBN_EXT_CUDA_CODES={planned['cuda_codes']}" in planned["extra_compile_args"]["cxx"]
    for_nvcc = [
        *planned["extra_compile_args"]["nvcc"],
        *(f"-D{name}={value}" for name, value in planned["define_macros"]),
    ]
    assert not [flag for flag in for_nvcc if "," in flag], "nvcc takes a comma for the end of a macro"
    assert planned["left"], "an nvcc flag makes torch drop its architecture list"


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        ({"CXX": "no-such-g++"}, "CXX names the C++ compiler no-such-g++, which is not there"),
        ({"PATH": "", "CXX": ""}, "there is no C++ compiler on PATH"),
        ({"FORCE_CUDA": "1", "FORCE_CPU": "1"}, "FORCE_CUDA and FORCE_CPU are both set"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(tree: Path, environ: dict[str, str], sentence: str) -> None:
    done = run(sys.executable, "setup.py", "-q", "build_ext", cwd=tree, check=False, **environ)
    assert done.returncode != 0
    assert done.stdout.splitlines()[-1].startswith(f"bn_ext cannot be built: {sentence}")
    assert "Traceback" not in done.stdout


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_force_cuda_without_cuda_fails(tree: Path) -> None:
    done = run(sys.executable, "setup.py", "-q", "build_ext", cwd=tree, check=False, FORCE_CUDA="1")
    assert done.returncode != 0
    last = done.stdout.splitlines()[-1]
    assert last == f"bn_ext cannot be built: FORCE_CUDA is set, but torch {torch.__version__} is a build without CUDA."


def test_missing_torch_is_said_in_one_sentence(tree: Path, build_environment: Path, empty_environment: Path) -> None:
    done = run(
        empty_environment, "setup.py", "-q", "build_ext", cwd=tree, check=False, PYTHONPATH=str(build_environment)
    )
    assert done.returncode != 0
    assert done.stdout.splitlines()[-1].startswith("bn_ext cannot be built: torch cannot be imported")
    assert 'pip install "torch>=2.11"' in done.stdout


# --- what is packed --------------------------------------------------------------------------------------------------


def test_wheel_from_source_distribution(tmp_path: Path) -> None:
    """A wheel that the backend builds from the sdist alone holds the library, its record and nothing stray."""
    tree = tiny_tree(tmp_path)
    code = "import sys; sys.path.insert(0, '{}/buildtools'); import backend; backend.{}('{}')"
    run(sys.executable, "-c", code.format(tree, "build_sdist", tmp_path), cwd=tree)
    version = bn_ext.__version__.split("+")[0]
    archive = tmp_path / f"bn_ext-{version}.tar.gz"
    with tarfile.open(archive) as packed:
        names = {name.split("/", 1)[-1] for name in packed.getnames()}
        assert {
            "csrc/torch/ops.cpp",
            "csrc/core/part.h",
            "buildtools/backend.py",
            "buildtools/plan.py",
            "LICENSE",
        } <= names
        assert not [name for name in names if name.endswith((".so", "_build.json", ".pyc"))]
        packed.extractall(tmp_path / "unpacked")
        (metadata,) = (packed.extractfile(name) for name in packed.getnames() if name.endswith(f"{version}/PKG-INFO"))
        assert metadata is not None
        assert "Requires-Dist: torch>=2.11\n" in metadata.read().decode()
    unpacked = tmp_path / "unpacked" / f"bn_ext-{version}"
    run(sys.executable, "-c", code.format(unpacked, "build_wheel", tmp_path), cwd=unpacked, FORCE_CPU="1")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed_wheel:
        names = set(packed_wheel.namelist())
        packed_wheel.extractall(tmp_path / "target")
    own = {name for name in names if not re.match(r"bn_ext-[^/]+\.dist-info/", name)}
    files = (p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".pyi", ".typed"))
    modules = {f"bn_ext/{p.relative_to(PACKAGE).as_posix()}" for p in files}
    (library,) = (name for name in own if name.endswith(".so"))
    assert own == modules | {library, "bn_ext/_build.json", "bn_ext/py.typed"}
    target = tmp_path / "target" / "bn_ext"
    record = _guard.read_record(target)
    release = ".".join(torch.__version__.split(".")[:2])
    assert (record["torch"], record["version"]) == (torch.__version__, f"{version}+torch{release}cpu")
    assert wheel.name.startswith(f"bn_ext-{record['version']}-")
    assert record["cuda_reason"] == "FORCE_CPU was set at build"
    loaded = run(
        sys.executable,
        "-c",
        "import importlib.util as u, sys, torch; s = u.spec_from_file_location('_C', sys.argv[1]); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); "
        "print(m.isa_level(), torch.ops.bn_ext.rank(torch.ones(2, 3)))",
        tmp_path / "target" / library,
        cwd=tmp_path,
    )
    assert loaded.stdout.splitlines()[-1] == "default 2"
    metadata = next(tmp_path.glob("target/*.dist-info/METADATA")).read_text()
    assert f"Requires-Dist: torch=={release}.*\n" in metadata
    assert "BSD-3-Clause" in metadata


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="not in a git checkout")
def test_builds_and_runs_leave_git_clean() -> None:
    left = [
        "bn_ext/_C.cpython-311-x86_64-linux-gnu.so",
        "bn_ext/_build.json",
        "build/lib/x",
        "bn_ext.egg-info/x",
        ".venv/x",
    ]
    left += ["build/demo/train_mlp_digits.png", "bench/results/local.jsonl", "bench/results/local.png", ".hypothesis/x"]
    ignored = run("git", "check-ignore", *left, cwd=ROOT, check=False).stdout.split()
    assert ignored == left
