"""Faults planted in copies of csrc/cuda, which nvcc compiles: each is found; all of them with BN_EXT_PTX_FAULTS=all."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

import nvcc
from ptx.faults import Fault, planted
from ptx_support import RACE, call_of, found
from simt.backend import running_on
from simt.operators import host_files, library
from simt_support import A100, FORWARD, H200, INFERENCE, check, make
from test_simt_activated import check as check_activated

ALL = os.environ.get("BN_EXT_PTX_FAULTS") == "all"
NONE = "none"


@pytest.fixture(scope="module", autouse=True)
def _toolkit() -> None:
    nvcc.toolkit_or_skip()


KERNEL, MEMORY, REDUCE, LAUNCH = "kernel.cuh", "memory.cuh", "reduce.cuh", "instantiate.cuh"
# name: (fault, exchange, rows or shape (None: misaligned tensors), report)
SOURCES: dict[str, tuple[Fault, str, int | tuple[int, ...] | None, str]] = {
    # What g++ does not see.
    "cluster code above 900 only": (
        Fault(KERNEL, "__CUDA_ARCH__ >= 900\n          if", "__CUDA_ARCH__ > 900\n          if", 90),
        "cluster",
        0,
        "out of bounds|nobody wrote",
    ),
    "shared memory aligned to 4": (
        Fault(
            MEMORY,
            "return reinterpret_cast<T*>(bn_ext_dynamic_shared);",
            "return reinterpret_cast<T*>(bn_ext_dynamic_shared + 4);",
            90,
        ),
        NONE,
        257,
        "misaligned bytes at shared byte",
    ),
    "planner takes all for aligned": (
        Fault("plan.cpp", "reinterpret_cast<uintptr_t>(t.data) % access_of(r) != 0 ||", "", 90),
        NONE,
        None,
        "misaligned bytes",
    ),
    "cp.async to the wrong place": (
        Fault(
            MEMORY,
            "static_cast<unsigned>(__cvta_generic_to_shared(shared));",
            "static_cast<unsigned>(reinterpret_cast<size_t>(shared));",
            90,
        ),
        NONE,
        257,
        "out of bounds: 16 bytes at shared byte",
    ),
    "a wait without volatile and memory": (
        Fault(
            MEMORY,
            'asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");',
            'int unused; asm("cp.async.wait_group %1; mov.u32 %0, 0;" : "=r"(unused) : "n"(Left));',
            90,
        ),
        NONE,
        257,
        "while a cp.async",
    ),
    "partials by ld.global.nc": (
        Fault(
            MEMORY,
            'BN_EXT_LOAD(load_visible, "ld.global", : "memory")',
            'BN_EXT_LOAD(load_visible, "ld.global.nc", : "memory")',
            75,
        ),
        "grid",
        0,
        r"ld\.global\.nc",
    ),
    "a load of .u32 as .u16": (
        Fault(
            MEMORY, 'asm volatile(PTX ".u32 %0, [%1];" : "=r"(*r)', 'asm volatile(PTX ".u16 %0, [%1];" : "=r"(*r)', 75
        ),
        NONE,
        None,
        "the tolerance",
    ),
    "a store of .v4 in the wrong order": (
        Fault(MEMORY, 'PTX ".v4.u32 [%4], {%0, %1, %2, %3};"', 'PTX ".v4.u32 [%4], {%1, %0, %2, %3};"', 75),
        NONE,
        0,
        "the tolerance",
    ),
    "a load of .v4 as .v2": (
        Fault(
            MEMORY,
            'asm volatile(PTX ".v4.u32 {%0, %1, %2, %3}, [%4];"  ',
            'asm volatile("mov.u32 %2, 0; mov.u32 %3, 0; " PTX ".v2.u32 {%0, %1}, [%4];"  ',
            75,
            "evaluation",
        ),
        NONE,
        0,
        "the tolerance",
    ),
    "a store of a byte as .u16": (
        Fault(
            MEMORY,
            'asm volatile(PTX ".u8 [%1], %0;" ::"h"(wide)',
            'asm volatile(PTX ".u16 [%1], %0;" ::"h"(wide)',
            75,
            "mask",
        ),
        NONE,
        0,
        "misaligned|race|mask",
    ),
    "cp.async of 8 bytes for 16": (
        Fault(MEMORY, '"cp.async.cg.shared.global [%0], [%1], 16;"', '"cp.async.ca.shared.global [%0], [%1], 8;"', 90),
        NONE,
        257,
        "nobody wrote",
    ),
    "no wait for copies": (
        Fault(MEMORY, 'asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");', "", 90),
        NONE,
        257,
        "while a cp.async",
    ),
    "a wait that leaves one more": (
        Fault(MEMORY, '::"n"(Left) : "memory"', '::"n"(Left + 1) : "memory"', 90),
        NONE,
        257,
        "while a cp.async",
    ),
    "no commit of copies": (
        Fault(MEMORY, 'asm volatile("cp.async.commit_group;" ::: "memory");', "", 90),
        NONE,
        257,
        "cp.async|did not commit",
    ),
    "no copy below sm_80": (
        Fault(
            MEMORY,
            "  detail::load_streaming(global, static_cast<typename detail::Word<Bytes>::Type*>(shared));\n",
            "",
            75,
        ),
        NONE,
        257,
        "nobody wrote",
    ),
    "a copy below sm_80 of half": (
        Fault(
            MEMORY,
            "static_cast<typename detail::Word<Bytes>::Type*>(shared));",
            "static_cast<typename detail::Word<Bytes / 2>::Type*>(shared));",
            75,
        ),
        NONE,
        257,
        "nobody wrote",
    ),
    "cluster barriers above 900 only": (
        Fault(KERNEL, "__CUDA_ARCH__ >= 900\n  if", "__CUDA_ARCH__ > 900\n  if", 90),
        "cluster",
        0,
        "before the cluster's first barrier|whose threads exit",
    ),
    # What it sees too.
    "no barrier: partials written": (
        Fault(KERNEL, "      __syncthreads();  // the threads' partial results are written\n", "", 90),
        NONE,
        0,
        RACE,
    ),
    "no barrier: partials read": (
        Fault(KERNEL, "      __syncthreads();  // the block's are, and nobody reads the threads' any more\n", "", 90),
        "grid",
        0,
        RACE,
    ),
    "no barrier: momentum": (
        Fault(KERNEL, "    __syncthreads();\n    for (int base", "    for (int base", 90),
        NONE,
        0,
        RACE,
    ),
    "no barrier: coefficients": (
        Fault(
            KERNEL, "    __syncthreads();  // the coefficients are written\n    if constexpr", "    if constexpr", 90
        ),
        NONE,
        0,
        RACE,
    ),
    "no barrier: evaluation's coefficients": (
        Fault(KERNEL, "  __syncthreads();  // the coefficients are written\n  A coeff", "  A coeff", 90, "evaluation"),
        NONE,
        0,
        RACE,
    ),
    "no first cluster barrier": (
        Fault(
            KERNEL,
            "  if (plan.exchange == Exchange::kCluster) cg::this_cluster().sync();\n#endif\n\n  const bool",
            "#endif\n\n  const bool",
            90,
        ),
        "cluster",
        0,
        "before the cluster's first barrier|whose threads exit",
    ),
    "no last cluster barrier": (
        Fault(
            KERNEL, "  if (plan.exchange == Exchange::kCluster) cg::this_cluster().sync();\n#endif\n}", "#endif\n}", 90
        ),
        "cluster",
        0,
        "whose threads exit|the block ends, and with it",
    ),
    "no grid barrier": (
        Fault(
            KERNEL,
            "    __threadfence();\n    cg::this_grid().sync();\n    if (plan.pooled)",
            "    __threadfence();\n    __syncthreads();\n    if (plan.pooled)",
            75,
        ),
        "grid",
        0,
        RACE,
    ),
    "no second grid barrier": (
        Fault(
            KERNEL,
            "      __threadfence();\n      cg::this_grid().sync();\n",
            "      __threadfence();\n      __syncthreads();\n",
            75,
        ),
        "grid_pooled",
        0,
        RACE,
    ),
    "too little shared memory": (
        Fault(
            "plan.cpp",
            "  p->shared_bytes = m.fixed + p->kept * m.row;",
            "  p->shared_bytes = m.fixed + p->kept * m.row - 16;",
            90,
        ),
        NONE,
        None,
        "out of bounds: .*shared byte",
    ),
    "half of the lanes in the mask": (
        Fault(REDUCE, "kAllLanes = 0xffffffffu", "kAllLanes = 0x0000ffffu", 75),
        NONE,
        0,
        "mask does not name",
    ),
    "a shuffle in a divergent branch": (
        Fault(
            REDUCE,
            "    pool.combine(lanes);\n    if (j < channels && lane == 0)",
            "    if (j < channels) pool.combine(lanes);\n    if (j < channels && lane == 0)",
            75,
        ),
        NONE,
        (96, 300),
        "deadlock|lanes meet|has ended",
    ),
    "a cooperative launch without the attribute": (
        Fault(
            LAUNCH,
            "    attribute.val.cooperative = 1;\n    config.numAttrs = 1;",
            "    attribute.val.cooperative = 1;",
            75,
        ),
        "grid",
        0,
        "trap|out of bounds",
    ),
    "a cluster launch without the attribute": (
        Fault(
            LAUNCH,
            "    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;\n    config.numAttrs = 1;",
            "    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;",
            90,
        ),
        "cluster",
        0,
        "mapa of rank",
    ),
    "large shared memory without the attribute": (
        Fault(LAUNCH, "if (plan.shared_bytes > 48 * 1024 - 64) {", "if (false) {", 90),
        NONE,
        4001,
        "cudaError_t 1",
    ),
}
SOME = ("cluster code above 900 only", "shared memory aligned to 4", "planner takes all for aligned")


@pytest.mark.parametrize("name", [*SOURCES] if ALL else SOME)
def test_a_changed_source_is_found(name: str) -> None:
    fault, exchange, rows, report = SOURCES[name]
    of_host = fault.file == "plan.cpp"

    def plant(of: Any) -> Any:
        host = host_files(exchange != NONE and not of_host, exchange == "grid_pooled", False, 0)
        return planted(fault, host, of)

    with running_on(fault.architecture):
        if fault.kind == "mask":
            masked = make((33, 72), activation="relu", leaves_mask=True, residual=make((33, 72)).x)
            calls = [lambda seed: check_activated(masked, FORWARD, seed=seed, of=plant(library()), **A100)]
        elif isinstance(rows, tuple):
            shaped = make(rows)
            calls = [lambda seed: check(FORWARD, shaped, seed=seed, of=plant(library()), **H200)]
        else:
            pass_ = INFERENCE if fault.kind == "evaluation" else FORWARD
            walks = ("columns", "by_span") if pass_ == FORWARD else ("columns",)
            calls = [
                call_of(pass_, walk, exchange, plant, rows=rows or 0 if walk == "columns" else 0, scalar=rows is None)
                for walk in walks
            ]
        said = found(calls)
    assert said, "all results are right, and nothing is reported"
    assert re.search(report, said), said
