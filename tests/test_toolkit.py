"""Where the build takes its CUDA toolkit from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from processes import ROOT, made_toolkit

sys.path.insert(0, str(ROOT / "buildtools"))
from toolkit import Missing, Toolkit, find_toolkit


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def found(environ: dict[str, str], root: Path, major: int = 13) -> Toolkit:
    result = find_toolkit({"PATH": "", **environ}, major, root)
    assert isinstance(result, Toolkit), result
    return result


def test_a_whole_cuda_home_decides(tmp_path: Path) -> None:
    named = made_toolkit(tmp_path, "12.8", name="named")
    made_toolkit(tmp_path, "13.0", name="usr/local/cuda")
    assert found({"CUDA_HOME": str(named)}, tmp_path)[:2] == (named, (12, 8))
    assert found({"CUDA_PATH": str(named)}, tmp_path).home == named


@pytest.mark.parametrize("how", ["wrapper", "link", "chain of links", "link to a wrapper"])
def test_nvcc_on_path_leads_to_its_toolkit(tmp_path: Path, how: str) -> None:
    """The folder of a wrapper or a link has no headers; torch's own guess ends there."""
    home = made_toolkit(tmp_path / "far away")
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    wrapper = executable(tmp_path / "w" / "nvcc", f'#!/bin/sh\nexec "{home}/bin/nvcc" "$@"\n')
    (tmp_path / "middle").symlink_to(home / "bin" / "nvcc")
    target = {"wrapper": wrapper, "link": home / "bin" / "nvcc", "chain of links": tmp_path / "middle"}
    nvcc.symlink_to(target.get(how, wrapper))
    assert found({"PATH": str(nvcc.parent)}, tmp_path) == (home, (13, 0), home / "include", ())


def test_a_link_to_an_nvcc_that_keeps_silent(tmp_path: Path) -> None:
    """An nvcc that does not say where it is: the link is followed."""
    home = made_toolkit(tmp_path)
    executable(home / "bin" / "nvcc", "#!/bin/sh\n[ \"$1\" = --version ] && echo 'release 13.1, V13.1.0'\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
    assert found({"PATH": str(tmp_path / "bin")}, tmp_path)[:2] == (home, (13, 1))


@pytest.mark.parametrize("lacks", ["bin/nvcc", "include/cuda_runtime_api.h", "lib64/libcudart.so"])
def test_a_cuda_home_that_is_no_toolkit_is_passed_over_and_named(tmp_path: Path, lacks: str) -> None:
    broken = made_toolkit(tmp_path, lacks=(lacks,), name="broken")
    home = made_toolkit(tmp_path, name="opt/cuda")
    result = found({"CUDA_HOME": str(broken)}, tmp_path)
    assert result.home == home
    (clause,) = result.passed_over
    assert clause.startswith(f"CUDA_HOME={broken}: ")
    assert lacks.rsplit("/", 1)[-1] in clause


def test_the_release_that_fits_comes_before_the_one_on_path(tmp_path: Path) -> None:
    other = made_toolkit(tmp_path, "12.8", name="other")
    home = made_toolkit(tmp_path, "13.0", name="usr/local/cuda-13.0")
    environ = {"PATH": str(other / "bin")}
    assert found(environ, tmp_path).home == home
    assert found(environ, tmp_path, major=11).home == other  # for the caller to say what it is


def test_headers_of_another_place_and_spaces(tmp_path: Path) -> None:
    """As conda lays them out."""
    home = made_toolkit(tmp_path / "a folder", lacks=("include/cuda_runtime_api.h", "lib64/libcudart.so"))
    for part in ("targets/x86_64-linux/include/cuda_runtime_api.h", "lib/libcudart.so"):
        (home / part).parent.mkdir(parents=True, exist_ok=True)
        (home / part).touch()
    assert found({"CONDA_PREFIX": str(home)}, tmp_path).include == home / "targets/x86_64-linux/include"


def test_nothing_whole_is_said_in_one_clause(tmp_path: Path) -> None:
    result = find_toolkit({"PATH": ""}, 13, tmp_path)
    assert isinstance(result, Missing)
    assert "nvcc is not on PATH" in result.reason
    broken = made_toolkit(tmp_path, lacks=("include/cuda_runtime_api.h",))
    result = find_toolkit({"PATH": str(broken / "bin"), "CUDA_HOME": "/nowhere"}, 13, tmp_path)
    assert isinstance(result, Missing)
    assert "CUDA_HOME=/nowhere: /nowhere is not there" in result.reason
    assert f"{broken} holds nvcc 13.0 and no include/cuda_runtime_api.h" in result.reason
    assert "\n" not in result.reason
