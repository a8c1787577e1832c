"""nvcc compiles every CUDA source for every architecture, without a GPU; checks read ptxas' report and the PTX."""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import nvcc
from nvcc import FAMILIES
from processes import SECTIONS
from simt.bridge import without_parameters

ROOT = Path(__file__).resolve().parents[1]
ARCHS = tuple(arch for family in FAMILIES.values() for arch in family)
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
GLUE = [ROOT / "csrc" / name for name in ("cuda/cut.cpp", "cuda/launch.cpp", "cuda/padded.cpp", "torch/cuda_ops.cpp")]
TOY = ROOT / "tests" / "simt" / "toy.cu"
# Kernels that may spill or use a stack, as (part of the name, why). None needs to.
EXCEPTIONS: tuple[tuple[str, str], ...] = ()
NONE_YET = pytest.param(None, marks=pytest.mark.skip(reason="there are no CUDA sources in csrc/cuda"))


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one function on one architecture; bytes, and registers a thread."""

    name: str
    arch: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


@dataclass
class Compiled:
    usages: list[Usage] = field(default_factory=list)
    ptx: dict[int, str] = field(default_factory=dict)  # by family


@pytest.fixture(scope="session")
def toolkit() -> Path:
    return nvcc.toolkit_or_skip()


def parse_report(text: str) -> list[Usage]:
    """Read `ptxas -v`: one Usage for each kernel and each function that was not inlined, on each architecture."""
    found, arch, name, sizes = [], 0, "", (0, 0, 0)
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for 'sm_(\d+)a?'", line):
            name, arch = match[1], int(match[2])
        elif match := re.search(r"Function properties for '?([\w$.]+)'?", line):
            name = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            sizes = (int(match[1]), int(match[2]), int(match[3]))
            found.append(Usage(name, arch, 0, *sizes, 0))
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            last = found.pop()
            found.append(Usage(last.name, arch, int(match[1]), *sizes, int(shared[1]) if shared else 0))
    return found


def assemble(home: Path, ptx: Path, arch: int) -> str:
    """What ptxas says of PTX on an architecture, kept beside it."""
    report = ptx.parent / f"ptxas_{arch}.txt"
    with FileLock(ptx.parent / f"ptxas_{arch}.lock"):
        if not report.exists():
            code = ptx.parent / f"{arch}.cubin"
            command = [home / "bin" / "ptxas", "-v", "-m64", "--warning-as-error", f"--gpu-name=sm_{arch}", ptx]
            command += ["-o", code]
            said = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
            code.unlink(missing_ok=True)
            if said.returncode != 0:
                raise AssertionError(f"ptxas refuses {ptx.name} of {ptx.parent.name}:\n{said.stderr[-6000:]}")
            report.write_text(said.stdout + said.stderr)
    return report.read_text()


# By type, what ptxas assembles in `make test`, at most of a minute each; `make test-ptx` has it assemble all.
ASSEMBLED = {"float32": (75, 90, 100), "bfloat16": (90,)}


def archs_of(source: Path) -> tuple[int, ...]:
    return ARCHS if nvcc.EVERY else ASSEMBLED.get(source.stem, ())


def families_for(source: Path, archs: tuple[int, ...]) -> list[int]:
    """Whose PTX these take; where nothing is assembled, all that is looked at."""
    return [f for f, all_of in FAMILIES.items() if set(all_of) & set(archs)] or list(nvcc.families_of(source))


def compile_sources(home: Path, wanted: dict[Path, tuple[int, ...]]) -> dict[Path, Compiled]:
    """Compile each to PTX, which tests/ptx runs too, and that for its architectures, as nvcc itself does."""
    families = {s: families_for(s, archs) for s, archs in wanted.items()}
    folders = nvcc.compile_all(home, families)
    jobs = [
        (s, folders[s] / f"{f}.ptx", a) for s, archs in wanted.items() for f in families[s] for a in FAMILIES[f]
        if a in archs
    ]  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda job: assemble(home, *job[1:]), jobs))
    results = {s: Compiled(ptx={f: (folders[s] / f"{f}.ptx").read_text() for f in families[s]}) for s in wanted}
    for (source, *_), report in zip(jobs, reports, strict=True):
        results[source].usages += parse_report(report)
    return results


def compile_source(home: Path, source: Path, archs: tuple[int, ...]) -> Compiled:
    return compile_sources(home, {source: archs})[source]


def spills(usages: list[Usage]) -> list[Usage]:
    """Those that use local memory, exceptions left out."""
    used = [u for u in usages if u.stack or u.spill_stores or u.spill_loads]
    return [u for u in used if not any(part in u.name for part, _ in EXCEPTIONS)]


def vector_accesses(ptx: str) -> tuple[int, int]:
    """How many 128-bit global loads and stores there are."""
    loads = re.findall(r"ld\.global(?:\.\w+(?:::\w+)?)*\.v4\.[bfsu]32", ptx)
    stores = re.findall(r"st\.global(?:\.\w+(?:::\w+)?)*\.v4\.[bfsu]32", ptx)
    return len(loads), len(stores)


@pytest.fixture(scope="session")
def compiled(toolkit: Path, request: pytest.FixtureRequest) -> dict[Path, Compiled]:
    if not SOURCES:
        pytest.skip("there are no CUDA sources in csrc/cuda")
    results = compile_sources(toolkit, {source: archs_of(source) for source in SOURCES})
    table = register_table([u for c in results.values() for u in c.usages])
    request.config.stash[SECTIONS].append(("registers a thread, by ptxas", table))
    return results


def short_names(names: list[str]) -> dict[str, str]:
    """Mangled names to names as in the source, without parameters, where c++filt is there."""
    if not shutil.which("c++filt"):
        return {name: name for name in names}
    said = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    cut = [re.sub(r"\(anonymous namespace\)::|^void ", "", line) for line in said.splitlines()]
    return dict(zip(names, map(without_parameters, cut), strict=True))


def register_table(usages: list[Usage]) -> list[str]:
    """The registers of every kernel, a column an architecture."""
    names = sorted({u.name for u in usages})
    short = short_names(names)
    by_place = {(u.name, u.arch): u for u in usages}
    lines = ["".join(f"{f'sm_{a}':>8}" for a in ARCHS) + "   static shared, kernel"]
    for name in names:
        row = [by_place.get((name, a)) for a in ARCHS]
        shared = max(u.shared for u in row if u)
        lines.append("".join(f"{u.registers if u else '-':>8}" for u in row) + f"  {shared:6} B  {short[name]}")
    return lines


def name_of(source: Path | None) -> str:
    return source.stem if source else "none"


def check_vector_paths(result: Compiled) -> None:
    for arch, ptx in result.ptx.items():
        loads, stores = vector_accesses(ptx)
        assert loads > 0, f"compute_{arch}: no 128-bit global load"
        assert stores > 0, f"compute_{arch}: no 128-bit global store"


@pytest.mark.parametrize("source", SOURCES or [NONE_YET], ids=name_of)
def test_compiles_for_every_architecture(compiled: dict[Path, Compiled], source: Path) -> None:
    assert list(compiled[source].ptx) == families_for(source, archs_of(source))
    kernels = {u.name for u in compiled[source].usages}
    for arch in archs_of(source):
        assert {u.name for u in compiled[source].usages if u.arch == arch} == kernels


@pytest.mark.parametrize("source", SOURCES or [NONE_YET], ids=name_of)
def test_no_spills_and_no_stack(compiled: dict[Path, Compiled], source: Path) -> None:
    if not archs_of(source):
        pytest.skip("`make test-ptx` has ptxas assemble this type")
    assert spills(compiled[source].usages) == []


@pytest.mark.parametrize("source", SOURCES or [NONE_YET], ids=name_of)
def test_vector_paths_move_128_bits(compiled: dict[Path, Compiled], source: Path) -> None:
    if "memory.cuh" not in source.read_text() and not compiled[source].usages:
        pytest.skip("it has no kernels of its own")
    check_vector_paths(compiled[source])


@pytest.mark.parametrize("source", SOURCES or [NONE_YET], ids=name_of)
def test_what_may_write_in_place_loads_coherently(compiled: dict[Path, Compiled], source: Path) -> None:
    """The read-only path of the caches is for memory that the kernel does not write."""
    for arch, ptx in compiled[source].ptx.items():
        bodies = re.findall(r"\.entry (\S+?)\((.*?)\n}", ptx, re.S)
        in_place = [body for name, body in bodies if "ActivatedEvaluation" in name]
        assert len(in_place) == 8 and all("st.global" in body for body in in_place)
        assert not any(".nc" in body for body in in_place), f"compute_{arch}"
        assert any("ld.global.nc" in body for _, body in bodies)


def test_exceptions_are_still_needed(compiled: dict[Path, Compiled]) -> None:
    used = [u for c in compiled.values() for u in c.usages if u.stack or u.spill_stores or u.spill_loads]
    for part, why in EXCEPTIONS:
        assert any(part in u.name for u in used), f"{part} ({why}) uses no local memory any more"


@pytest.mark.parametrize("source", GLUE or [NONE_YET], ids=name_of)
def test_glue_compiles_against_this_torch(toolkit: Path, source: Path) -> None:
    """The glue needs CUDA's headers and torch's, and no CUDA build of torch."""
    include = Path(torch.__file__).parent / "include"
    command = ["g++", "-fsyntax-only", "-std=c++20", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", f"-I{ROOT / 'csrc'}"]
    command += [f"-isystem{p}" for p in (include, include / "torch" / "csrc" / "api" / "include", toolkit / "include")]
    if not shutil.which("g++"):
        pytest.skip("no g++")
    said = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr[-6000:]


# ---- that these checks can fail ----


def test_toy_kernels_pass_the_checks(toolkit: Path) -> None:
    result = compile_source(toolkit, TOY, (75, 90))
    assert len(result.usages) == 2 * 4
    assert all(u.registers > 0 for u in result.usages)
    assert {u.arch for u in result.usages} == {75, 90}
    assert spills(result.usages) == []
    check_vector_paths(result)
    text = "\n".join(register_table(result.usages))
    assert "toy::center_kernel" in text


def test_a_stack_and_a_spill_are_seen(toolkit: Path, tmp_path: Path) -> None:
    source = tmp_path / "bad.cu"
    source.write_text(
        """
        __global__ void stack(float* x, int n) {
          float a[64];
          for (int i = 0; i < 64; ++i) a[i] = x[i];
          for (int i = 0; i < n; ++i) a[i * n % 64] += x[i];
          x[0] = a[n % 64];
        }
        __global__ void __launch_bounds__(1024) spill(float* x) {
          float a[96];
          for (int i = 0; i < 96; ++i) a[i] = x[i * 1024 + threadIdx.x];
          __syncthreads();
          for (int i = 0; i < 96; ++i) x[threadIdx.x * 96 + i] = a[95 - i];
        }
        """
    )
    result = compile_source(toolkit, source, (75,))
    by_name = {name: u for u in result.usages for name in ("stack", "spill") if name in u.name}
    assert by_name["stack"].stack >= 256
    assert by_name["spill"].spill_stores > 0
    assert by_name["spill"].spill_loads > 0
    assert len(spills(result.usages)) == 2
    with pytest.raises(AssertionError, match="no 128-bit"):
        check_vector_paths(result)


def test_a_source_that_does_not_compile_fails(toolkit: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.cu").write_text("__global__ void k(float* x) { x[0] = undeclared; }")
    with pytest.raises(AssertionError, match="undeclared"):
        compile_source(toolkit, tmp_path / "broken.cu", (75,))
