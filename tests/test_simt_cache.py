"""What of a tensor comes from memory, behind a counted second-level cache: the rows that were read last, none twice."""

from __future__ import annotations

import pytest
import torch

from simt import cache
from simt.backend import backend
from simt.calls import Pass
from simt_support import make, run
from test_ptx_counts import block

# Four SMs of an H200: 0.9 MB on chip.
FEW = {"sms": 4}
SHAPES = [((16384, 64), "contiguous"), ((16, 64, 1024), "permuted"), ((16, 4, 16384), "contiguous")]

pytestmark = pytest.mark.skipif(backend().architecture > 0, reason="hints to the caches are seen by g++'s build alone")


@pytest.mark.parametrize(("shape", "layout"), SHAPES, ids=str)
@pytest.mark.parametrize("pass_", cache.PASSES, ids=lambda p: p.name.lower())
def test_rows_that_were_read_last_come_from_the_cache(pass_: Pass, shape: tuple[int, ...], layout: str) -> None:
    """At least half of the room hits, as threads go on at random; in the first sweep's order nothing would."""
    whole = torch.empty(shape, device="meta").nbytes * (2 if pass_.backward else 1) / 2**20
    for megabytes in (2, 3, 64):
        asked, missed = cache.read(pass_, shape, layout, megabytes << 20, **FEW)
        again = (asked - 1) * whole
        assert again > 2, "the tensor has to be larger than what stays on chip and the cache"
        beyond = max(0.0, again - megabytes)
        assert beyond - 0.05 * megabytes <= (missed - 1) * whole <= max(0.0, again - 0.5 * megabytes), (asked, missed)


def test_a_large_cache_misses_each_byte_once_and_none_counts_nothing() -> None:
    inputs = make((512, 64))
    launches = run(Pass.BACKWARD, inputs, cache_bytes=1 << 20).launches
    for name in ("x", "dy"):
        assert sum(launch["buffers"][name]["missed_bytes"] for launch in launches) == inputs.x.nbytes
    assert all("missed_bytes" not in b for b in run(Pass.BACKWARD, inputs).launches[0]["buffers"].values())


def test_a_cache_of_nothing_has_nothing() -> None:
    asked, missed = cache.read(Pass.FORWARD, (16384, 64), "contiguous", 32, **FEW)
    assert missed == pytest.approx(asked, rel=1e-3)


def test_the_page_has_what_a_cache_would_hold() -> None:
    head, _, *rows = block("cached")
    said = {tuple(cells[:2]): cells[2:] for cells in (row.strip("| ").split(" | ") for row in rows)}
    assert head == f"| {' | '.join(cache.HEAD)} |" and len(said) == 2 * len(cache.TENSORS)
    found = next(row for row in cache.rows(cache.TENSORS[:1]) if row[1] == "backward")
    assert said[found[:2]] == list(found[2:]), "python -m simt.cache --page prints the table"
