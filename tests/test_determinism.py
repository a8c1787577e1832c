"""Bitwise the same: over runs, thread counts and threads of the caller; and every instruction-set level is right."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import bn_ext
from digest_worker import digests
from support import check_module, module_for, normal, step

HERE = Path(__file__).resolve().parent
LEVELS = ("default", "avx2", "avx512")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ATEN_CPU_CAPABILITY")


def run_python(arguments: list[str], environment: dict[str, str]) -> str:
    env = {k: v for k, v in os.environ.items() if k not in THREAD_VARIABLES} | environment
    done = subprocess.run([sys.executable, *arguments], env=env, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{arguments} with {environment}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def worker(environment: dict[str, str], *threads: int) -> dict[str, Any]:
    arguments = [str(HERE / "digest_worker.py"), *map(str, threads)]
    return json.loads(run_python(arguments, environment).splitlines()[-1])


def assert_equal_digests(mine: dict[str, str], theirs: dict[str, str], what: str) -> None:
    differing = [case for case in theirs if mine[case] != theirs[case]]
    assert len(mine) == len(theirs) and not differing, f"{what}: {len(differing)} differ, first {differing[:5]}"


@pytest.fixture(scope="module")
def here() -> dict[str, str]:
    return digests()


def test_repeated_runs_are_bitwise_equal(device: str, here: dict[str, str]) -> None:
    first = here if device == "cpu" else digests(device)
    assert_equal_digests(digests(device), first, "second run")


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_count_of_the_process_changes_no_bit(here: dict[str, str], threads: int) -> None:
    torch.set_num_threads(threads)
    assert torch.get_num_threads() == threads
    assert_equal_digests(digests(), here, f"set_num_threads({threads})")


@pytest.mark.parametrize("threads", ["1", "2"])
def test_new_processes_give_the_same_bits(here: dict[str, str], threads: str) -> None:
    inherited = {k: os.environ[k] for k in ("ATEN_CPU_CAPABILITY",) if k in os.environ}
    report = worker({"OMP_NUM_THREADS": threads} | inherited)
    assert report["threads"] == int(threads)
    assert_equal_digests(report["digests"][threads], here, f"OMP_NUM_THREADS={threads}")
    assert len(report["openmp"]) <= 1, f"two OpenMP runtimes in one process: {report['openmp']}"
    if sys.platform == "linux":
        assert report["openmp"], "no OpenMP runtime: the kernels would run on one thread"


def test_several_callers_at_once(here: dict[str, str]) -> None:
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda _: digests(), range(2)):
            assert_equal_digests(found, here, "concurrent caller")


def test_inside_a_forked_autograd_thread() -> None:
    """Backward through several branches, driven from another thread than the forward."""
    module = module_for(bn_ext.FusedBatchNorm1d, 64)
    x, g = normal((4096, 64)), normal((4096, 64), seed=1)
    expected = step(module, x, g).grad_input
    leaf = x.clone().requires_grad_()
    out = module(leaf)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(out.backward, g).result()
    assert leaf.grad is not None and expected is not None and torch.equal(leaf.grad, expected)


def test_deterministic_algorithms_mode_is_accepted(device: str) -> None:
    module = module_for(bn_ext.FusedBatchNorm1d, 5, device)
    torch.use_deterministic_algorithms(True)
    try:
        # In this mode torch.empty is filled with NaN: memory that a kernel reads before writing would show.
        for shape in ((6, 5), (4, 5, 3), (300, 5, 70)):
            check_module(module, normal(shape, device=device), normal(shape, device=device, seed=1))
    finally:
        torch.use_deterministic_algorithms(False)


# ---- instruction-set levels ----


@functools.cache
def machine_levels() -> tuple[str, ...]:
    """Levels this machine can run: those up to the one that torch picks when nothing is forced."""
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    best = run_python(["-c", code], {}).strip().lower()
    return LEVELS[: LEVELS.index(best) + 1] if best in LEVELS else ("default",)


def skip_unless_runnable(level: str) -> None:
    if level not in machine_levels():
        pytest.skip(f"this machine has no {level}")


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_is_deterministic_and_follows_torch(level: str) -> None:
    skip_unless_runnable(level)
    report = worker({"ATEN_CPU_CAPABILITY": level}, 1, 2)
    assert report["torch_level"] == report["level"] == level
    assert_equal_digests(report["digests"]["2"], report["digests"]["1"], f"{level}: two threads against one")


@pytest.mark.parametrize("level", LEVELS)
def test_accuracy_core_at_every_level(level: str) -> None:
    """The files below hold the layouts, types and numbers that a wrong vector body would break."""
    skip_unless_runnable(level)
    files = [str(HERE / f"test_{name}.py") for name in ("numerics", "layouts", "dtypes", "double_backward")]
    options = ["-m", "pytest", "-q", "-x", "-m", "isa", "-k", "cpu", "-p", "no:cacheprovider", "--rootdir", str(HERE)]
    out = run_python([*options, *files], {"ATEN_CPU_CAPABILITY": level})
    assert " passed" in out and " failed" not in out
