"""Which of the suite's tests run on the stand-in, and why the others do not."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

# Files whose tests are all for a GPU, whether or not they take the fixture.
CUDA_FILES = ("test_cuda.py", "test_cuda_fusion.py", "test_cuda_large.py", "test_cuda_standin.py")
# Elements of the largest input: the interpreter does some million instructions a second.
LARGEST = 1 << 17

INDUCTOR = "inductor, whose kernels are Triton's"
_REASONS = (
    (r"test_cuda_large\.py", "large: beyond 2^31 elements or 65535 blocks"),
    (r"test_cuda\.py::test_threads_with_streams_of_their_own", f"large: more than {LARGEST} elements"),
    (r"inductor|test_one_compilation_and_eagers_bits|test_torch_compile_with_the_default_backend", INDUCTOR),
    (r"test_determinism\.py::test_repeated_runs", "large: minutes in each of two processes"),
    (r"sparse|quantised", "a sparse or quantised tensor, of which there can be no alias"),
    (r"test_cuda\.py::test_what_runs_where_blocks_cannot_wait", f"large: more than {LARGEST} elements"),
)
# What reads the caching allocator's counters, or keeps memory for a graph: in a process of its own.
_ALLOCATOR = re.compile(r"test_cuda(_fusion)?\.py::.*(graph|memory)|test_bench_memory")


def needs_allocator(nodeid: str) -> bool:
    """Whether a test needs torch's caching allocator; without it each tensor has bounds of its own."""
    return bool(_ALLOCATOR.search(nodeid))


def _elements(value: Any) -> int:
    """How many elements a parameter asks for, if it is a shape or has one."""
    value = getattr(value, "shape", value)
    if isinstance(value, tuple | list) and len(value) in (2, 3) and all(type(n) is int for n in value):
        return math.prod(value)
    if isinstance(value, tuple | list):
        return max((_elements(part) for part in value), default=0)
    return 0


def reason(nodeid: str, params: Mapping[str, Any]) -> str:
    """Why a test is left out, or an empty string."""
    for pattern, why in _REASONS:
        if re.search(pattern, nodeid):
            return why
    largest = max((_elements(value) for value in params.values()), default=0)
    return f"large: more than {LARGEST} elements" if largest > LARGEST else ""
