"""Calls in a regime on machines with a planted fault (test_ptx_faults.py, test_ptx_sources.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from simt.calls import Pass
from simt.operators import library
from simt_support import check, make, smallest

SEEDS = (0, 3)
RACE = "race: |that nobody wrote|what nobody wrote"


def found(calls: list[Callable[..., Any]]) -> str:
    """The first report of these calls, "" if all are right; without the fault they are, too."""
    for call in calls:
        for seed in SEEDS:
            try:
                call(seed=seed)
            except AssertionError as error:
                return str(error)
    return ""


def call_of(
    pass_: Pass, walk: str, exchange: str, plant: Callable[[Any], Any], *, rows: int = 0, scalar: bool = False
) -> Callable[..., Any]:
    """check() in a regime, on the machine that `plant` makes of the right one. rows: instead of the smallest tensor."""
    shape, options = smallest(pass_, walk, exchange, scalar=scalar)
    shape = (rows, *shape[1:]) if rows else shape
    inputs = make(shape, layout="misaligned" if scalar else "contiguous")
    options = options | {"of": plant(options.get("of", library()))}
    return lambda seed: check(pass_, inputs, seed=seed, **options)
