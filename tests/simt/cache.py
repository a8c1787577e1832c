"""What of large tensors has to come from memory: the kernels run with a counted second-level cache in front of it.

python -m simt.cache [--page]

On an H200 of tests/simt (132 SMs), whose threads go on side by side, in float32. `x read`: times that the kernel asks
for the inputs. `from memory`: times that they come from there, with a cache of 50 MB, and of 25 MB, as if each half of
it kept a copy of what the other half has. The cache is empty before the call; outputs are written and take room in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch

from simt.calls import Pass
from simt_support import make, run

CACHES = (50, 25)
HEAD = ("tensor", "pass", "MB", "x read", *(f"from memory, {size} MB" for size in CACHES))
# Those of docs/gpu.md's grid that do not stay on chip in one of the passes, and a larger one.
TENSORS = (
    ((8192, 512), "contiguous"),
    ((65536, 64), "contiguous"),
    ((65536, 256), "contiguous"),
    ((262144, 256), "contiguous"),
    ((64, 128, 1024), "permuted"),
    ((16, 512, 1024), "permuted"),
    ((64, 256, 1024), "contiguous"),
    ((4, 4, 1000000), "contiguous"),
    ((1024, 1, 4096), "contiguous"),
)
PASSES = (Pass.FORWARD, Pass.BACKWARD)


def read(pass_: Pass, shape: tuple[int, ...], layout: str, cache_bytes: int, **model: int) -> tuple[float, float]:
    """Times that the inputs are read by the kernel, and from memory behind a cache of that size."""
    inputs = make(shape, layout=layout)
    result = run(pass_, inputs, cache_bytes=cache_bytes, **model)
    names = ("x", "dy") if pass_.backward else ("x",)
    buffers = [launch["buffers"][name] for launch in result.launches for name in names]
    whole = len(names) * inputs.x.nbytes
    asked, missed = (sum(b.get(key, 0) for b in buffers) / whole for key in ("read_bytes", "missed_bytes"))
    return asked, missed


def rows(tensors: Sequence[tuple[tuple[int, ...], str]] = TENSORS) -> Iterator[tuple[str, ...]]:
    """The table without its head."""
    for shape, layout in tensors:
        for pass_ in PASSES:
            found = [read(pass_, shape, layout, size << 20) for size in CACHES]
            megabytes = torch.empty(shape, device="meta").nbytes * (3 if pass_.backward else 2) / 1e6
            name = f"{shape}{' from (N, L, C)' * (layout == 'permuted')}"
            times = (found[0][0], *(missed for _, missed in found))
            yield (name, pass_.name.lower(), f"{megabytes:.0f}", *(f"{value:.2f}" for value in times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="the table of docs/gpu.md")
    page = parser.parse_args().page
    if page:
        print(f"| {' | '.join(HEAD)} |\n{'| --- ' * len(HEAD)}|")
    for row in rows():
        print(f"| {' | '.join(row)} |" if page else "  ".join(row), flush=True)


if __name__ == "__main__":
    main()
